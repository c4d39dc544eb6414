from __future__ import annotations

import hashlib
import itertools
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from friends.data import sources
from friends.data.cifar import FORMS
from friends.data.download import DownloadError, fetch
from friends.data.sources import download_cifar, load

BODY = bytes(range(256)) * 4000  # about 1 MB, more than one chunk
MD5 = hashlib.md5(BODY, usedforsecurity=False).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Answers by the name that is asked for: whole, short, silent, or not at all."""

    body = BODY

    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name == "gone":
            self.send_error(404)
            return
        self.send_response(200)
        if name != "unannounced":
            self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if name == "silent":
            self.server.quiet.wait(5)  # type: ignore[attr-defined]
        else:
            self.wfile.write(self.body[: 300_000 if name == "short" else None])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    running.quiet = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=partial(running.serve_forever, 0.02))
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.quiet.set()  # type: ignore[attr-defined]
    running.shutdown()
    thread.join()
    running.server_close()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("name", ["whole", "unannounced"])
def test_a_good_file_arrives_whole(server: str, tmp_path: Path, name: str) -> None:
    told: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int, note: str = "", /) -> None:
        told.append((what, done, total))

    path = fetch(f"{server}/{name}", tmp_path / "new" / "x.tar.gz", md5=MD5.upper(), progress=progress)
    assert path.read_bytes() == BODY and left(path.parent) == ["x.tar.gz"]
    assert told[-1] == ("download x.tar.gz", len(BODY), len(BODY)) and len(told) > 2
    assert all(a[1] < b[1] for a, b in itertools.pairwise(told))


@pytest.mark.parametrize(
    ("name", "md5", "words"),
    [
        ("whole", "0" * 32, f"the file has md5 {MD5}, not 0000"),
        ("short", MD5, f"the connection ended after 300000 of {len(BODY)} bytes"),
        ("gone", MD5, "Not Found"),
        ("silent", MD5, "timed out"),
    ],
)
def test_bad_answers_leave_nothing_and_say_what_to_do(
    server: str, tmp_path: Path, name: str, md5: str, words: str
) -> None:
    path = tmp_path / "x.tar.gz"
    with pytest.raises(DownloadError, match=words) as error:
        fetch(f"{server}/{name}", path, md5=md5, timeout=0.3)
    said = str(error.value)
    assert f"{server}/{name}" in said and f"get it by hand (md5 {md5}) and put it at {path}" in said
    assert "\n" not in said and not left(tmp_path)


def test_a_bad_answer_keeps_the_old_file(server: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(DownloadError):
        fetch(f"{server}/short", tmp_path / "x", md5=MD5)
    assert (tmp_path / "x").read_text() == "old" and left(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["whole", "unannounced"])
def test_an_endless_answer_is_cut_off(server: str, tmp_path: Path, name: str) -> None:
    with pytest.raises(DownloadError, match="longer than 500000 bytes"):
        fetch(f"{server}/{name}", tmp_path / "x", md5=MD5, max_bytes=500_000)
    assert not left(tmp_path)


def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(DownloadError, match=r"refused.*; get it by hand"):
            fetch(f"http://127.0.0.1:{taken.getsockname()[1]}/x", tmp_path / "x", md5=MD5)
    with pytest.raises(DownloadError, match="cannot download"):
        fetch("http://name.invalid/x", tmp_path / "x", md5=MD5)
    assert not left(tmp_path)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/x", "cifar10"])
def test_only_the_web_is_fetched_from(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="only http and https"):
        fetch(url, tmp_path / "x", md5=MD5)


# -- CIFAR ----------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small CIFAR-10 that the server hands out; returns its checksum."""
    import io
    import tarfile

    form, buffer = FORMS[0], io.BytesIO()
    raw = b"".join(bytes([label]) + bytes([label] * 3072) for label in range(10))
    with tarfile.open(fileobj=buffer, mode="w:gz") as packing:
        for name in form.files:
            body = b"\n".join(b"class%d" % i for i in range(10)) if name == form.names else raw
            member = tarfile.TarInfo(f"{form.folder}/{name}")
            member.size = len(body)
            packing.addfile(member, io.BytesIO(body))
    monkeypatch.setattr(Server, "body", buffer.getvalue())
    return hashlib.md5(buffer.getvalue(), usedforsecurity=False).hexdigest()


def test_cifar_is_fetched_once_from_a_mirror_and_then_read(
    server: str, archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    path = download_cifar("cifar10", cache, url=f"{server}/whole", md5=archive)
    assert path == cache / "cifar-10-binary.tar.gz"
    monkeypatch.setenv("FRIENDS_CIFAR10_URL", f"{server}/gone")  # would fail if it were asked again
    train, test = load("cifar10", cache=cache, download=True)
    assert (len(train), len(test), train.classes[3]) == (50, 10, "class3")


def test_load_downloads_from_the_address_in_the_environment_and_insists_on_the_published_checksum(
    server: str, archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FRIENDS_CIFAR10_URL", f"{server}/whole")
    with pytest.raises(DownloadError, match=f"has md5 {archive}, not c32a1d4ab5d03f1284b67883e8d87530"):
        load("cifar10", cache=tmp_path / "cache", download=True)
    assert not left(tmp_path / "cache")


def test_load_downloads_from_the_author_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Path, str]] = []

    def offline(url: str, path: Path, *, md5: str, **_: object) -> Path:
        asked.append((url, path, md5))
        raise DownloadError("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "fetch", offline)
    for name, form in (("cifar10", FORMS[0]), ("cifar100", FORMS[1])):
        monkeypatch.delenv(f"FRIENDS_{name.upper()}_URL", raising=False)
        with pytest.raises(DownloadError, match="offline"):
            load(name, cache=tmp_path, download=True)
        assert asked.pop() == (f"https://www.cs.toronto.edu/~kriz/{form.archive}", tmp_path / form.archive, form.md5)
