"""Weights by their address: downloaded once into a cache, checked whenever they are used, and never where offline."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import string
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from .errors import CheckpointError, first_line
from .files import atomic, sha256, write_text

_log = logging.getLogger("matpac_fast")
# With one slash too, which is what a Path makes of two.
_ADDRESS = re.compile(r"((?:[\w-]+:)?)(https?):/{1,2}(.+)", re.DOTALL | re.IGNORECASE)
_OFFLINE = ("MATPAC_FAST_OFFLINE", "HF_HUB_OFFLINE")
_SILENT_FOR = 30.0  # seconds without a byte, after which a download has failed


def cache_folder() -> Path:
    """Where downloads lie: `MATPAC_FAST_CACHE`, else matpac_fast in `XDG_CACHE_HOME`, else in ~/.cache."""
    try:
        if own := os.environ.get("MATPAC_FAST_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matpac_fast"
    except RuntimeError:  # a user without an entry in passwd, as in a container, and no HOME
        raise CheckpointError(
            "downloads are kept in ~/.cache, and this user has no home folder; let MATPAC_FAST_CACHE name a folder, "
            "without ~"
        ) from None


def offline() -> str | None:
    """The setting that forbids downloads, `MATPAC_FAST_OFFLINE` or `HF_HUB_OFFLINE`, or None."""
    return next((name for name in _OFFLINE if os.environ.get(name, "0").lower() in ("1", "on", "yes", "true")), None)


def resolve(name: str) -> str:
    """`name` with its address, if it has one ("https://..." or "kind:https://..."), replaced by the local file.

    The address may end in "#sha256=HEX", which the file must then have; without it, the SHA-256 of the first download
    is kept and must still be that of the file. "http://", where an address leads to it too, is taken only with it.

    Raises:
        CheckpointError: the download failed or is forbidden, or the file is another than it should be.
    """
    if (found := _ADDRESS.fullmatch(name)) is None:
        return name
    address = f"{found[2].lower()}://{found[3]}"
    try:
        url, fragment = urllib.parse.urldefrag(address)
        urllib.parse.urlsplit(url)
    except ValueError as error:
        raise CheckpointError(f"{address}: is no address: {error}; expected https://HOST/FILE") from None
    pinned = None
    if fragment:
        if (match := re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)) is None:
            raise CheckpointError(
                f"{url}: ends in #{fragment}; expected #sha256= and 64 hexadecimal digits, or nothing"
            )
        pinned = match[1].lower()
    if pinned is None and url.startswith("http://"):
        raise CheckpointError(
            f"{url}: anybody on the way could change it; use https://, or add #sha256= and its digits"
        )
    return found[1] + os.fspath(_fetch(url, pinned))


def _fetch(url: str, pinned: str | None) -> Path:
    folder = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16]
    path, record = folder / _file_name(url), folder / "sha256"
    if path.is_file() and record.is_file():
        known = record.read_text(encoding="utf-8", errors="replace")[:64]
        is_now = sha256(path)
        if is_now != known:
            raise CheckpointError(
                f"{path}: changed since it was downloaded: SHA-256 {is_now[:12]}, before {known[:12]}; delete it to "
                "download it anew"
            )
        if pinned not in (None, known):
            raise CheckpointError(f"{path}: SHA-256 is {known}, expected {pinned}; delete it to download it anew")
        return path
    if setting := offline():
        raise CheckpointError(
            f"{url}: not in {cache_folder()}, and {setting} forbids downloads; unset it, or fetch the file elsewhere "
            "and give its path"
        )
    with _refused(url):
        with atomic(path) as beside:
            _log.info("downloading %s to %s", url, path)
            digest = _download(url, beside, pinned is not None)
            if pinned not in (None, digest):
                raise CheckpointError(f"{url}: SHA-256 is {digest}, expected {pinned}; nothing was kept")
        # As sha256sum -c reads it; a file without it is downloaded again.
        write_text(record, f"{digest}  {path.name}\n")
    if pinned is None:
        _log.info("to insist on this file: %s#sha256=%s", url, digest)
    return path


def _file_name(url: str) -> str:
    """The last part of the address, as a name that can do no harm: not hidden, nor that of the record beside it."""
    base = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rstrip("/").rpartition("/")[2]) or "download"
    name = re.sub(r"[^\w .,=+@()-]", "_", base)
    return f"_{name}" if name.startswith(".") or name.lower() == "sha256" else name


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows an address to https:// alone, or where the SHA-256 is known to http:// as well, at every step."""

    def __init__(self, pinned: bool):
        self._schemes = ("https://", "http://") if pinned else ("https://",)
        self._expected = "https:// or http://" if pinned else "https://, or #sha256= and its digits at the end"

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(self._schemes):
            raise CheckpointError(
                f"{req.full_url}: leads to {newurl}, where anybody on the way could change it; expected "
                f"{self._expected}; fetch it elsewhere and give its path"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextlib.contextmanager
def _refused(url: str) -> Iterator[None]:
    advice = "; fetch it elsewhere and give its path"
    try:
        yield
    except urllib.error.HTTPError as error:
        raise CheckpointError(f"{url}: the server answered {error.code} {error.reason}{advice}") from None
    except urllib.error.URLError as error:
        raise CheckpointError(f"{url}: no connection: {error.reason}{advice}") from None
    except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise CheckpointError(f"{url}: the connection broke: {first_line(error)}{advice}") from None
    except OSError as error:
        raise CheckpointError(
            f"{url}: cannot be kept in {cache_folder()}: {error.strerror or error}; let MATPAC_FAST_CACHE name a "
            "folder that can be written and has room"
        ) from None


def _download(url: str, path: Path, pinned: bool) -> str:
    """Write what `url` gives to `path`, whole; its SHA-256."""
    from . import __version__

    plain = urllib.parse.quote(url, safe=string.punctuation)
    request = urllib.request.Request(plain, headers={"User-Agent": f"matpac_fast/{__version__}"})
    opener = urllib.request.build_opener(_Redirects(pinned))
    digest, size = hashlib.sha256(), 0
    with opener.open(request, timeout=_SILENT_FOR) as answer, open(path, "wb") as file:
        if answer.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            # It would be kept, and the file never asked for again.
            raise CheckpointError(
                f"{url}: the server sent a web page, as for a login or a question; give the address of the file "
                "itself, or fetch it in a browser and give its path"
            )
        told = answer.headers["Content-Length"] or None
        if told is not None and not told.isdecimal():
            raise ConnectionError(f"Content-Length is {told!r}; expected a number of bytes")
        length = None if told is None else int(told)
        with _progress(cast(BinaryIO, answer), length) as body:
            while block := body.read(1 << 20):
                file.write(block)
                digest.update(block)
                size += len(block)
    if length is not None and size != length:
        raise ConnectionError(f"{size:,} of {length:,} bytes came")
    return digest.hexdigest()


def _progress(answer: BinaryIO, length: int | None) -> contextlib.AbstractContextManager[BinaryIO]:
    """`answer`, with a bar where somebody watches."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext(answer)
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    return rich.progress.wrap_file(
        answer, length or 0, description="downloading", console=console, refresh_per_second=4, transient=True
    )
