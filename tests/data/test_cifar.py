from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from friends.data import cifar, cifar_pickle
from friends.data.cifar import FORMS, Form, read
from friends.data.cifar_pickle import RecordedArray, RecordedType, UnsafePickleError, unpickle
from friends.data.sources import load

BY_FOLDER = {form.folder: form for form in FORMS}
TEN = tuple("abcdefghij")


def rows_of(name: str, n: int = 12) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pixels and labels of one file, different for each file."""
    rng = np.random.default_rng(sum(name.split(".")[0].encode()))
    return rng.integers(0, 256, (n, 3072), dtype=np.uint8), np.arange(n) % 10


def python2_pickle(batch: dict[bytes, Any]) -> bytes:
    """As the published files are: protocol 2, raw byte strings, arrays by ``numpy.core.multiarray``.

    Python 3 cannot write byte strings of Python 2, so the opcodes are put together here.
    """

    def item(value: Any) -> bytes:
        if isinstance(value, bytes):
            return b"T" + len(value).to_bytes(4, "little") + value  # BINSTRING
        if isinstance(value, int):
            return b"J" + value.to_bytes(4, "little", signed=True)
        if isinstance(value, list):
            return b"](" + b"".join(map(item, value)) + b"e"
        if isinstance(value, np.ndarray):
            array: np.ndarray[Any, Any] = value
            made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
            kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            shape = b"(" + b"".join(map(item, array.shape)) + b"t"
            return made + b"(K\x01" + shape + kind + b"\x89" + item(array.tobytes()) + b"tb"
        raise TypeError(value)

    return b"\x80\x02}(" + b"".join(item(key) + item(value) for key, value in batch.items()) + b"u."


def files_of(form: Form, protocol: int | None = None) -> dict[str, bytes]:
    """A small data set in the given form; pickles by Python 2 where ``protocol`` is None."""
    files: dict[str, bytes] = {}
    for name in (*form.train, form.test):
        x, y = rows_of(name)
        if form.binary:
            coarse = bytes(form.label_bytes - 1)
            files[name] = b"".join(coarse + bytes([label]) + row.tobytes() for row, label in zip(x, y, strict=True))
        else:
            batch = {b"batch_label": b"part", form.labels.encode(): y.tolist(), b"data": x}
            files[name] = python2_pickle(batch) if protocol is None else pickle.dumps(batch, protocol)
    names = list(TEN)
    if form.binary:
        files[form.names] = ("\n".join(names) + "\n\n").encode()
    else:
        meta = {form.label_names.encode(): [name.encode() for name in names], b"num_vis": 3072}
        files[form.names] = python2_pickle(meta) if protocol is None else pickle.dumps(meta, protocol)
    return files


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


def packed(path: Path, files: dict[str, bytes], prefix: str = "folder/") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def check(form: Form, source: Path) -> None:
    train, test = load(source)
    assert train.classes == test.classes == TEN and train.name == form.name
    for data, names in ((train, form.train), (test, (form.test,))):
        x = np.concatenate([rows_of(name)[0] for name in names]).reshape(-1, 3, 32, 32)
        assert np.array_equal(data.x.numpy(), x)
        assert data.y.tolist() == np.concatenate([rows_of(name)[1] for name in names]).tolist()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.folder)
def test_all_forms_packed_and_unpacked(tmp_path: Path, form: Form) -> None:
    check(form, unpacked(tmp_path / form.folder, files_of(form)))
    check(form, tmp_path)  # the folder that holds the folder
    check(form, packed(tmp_path / form.archive, files_of(form), form.folder + "/"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar-100-python"])
def test_pickles_written_again_by_python_3(tmp_path: Path, folder: str, protocol: int) -> None:
    form = BY_FOLDER[folder]
    if protocol == 5:  # numpy then writes an array as a buffer, which no published file does
        with pytest.raises(UnsafePickleError, match="_frombuffer"):
            read(unpacked(tmp_path / folder, files_of(form, protocol)))
    else:
        check(form, unpacked(tmp_path / folder, files_of(form, protocol)))


def test_the_binary_form_is_preferred(tmp_path: Path) -> None:
    python, binary = BY_FOLDER["cifar-10-batches-py"], BY_FOLDER["cifar-10-batches-bin"]
    poisoned = dict.fromkeys(python.files, b"not a pickle")
    check(binary, unpacked(tmp_path / "both", files_of(binary) | poisoned))
    unpacked(tmp_path / python.folder, poisoned)
    packed(tmp_path / binary.archive, files_of(binary))
    check(binary, tmp_path)


# -- hostile pickles ------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


MARK = "touched"


def hostile() -> dict[str, bytes]:
    def dump(value: object) -> bytes:
        return pickle.dumps({b"data": value, b"labels": [0]}, 2)

    return {
        "os.system": dump(Call(os.system, f"touch {MARK}")),
        "builtins.open": dump(Call(open, MARK, "w")),
        "builtins.eval": dump(Call(eval, f"open({MARK!r}, 'w')")),
        "builtins.getattr": dump(Call(getattr, "text", "upper")),
        "collections.OrderedDict": dump(OrderedDict(a=1)),
        "numpy.load": b"\x80\x02cnumpy\nload\n(X\x07\x00\x00\x00touchedtR.",
        "builtins.exec": b"c__builtin__\nexec\n(S\"open('touched','w')\"\ntR.",
        "numpy.ndarray.__subclasses__": b"\x80\x04\x8c\x05numpy\x8c\x16ndarray.__subclasses__\x93.",
        "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "INST": b"(S'touch touched'\nios\nsystem\n.",
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_pickles_are_refused_and_nothing_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafePickleError, match=r"^here is not a CIFAR pickle: it asks for .*nothing was run"):
        unpickle(hostile()[name], "here")
    assert not list(tmp_path.iterdir())


def test_a_hostile_batch_is_refused_with_its_name(tmp_path: Path) -> None:
    form = BY_FOLDER["cifar-10-batches-py"]
    files = files_of(form) | {"data_batch_3": hostile()["os.system"]}
    with pytest.raises(UnsafePickleError, match=r"data_batch_3 .*asks for (posix|nt)\.system"):
        read(packed(tmp_path / form.archive, files))


def test_pickles_cannot_change_the_recorders() -> None:
    """BUILD may set attributes of whatever is on the stack: here of the classes that find_class hands out."""
    before = {name: dict(vars(value)) for name, value in vars(cifar_pickle).items() if isinstance(value, type)}
    for module, name in (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("_codecs", "encode"),
    ):
        for state in (b"}X\x08\x00\x00\x00to_bytesNs", b"N}X\x08\x00\x00\x00to_bytesNs\x86"):
            with pytest.raises(ValueError, match="torn or not a CIFAR pickle"):
                unpickle(f"\x80\x02c{module}\n{name}\n".encode() + state + b"b.", "here")
    after = {name: dict(vars(value)) for name, value in vars(cifar_pickle).items() if isinstance(value, type)}
    assert before == after


def test_no_codec_but_latin1_is_looked_up() -> None:
    raw = pickle.dumps({"data": Call(__import__("_codecs").encode, "x", "rot13")}, 2)
    with pytest.raises(UnsafePickleError, match="asks for the codec"):
        unpickle(raw, "here")


@pytest.mark.parametrize(
    "array",
    [
        np.array([{"a": 1}, None], dtype=object),
        np.zeros((2, 3072), np.float32),
        np.array(["ab"]),
    ],
)
def test_arrays_of_other_kinds_are_refused(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    form = BY_FOLDER["cifar-100-python"]
    files = files_of(form) | {"train": pickle.dumps({b"data": array, b"fine_labels": [0, 1]}, 2)}
    with pytest.raises(ValueError, match=r"train holds an array that is not of uint8"):
        read(unpacked(tmp_path / form.folder, files))


def test_arrays_in_column_order(tmp_path: Path) -> None:
    form = BY_FOLDER["cifar-100-python"]
    x, y = rows_of("train")
    batch = {b"data": np.asfortranarray(x), b"fine_labels": y.tolist()}
    check(form, unpacked(tmp_path / form.folder, files_of(form) | {"train": pickle.dumps(batch, 2)}))


@pytest.mark.parametrize("shape", [(10**12, 3072), (-1, -1), (3, 3072), ("a",), (None,), 7])
def test_arrays_with_a_false_shape_allocate_nothing(shape: Any) -> None:
    array, kind = RecordedArray(), RecordedType(b"u1")
    array.__setstate__((1, shape, kind, False, bytes(2 * 3072)))
    with pytest.raises(ValueError, match="here holds an array"):
        array.to_bytes("here")


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({b"labels": [0]}, "lacks an array 'data'"),
        ({b"data": np.zeros((2, 3072), np.uint8)}, "lacks .* 'labels'"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "1"]}, "lacks .* 'labels'"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10**30]}, "lacks .* 'labels'"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, r"data of \(2, 3072\) for 1 labels"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, r"not \(n, 3072\)"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, r"data of \(0, 3072\)"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, "training: label 10 of row 13 is out of range"),
        ([1, 2], "a pickle of list, not of a dict"),
    ],
)
def test_batches_that_do_not_fit_are_refused(tmp_path: Path, batch: object, words: str) -> None:
    form = BY_FOLDER["cifar-10-batches-py"]
    files = files_of(form) | {"data_batch_2": pickle.dumps(batch, 3)}
    with pytest.raises(ValueError, match=words):
        read(unpacked(tmp_path / form.folder, files))


@pytest.mark.parametrize("keep", [0, 1, 40, 3000, -1])
def test_torn_pickles_are_refused(keep: int) -> None:
    raw = files_of(BY_FOLDER["cifar-100-python"])["train"]
    with pytest.raises(ValueError, match="here is torn or not a CIFAR pickle"):
        unpickle(raw[:keep], "here")


# -- torn and foreign files -----------------------------------------------------------------------------------


def test_torn_binary_files_are_refused(tmp_path: Path) -> None:
    form = BY_FOLDER["cifar-10-batches-bin"]
    folder = unpacked(tmp_path / form.folder, files_of(form))
    raw = (folder / "data_batch_4.bin").read_bytes()
    for torn in (raw[:-1], b""):
        (folder / "data_batch_4.bin").write_bytes(torn)
        with pytest.raises(ValueError, match=rf"data_batch_4\.bin is torn: {len(torn)} bytes are no whole number"):
            load(folder)


def test_labels_out_of_range_name_the_row(tmp_path: Path) -> None:
    form = BY_FOLDER["cifar-100-binary"]
    files = files_of(form)
    files["test.bin"] = bytes([0, 3]) + bytes(3072) + bytes([0, 99]) + bytes(3072)
    with pytest.raises(ValueError, match="test: label 99 of row 1 is out of range: there are 10 classes"):
        read(unpacked(tmp_path / form.folder, files))


def test_missing_files_are_named(tmp_path: Path) -> None:
    form = BY_FOLDER["cifar-10-batches-bin"]
    files = files_of(form)
    del files["data_batch_5.bin"], files["batches.meta.txt"]
    for source in (unpacked(tmp_path / form.folder, files), packed(tmp_path / form.archive, files)):
        with pytest.raises(ValueError, match=r"not a whole .* it lacks data_batch_5\.bin, batches\.meta\.txt"):
            load(source)
    with pytest.raises(ValueError, match="holds no file of CIFAR"):
        load(packed(tmp_path / "other.tar.gz", {"a": b"b"}))


def test_class_names_are_needed(tmp_path: Path) -> None:
    binary, python = BY_FOLDER["cifar-10-batches-bin"], BY_FOLDER["cifar-100-python"]
    for form, raw in ((binary, b"\n"), (python, pickle.dumps({b"fine_label_names": 3}, 2))):
        with pytest.raises(ValueError, match="lists no class names"):
            read(unpacked(tmp_path / form.folder, files_of(form) | {form.names: raw}))


@pytest.mark.parametrize("keep", [0, 20, 4000, -20])
def test_torn_archives_are_refused(tmp_path: Path, keep: int) -> None:
    form = BY_FOLDER["cifar-10-batches-bin"]
    path = packed(tmp_path / form.archive, files_of(form))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz"):
        load(path)


def test_a_flipped_bit_in_an_archive_is_noticed(tmp_path: Path) -> None:
    form = BY_FOLDER["cifar-10-batches-bin"]
    path = packed(tmp_path / form.archive, files_of(form))
    raw = bytearray(path.read_bytes())  # random pixels are stored as they are: the stream stays readable
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"torn or not a tar archive: CRC check failed"):
        load(path)


def test_plain_tar_is_read_too(tmp_path: Path) -> None:
    form = BY_FOLDER["cifar-100-binary"]
    path = packed(tmp_path / "a.tar.gz", files_of(form))
    (tmp_path / "a.tar").write_bytes(gzip.decompress(path.read_bytes()))
    check(form, tmp_path / "a.tar")


def test_archives_are_read_and_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = BY_FOLDER["cifar-10-batches-bin"]
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    files = files_of(form)
    path = packed(tmp_path / form.archive, files | {"evil.sh": b"x"}, prefix="../../")
    check(form, path)
    assert not list(work.iterdir()) and sorted(p.name for p in tmp_path.iterdir()) == [form.archive, "work"]


def test_links_and_repeated_members_in_archives(tmp_path: Path) -> None:
    form = BY_FOLDER["cifar-10-batches-bin"]
    path = tmp_path / form.archive
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ValueError, match="holds no file of CIFAR"):
        load(path)
    with tarfile.open(path, "w:gz") as archive:
        for folder in ("a/", "b/"):
            member = tarfile.TarInfo(folder + "test_batch.bin")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"1234"))
    with pytest.raises(ValueError, match=r"holds test_batch\.bin twice"):
        load(path)


def test_implausibly_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = BY_FOLDER["cifar-10-batches-bin"]
    folder, path = unpacked(tmp_path / form.folder, files_of(form)), packed(tmp_path / form.archive, files_of(form))
    monkeypatch.setattr(cifar, "MAX_BYTES", 3073)
    with pytest.raises(ValueError, match="more than any file of CIFAR"):
        load(folder)
    with pytest.raises(ValueError, match="larger than any file of CIFAR"):
        load(path)
