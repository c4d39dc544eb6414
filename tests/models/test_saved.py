"""Networks as files: what was saved comes back, what is torn or foreign is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from friends.data.files import write_tensors
from friends.models import build, transfer
from friends.models.saved import load, save

MOMENTS = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


@pytest.mark.parametrize("name", ["tiny", "convnet", "lenet"])
def test_a_saved_network_answers_as_before(name: str, tmp_path: Path) -> None:
    model = build(name, shape=(3, 32, 32), classes=4, moments=MOMENTS, width=6, generator=torch.Generator())
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.train()
    model(x)  # running statistics move
    file = tmp_path / "model.safetensors"
    save(model, file, name=name, width=6, classes=("a", "b", "c", "d"))
    again, its_name = load(file)
    assert its_name == name
    assert torch.equal(again(x), model.eval()(x))
    assert torch.equal(again.normalize.mean.flatten(), torch.tensor(MOMENTS[0]))


def test_a_transfer_victim_can_be_saved_too(tmp_path: Path) -> None:
    model = build("tiny", shape=(1, 28, 28), classes=2, moments=((0.1,), (0.3,)), generator=torch.Generator())
    victim = transfer(model, generator=torch.Generator().manual_seed(1))
    save(victim, tmp_path / "m.safetensors", name="tiny", width=None, classes=("a", "b"))
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(tmp_path / "m.safetensors")[0](x), victim.eval()(x))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    model = build("tiny", shape=(1, 28, 28), classes=2, moments=((0.1,), (0.3,)), generator=torch.Generator())
    file = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError):
        load(file)
    save(model, file, name="convnet", width=None, classes=("a", "b"))
    with pytest.raises(ValueError, match="does not hold the network that it says"):
        load(file)
    save(model, file, name="tiny", width=None, classes=("a", "b"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="torn"):
        load(file)
    write_tensors(file, {"x": torch.zeros(1)}, {"format": "friends-poisons-1"})
    with pytest.raises(ValueError, match="not a model of ours"):
        load(file)
