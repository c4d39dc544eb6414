# Two commands do everything: `make demo` shows the defense at work, `make test` checks the whole package.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
# One thread per process: small networks lose more to threads than they gain.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/install.sh
	@sh tools/install.sh "$(PYTHON)" "$(VENV)"

demo: $(STAMP)
	@$(BIN)/friends demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# How fast it is, beside the targets, on one thread; ten minutes at most. BENCH="--quick" only sees that it runs.
bench: $(STAMP)
	@$(BIN)/python benchmarks/run.py $(BENCH)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
