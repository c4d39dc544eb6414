"""Poisons for the programs of others: the folder of pickles that :mod:`friends.data.legacy` describes.

The pickles are put together here, step by step, in protocol 3 and with the names that published files use, so they do
not depend on the versions of Python, Pillow and numpy that happen to be installed: Pillow reads the five-part state
of an image in every version, and the name ``numpy.core`` is known to numpy 1 and 2 alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from friends.data.files import replacing
from friends.data.legacy.goal import SOURCE, TARGET, to_bytes
from friends.data.poisoned import Goal, Patch, PoisonedDataset

POISONS, BASES = "poisons.pickle", "base_indices.pickle"


def write_folder(poisoned: PoisonedDataset, path: Path) -> None:
    """Write the poisons and their goal as a folder that the benchmark's and the FRIENDS authors' programs read.

    A targeted goal becomes ``target.pickle``. A backdoor becomes ``source.pickle``, the list of all triggered images,
    and ``target.pickle``, the first of them, with the patch beside it if the trigger is a :class:`Patch` at a fixed
    corner. Poisons are written bit for bit. Goal images are rounded to bytes, as every image of Pillow is; what was
    bytes divided by 255 comes back unchanged. The order of the training set goes into ``base_indices.pickle``:
    programs that load CIFAR themselves need it to be the original one. Images of one channel get the mode "L".

    Args:
        poisoned: the poisoned set.
        path: the folder, made if it is missing. Its ``poisons.pickle`` is written last: without it, it is not whole.

    Raises:
        FileExistsError: the folder holds poisons already.
        ValueError: the format cannot hold the goal: several targets, several wanted classes, poisons of another class
            than the wanted one, or a fixed patch that its images do not show; or images of 2 or 4 channels.
    """
    goal, idx = poisoned.goal, poisoned.poison_idx.cpu()
    poisons = poisoned.train.rows(idx).to("cpu")
    wanted = _refuse(poisoned)
    shown = to_bytes(goal.x)
    entries = [_pair(image, int(label)) for image, label in zip(shown, goal.y_true.tolist(), strict=True)]
    patch = _fixed_patch(goal, shown)
    if (path / POISONS).exists():
        raise FileExistsError(f"{path} holds {POISONS} already: name another folder")
    (path / SOURCE).unlink(missing_ok=True)
    if not goal.targeted:
        _write(path / SOURCE, _list(entries))
    _write(path / TARGET, entries[0] if patch is None else _with_patch(shown[0], int(goal.y_true[0]), patch))
    _write(path / BASES, _array(idx.numpy()))
    _write(path / POISONS, _list([_pair(image, wanted) for image in poisons.x]))


def _refuse(poisoned: PoisonedDataset) -> int:
    """The one class that is wanted. Raises ``ValueError`` where the format cannot hold the set."""
    goal, labels = poisoned.goal, poisoned.train.y[poisoned.poison_idx.to(poisoned.train.y.device)].cpu()
    if len(labels) == 0 or poisoned.train.shape[0] not in (1, 3):
        raise ValueError(f"no folder can be made of {len(labels)} poisons of {poisoned.train.shape}: there must be "
                         "some, of 1 or 3 channels")  # fmt: skip
    if goal.targeted and len(goal) > 1:
        raise ValueError(f"a folder holds one target, this goal has {len(goal)}: write a folder for each, or use "
                         "PoisonedDataset.save")  # fmt: skip
    wanted = int(goal.y_wanted[0])
    if bool((goal.y_wanted != wanted).any()) or bool((labels != wanted).any()):
        raise ValueError("in a folder every goal image is wanted as the label of the poisons, but this goal wants "
                         f"{sorted(set(goal.y_wanted.tolist()))} and the poisons are labelled "
                         f"{sorted(set(labels.tolist()))}: use PoisonedDataset.save")  # fmt: skip
    return wanted


def _fixed_patch(goal: Goal, shown: UInt8[Tensor, "m c h w"]) -> Patch | None:
    """The patch if it has a fixed corner, in whole bytes. Raises ``ValueError`` unless every goal image shows it."""
    trigger = goal.trigger
    if not isinstance(trigger, Patch) or trigger.corner is None:
        return None
    row, column = trigger.corner
    _, ph, pw = trigger.pixels.shape
    values = to_bytes(trigger.pixels).expand(shown.shape[1], ph, pw)
    differs = (shown[:, :, row : row + ph, column : column + pw] != values).flatten(1).any(1).nonzero()
    if len(differs):
        raise ValueError(f"goal image {int(differs[0])} does not show the goal's patch at {trigger.corner}")
    return Patch(values.float() / 255, trigger.corner)


def _write(path: Path, value: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(b"\x80\x03" + value + b".")


def _int(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def _text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def _bytes(value: bytes) -> bytes:
    return b"B" + len(value).to_bytes(4, "little") + value


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _list(items: list[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def _image(x: UInt8[Tensor, "c h w"]) -> bytes:
    """A ``PIL.Image.Image`` in state ``[info, mode, size, palette, bytes]``."""
    c, h, w = x.shape
    mode, size, raw = _text({1: "L", 3: "RGB"}[c]), _tuple(_int(w), _int(h)), x.permute(1, 2, 0).contiguous()
    return b"cPIL.Image\nImage\n)\x81" + _list([b"}", mode, size, b"N", _bytes(raw.numpy().tobytes())]) + b"b"


def _pair(x: UInt8[Tensor, "c h w"], label: int) -> bytes:
    return _tuple(_image(x), _int(label))


def _with_patch(x: UInt8[Tensor, "c h w"], label: int, patch: Patch) -> bytes:
    row, column = patch.corner or (0, 0)
    return _tuple(_image(x), _int(label), _array(patch.pixels.numpy()), _list([_int(column), _int(row)]))


def _array(values: np.ndarray[Any, np.dtype[Any]]) -> bytes:
    """A numpy array, little-endian, in row order."""
    kind = b"cnumpy\ndtype\n" + _tuple(_text(values.dtype.str[1:]), _int(0), _int(1)) + b"R"
    kind += _tuple(_int(3), _text("<"), b"NNN", _int(-1), _int(-1), _int(0)) + b"b"
    empty = _tuple(b"cnumpy\nndarray\n", _tuple(_int(0)), _bytes(b"b")) + b"R"
    raw = values.astype(values.dtype.newbyteorder("<")).tobytes()
    state = _tuple(_int(1), _tuple(*map(_int, values.shape)), kind, b"\x89", _bytes(raw)) + b"b"
    return b"cnumpy.core.multiarray\n_reconstruct\n" + empty + state
