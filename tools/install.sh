#!/bin/sh
# Make the virtual environment and install the package into it; whatever goes wrong is said in one line.
# usage: tools/install.sh PYTHON VENV
set -u
python=$1
venv=$2
log=$venv/install.log

fail() {
    echo "install: $1" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 ||
    fail "no '$python' on this machine: install Python 3.10 or newer, or name one with 'make PYTHON=/path/to/python'"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version 2>&1) is too old: Python 3.10 or newer is needed (make PYTHON=/path/to/python)"
if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv" >/dev/null 2>&1 ||
        fail "'$python -m venv' failed: install Python's venv module (on Debian and Ubuntu: apt install python3-venv)"
fi
echo "install: installing into $venv (a few minutes; the log is $log)"
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
    -e '.[dev]' -c constraints.txt >"$log" 2>&1; then
    if grep -qiE "command '?[^ ]*(gcc|cc|clang|g\+\+|cl\.exe)'? failed|unable to execute|Microsoft Visual C|no acceptable C compiler" "$log"; then
        fail "a package had to be compiled and no C compiler was found: install one (on Debian and Ubuntu: apt install build-essential)"
    fi
    if grep -qiE "NewConnectionError|Temporary failure in name resolution|Max retries exceeded|Network is unreachable|ConnectTimeout|ProxyError|Name or service not known|Connection refused" "$log"; then
        fail "the package index cannot be reached: check the network or the proxy (details in $log)"
    fi
    if grep -qiE "No space left on device" "$log"; then
        fail "the disk is full (details in $log)"
    fi
    fail "pip failed: $(grep -iE '^ *error' "$log" | tail -n 1 | cut -c1-200) (details in $log)"
fi
touch "$venv/installed"
