from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from friends.data.files import read_tensors, replacing, tensors_equal, write_json, write_tensors, write_text

TENSORS = {"b": torch.arange(6).view(2, 3), "a": torch.tensor([0.5, -1.0]), "none": torch.zeros(0, 3)}


def test_tensors_and_header_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "x.safetensors"
    header = {"name": "ä", "list": [1, 2.5, None], "nested": {"k": True}}
    write_tensors(path, TENSORS, header)
    tensors, found = read_tensors(path)
    assert tensors_equal(tensors, TENSORS) and found == header
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]  # nothing temporary stays


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "1", TENSORS, {"a": 1, "b": 2})
    write_tensors(tmp_path / "2", dict(reversed(TENSORS.items())), {"b": 2, "a": 1})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_views_and_gradients_can_be_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0, requires_grad=True).view(3, 4)
    views = {"columns": whole.t(), "part": whole[1:], "same": whole}  # share memory, one is not contiguous
    write_tensors(tmp_path / "x", views)
    tensors, _ = read_tensors(tmp_path / "x")
    assert tensors_equal(tensors, {name: view.detach() for name, view in views.items()})


def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "x"):
        pass
    assert not list(tmp_path.iterdir())


def test_text_is_utf8_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "a long first version")
    write_text(path, "ζ = 16")
    assert path.read_bytes() == "ζ = 16".encode()


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x", {"loss": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        write_tensors(tmp_path / "x", TENSORS, {"loss": float("inf")})
    assert not list(tmp_path.iterdir())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        read_tensors(tmp_path / "x")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 40, -1])
def test_torn_files_are_refused_at_every_length(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x"
    write_tensors(path, TENSORS, {"a": 1})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="torn or not a safetensors file"):
        read_tensors(path)


@pytest.mark.parametrize("raw", [b"\x80\x04N.", b"PK\x03\x04" * 10, struct.pack("<Q", 1 << 60) + b"{}"])
def test_foreign_files_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(ValueError, match="torn or not a safetensors file"):
        read_tensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [(None, "no header of ours"), ({"header": "{"}, "no header of ours"), ({"header": "[1]"}, "is list, not an obj")],
)
def test_safetensors_of_other_programs_are_refused(tmp_path: Path, metadata: dict[str, str] | None, words: str) -> None:
    save_file({"a": torch.zeros(2)}, str(tmp_path / "x"), metadata=metadata)
    with pytest.raises(ValueError, match=words):
        read_tensors(tmp_path / "x")


def test_size_is_capped_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, {"a": torch.zeros(1000)})
    size = path.stat().st_size
    assert read_tensors(path, max_bytes=size)
    with pytest.raises(ValueError, match=f"has {size} bytes, more than the {size - 1}"):
        read_tensors(path, max_bytes=size - 1)


def test_tensors_equal_sees_names_values_and_shapes() -> None:
    a = {"x": torch.zeros(2)}
    assert tensors_equal(a, {"x": torch.zeros(2)})
    assert not tensors_equal(a, {"y": torch.zeros(2)})
    assert not tensors_equal(a, {"x": torch.zeros(2), "y": torch.zeros(2)})
    assert not tensors_equal(a, {"x": torch.zeros(1, 2)})
    assert not tensors_equal(a, {"x": torch.tensor([0, 1.0])})
