"""Networks by name: ours, of libraries that may be missing, and of the user's own."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from friends.models import build
from friends.models.named import check_name, is_import_path, network

MINE = """
from torch import nn
def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
def needs_more(width, num_classes): return make(num_classes)
def no_module(num_classes): return 3
value = 5
"""
SHAPE = {"shape": (3, 8, 8), "classes": 4, "moments": ((0.5,) * 3, (0.25,) * 3)}


def made(name: str, seed: int = 0, **given: Any) -> nn.Module:
    return network(name, generator=torch.Generator().manual_seed(seed), **{**SHAPE, **given})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(MINE)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    (tmp_path / "my_hungry.py").write_text("import no_such_package_at_all")
    yield tmp_path  # type: ignore[misc]
    for name in ("my_nets", "my_broken", "my_hungry"):
        sys.modules.pop(name, None)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for torchvision and timm that answer as they do."""

    class Answer(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 8 * 8, num_classes)

        def forward(self, x: torch.Tensor) -> object:
            return types.SimpleNamespace(logits=self.layer(x.flatten(1)))

    vision = types.ModuleType("torchvision")
    vision.models = types.SimpleNamespace(  # type: ignore[attr-defined]
        list_models=lambda module: ["resnet50", "googlenet"],
        get_model=lambda name, weights, num_classes: Answer(num_classes),
    )
    timm = types.ModuleType("timm")
    timm.list_models = lambda: ["vit_tiny"]  # type: ignore[attr-defined]
    timm.create_model = lambda name, pretrained, num_classes: Answer(num_classes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    monkeypatch.setitem(sys.modules, "timm", timm)


def test_a_name_of_ours_is_what_build_makes() -> None:
    mine = made("tiny", width=8).state_dict()
    theirs = build("tiny", width=8, generator=torch.Generator().manual_seed(0), **SHAPE).state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", ["torchvision:googlenet", "timm:vit_tiny"])
def test_networks_of_libraries_are_normalised_for_and_see_grey_images_as_three_channels(name: str) -> None:
    grey = made(name, shape=(1, 8, 8), moments=((0.5,), (0.25,)))
    x = torch.rand(2, 1, 8, 8)
    inner = grey.network  # type: ignore[attr-defined]
    wanted = inner(((x - 0.5) / 0.25).repeat(1, 3, 1, 1)).logits
    assert torch.equal(grey(x), wanted) and wanted.shape == (2, 4)


def test_a_function_of_ones_own_is_called_with_the_number_of_classes(here: Path) -> None:
    before, state = list(sys.path), torch.get_rng_state()
    first, again, other = made("my_nets:make"), made("my_nets:make"), made("my_nets:make", seed=1)
    assert sys.path == before and torch.equal(state, torch.get_rng_state())
    assert first(torch.rand(2, 3, 8, 8)).shape == (2, 4)
    assert torch.equal(first.network[1].weight, again.network[1].weight)  # type: ignore[attr-defined,index]
    assert not torch.equal(first.network[1].weight, other.network[1].weight)  # type: ignore[attr-defined,index]


def test_what_is_installed_is_not_stood_in_for_by_a_file_in_the_folder(here: Path) -> None:
    (here / "wave.py").write_text("raise SystemExit('the file was run')")
    sys.modules.pop("wave", None)
    with pytest.raises(ValueError, match="wave has no function 'make'"):
        check_name("wave:make")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tinny", ValueError, "unknown model 'tinny'; did you mean 'tiny'"),
        ("qqqqqqq", ValueError, "there are: resnet18,.*torchvision:NAME.*package.module:function"),
        ("my_nets:mak", ValueError, "has no function 'mak'; did you mean 'make'"),
        ("my_nets:value", ValueError, "has no function 'value'"),
        ("my_nets:", ValueError, "is no import path"),
        ("my-nets:make", ValueError, "is no import path"),
        ("../my_nets:make", ValueError, "is no import path"),
        ("my_nuts:make", ModuleNotFoundError, "no module 'my_nuts' in "),
        ("my_hungry:make", ModuleNotFoundError, "my_hungry needs the package 'no_such_package_at_all'"),
        ("my_broken:make", ValueError, "importing my_broken failed: ZeroDivisionError"),
        ("my_nets:needs_more", ValueError, "called with num_classes=4 it fails: TypeError"),
        ("my_nets:no_module", ValueError, "returns int, not a torch.nn.Module"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(here: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made(name)


@pytest.mark.usefixtures("libraries")
def test_names_that_a_library_does_not_list_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown torchvision model 'resnet5'; did you mean 'resnet50'"):
        check_name("torchvision:resnet5")
    with pytest.raises(ValueError, match="unknown timm model 'hf-hub:someone/theirs'"):  # it would download
        check_name("timm:hf-hub:someone/theirs")
    with pytest.raises(ValueError, match="width is for networks of ours"):
        check_name("timm:vit_tiny", 8)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_library_is_named_with_the_way_out(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {library}"):
        check_name(f"{library}:resnet18")


def test_only_paths_to_code_of_the_users_own_are_import_paths() -> None:
    assert [is_import_path(n) for n in ("tiny", "timm:a", "torchvision:a", "a:b", "a.b:c")] == [False] * 3 + [True] * 2
