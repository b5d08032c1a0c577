"""Opening files of unknown origin: how much of one may be in memory, and how much an archive may hold."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from loomtune.errors import Fault, UserError
from loomtune_plugins.data.split_settings import SplitSettings
from loomtune_plugins.data.values import RecordError

ARCHIVES = (".gz", ".bz2", ".zst")

_BLOCK = 1 << 20
_SMALL = 64 << 20
"""What any archive may grow to, in bytes."""

_WINDOW = 128 << 20
"""How far back a .zst may refer, in bytes; it is held in memory. What `zstd` itself takes unasked."""


_FED = 1 << 10
"""Bytes of a .zst that are unpacked at once: each four of them may be 128 KiB."""

_PEEKED = 64
"""Bytes by which an encoding is told."""

_EMPTY = 1_000_000
"""Lines without a word, one after another, after which nobody waits for another word."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """record: bytes of the largest record. growth: how many times its own size an archive may hold."""

    record: int
    growth: int

    @classmethod
    def of(cls, settings: SplitSettings) -> Limits:
        """As the settings have it."""
        return cls(settings.max_record, settings.max_growth)

    @property
    def too_long(self) -> RecordError:
        """What is said of a record beyond the limit."""
        return RecordError(f"is longer than data.max_record={self.record} bytes", "too long")


def faults(settings: SplitSettings) -> Iterator[Fault]:
    """Limits that allow nothing."""
    for name in ("max_record", "max_growth"):
        if getattr(settings, name) < 1:
            yield Fault(f"data.{name}={getattr(settings, name)} lets nothing through", f"set data.{name} to 1 or more")


def packing(path: Path) -> str:
    """The ending that says how a file is packed, in small letters; empty: it is not."""
    ending = path.suffix.lower()
    return ending if ending in ARCHIVES else ""


def regular(path: Path) -> bool:
    """Whether it is a file with contents, and no device, pipe or socket, which may never end."""
    return path.exists() and stat.S_ISREG(path.stat().st_mode)


@contextlib.contextmanager
def opened(path: Path, limits: Limits) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked where its name says that it is an archive. Raises UserError, also while it is read."""
    if not regular(path):
        raise UserError.of(f"{path} is no regular file", "give a file; what a pipe or device says can be saved as one")
    try:
        with path.open("rb") as file:
            budget = max(_SMALL, path.stat().st_size * limits.growth)
            inner = _unpacked(path, file)
            yield file if inner is None else io.BufferedReader(_Bounded(inner, path, budget), _BLOCK)
    except (OSError, EOFError, zlib.error) as error:  # archives that are none, or broken, raise any of them
        raise UserError.of(f"{path} cannot be read: {error}", "check the file and data.path") from error


@contextlib.contextmanager
def opened_text(path: Path, limits: Limits) -> Iterator[IO[bytes]]:
    """As `opened`. Raises UserError too where the bytes are those of text of 16 bits a letter, or of 32."""
    with opened(path, limits) as file:
        if encoding := _wide(file.peek(_PEEKED)[:_PEEKED]):  # type: ignore[attr-defined]  # both kinds are buffered
            cure = f"rewrite it: iconv -f {encoding} -t UTF-8 IN > OUT"
            raise UserError.of(f"{path} is {encoding} text, and only UTF-8 is read", cure)
        yield file


def _wide(head: bytes) -> str:
    """The encoding that a byte-order mark tells, or NULs in every second byte; empty: neither."""
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
    marks |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
    if told := next((name for mark, name in marks.items() if head.startswith(mark)), ""):
        return told
    first, second = head[::2], head[1::2]
    if any(first) != any(second) and len(head) >= 4:
        return "UTF-16LE" if any(first) else "UTF-16BE"
    return ""


@contextlib.contextmanager
def seekable(path: Path, limits: Limits) -> Iterator[IO[bytes]]:
    """A file that is not read from its beginning to its end: an archive is unpacked to disk, and deleted again."""
    with opened(path, limits) as file:
        if not packing(path):
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked, _BLOCK)
            unpacked.seek(0)
            yield unpacked


def lines(file: IO[bytes], limits: Limits, stop: int | None = None) -> Iterator[tuple[bytes, bool]]:
    """(a line with its end, True), up to a position of the file.

    Of one that is too long to be held: (its quotes, as far as they do not pair off, False).
    """
    position, empty = 0 if stop is None else file.tell(), 0
    while stop is None or position < stop:
        line = file.readline(limits.record + 1)
        if not line:
            return
        position += len(line)
        empty = empty + 1 if line.isspace() else 0
        if empty > _EMPTY:
            raise UserError.of(f"{_EMPTY} empty lines follow each other", "leave them out of the file")
        if len(line) <= limits.record or line.endswith(b"\n"):
            yield line, True
            continue
        rest, quotes = line, line.count(b'"')
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(_BLOCK)
            position += len(rest)
            quotes += rest.count(b'"')
        yield b'"' * (quotes % 2), False


def _unpacked(path: Path, file: IO[bytes]) -> _Readable | None:
    if packing(path) == ".gz":
        return gzip.GzipFile(fileobj=file)
    if packing(path) == ".bz2":
        return bz2.BZ2File(file)
    return _Zstandard(file) if packing(path) == ".zst" else None


class _Zstandard:
    """Unpacks frame after frame; `zstandard`'s own stream takes a file that was cut short for a whole one."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file, self._error = file, zstandard.ZstdError
        self._begin = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj
        self._frame, self._packed, self._ready, self._whole = self._begin(), b"", b"", False

    def read(self, size: int, /) -> bytes:
        while not self._ready:
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, self._begin()
            fed = self._packed or self._file.read(_FED)
            if not fed:
                if not self._whole:
                    raise EOFError("it ends in the middle of its contents")
                return b""
            self._ready, self._packed, self._whole = self._unpacked(fed), b"", self._frame.eof
        given, self._ready = self._ready[:size], self._ready[size:]
        return given

    def _unpacked(self, fed: bytes) -> bytes:
        try:
            unpacked: bytes = self._frame.decompress(fed)
        except self._error as error:
            raise OSError(str(error)) from error
        return unpacked


class _Bounded(io.RawIOBase):
    """Gives what an archive holds, up to a number of bytes: a few kilobytes may unpack to more than any disk holds."""

    def __init__(self, inner: _Readable, path: Path, budget: int) -> None:
        self._inner, self._path, self._budget, self._left = inner, path, budget, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = self._inner.read(min(len(buffer), _BLOCK))
        self._left -= len(got)
        if self._left < 0:
            raise UserError.of(
                f"{self._path} unpacks to more than {self._budget} bytes",
                "if it is what you expect, set a larger data.max_growth; else leave it out",
            )
        buffer[: len(got)] = got
        return len(got)
