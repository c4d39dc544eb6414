"""One file from the network: whole and with the right checksum, or not at all."""

from __future__ import annotations

import functools
import hashlib
import http.client
import urllib.request
from collections.abc import Callable
from pathlib import Path

from friends.data.files import replacing
from friends.types import Progress, silent

CHUNK = 1 << 18


class DownloadError(OSError):
    """A file could not be fetched. The message is one line and says how to get it by hand."""


def fetch(
    url: str,
    path: Path,
    *,
    md5: str,
    progress: Progress = silent,
    timeout: float = 30.0,
    max_bytes: int = 1 << 30,
) -> Path:
    """Download ``url`` to ``path``; what is not exactly the expected file never gets that name.

    Args:
        md5: the checksum that the publisher states, in hexadecimal.
        progress: told the bytes so far and in all.
        timeout: seconds without an answer after which to give up.
        max_bytes: stop when the answer is longer than this.

    Raises:
        DownloadError: no connection, an HTTP error, a short or too long answer, or a wrong checksum.
        ValueError: the address is not http or https.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"only http and https addresses are fetched, not {url!r}")
    try:
        with replacing(path) as temporary:
            report = functools.partial(progress, f"download {path.name}")
            found = _stream(url, temporary, report, timeout, max_bytes)
            if found != md5.lower():
                raise DownloadError(f"the file has md5 {found}, not {md5.lower()}")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(f"cannot download {url}: {' '.join(str(reason).split())}; "
                            f"get it by hand (md5 {md5}) and put it at {path}") from error  # fmt: skip
    return path


def _stream(url: str, path: Path, report: Callable[[int, int], None], timeout: float, max_bytes: int) -> str:
    """Write the body of ``url`` to ``path`` and return its md5."""
    digest, done = hashlib.md5(usedforsecurity=False), 0
    request = urllib.request.Request(url, headers={"User-Agent": "friends"})
    with urllib.request.urlopen(request, timeout=timeout) as answer, path.open("wb") as file:
        total = int(answer.headers.get("Content-Length") or 0)
        while chunk := answer.read(CHUNK):
            done += len(chunk)
            if max(done, total) > max_bytes:
                raise DownloadError(f"the answer is longer than {max_bytes} bytes")
            digest.update(chunk)
            file.write(chunk)
            report(done, max(done, total))
        if total and done != total:
            raise DownloadError(f"the connection ended after {done} of {total} bytes")
    return digest.hexdigest()
