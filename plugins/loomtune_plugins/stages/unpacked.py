"""Text of files, packed or not, that are read within bounds: an archive of a few kilobytes may hold terabytes."""

from __future__ import annotations

import bz2
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ARCHIVES = (".gz", ".bz2", ".zst")
LINE = 16 << 20
"""Most characters of a line or a cell."""

WHOLE = 256 << 20
"""Most bytes of a file that is read as a whole."""

GROWTH = 200
"""How many times its size an archive may hold, once that is more than `SPARED`."""

SPARED = 64 << 20
WINDOW = 128 << 20
"""How far back a .zst may refer, in bytes."""

FED = 1 << 10
"""Bytes of a .zst that are unpacked at once: each four of them may be 128 KiB."""


def lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """Raises ValueError for text that is no UTF-8, a line without end, and an archive that grows too much."""
    with path.open("rb") as file, io.TextIOWrapper(_opened(path, file), "utf-8-sig", newline=newline) as text:
        while line := text.readline(LINE + 1):
            if len(line) > LINE:
                raise ValueError(f"a line has more than {LINE >> 20} MiB")
            yield line


def whole(path: Path) -> bytes:
    """All of a file. Raises ValueError where that is too much to hold."""
    with path.open("rb") as file, _opened(path, file) as opened:
        if len(read := opened.read(WHOLE + 1)) > WHOLE:
            raise ValueError(f"it has more than {WHOLE >> 20} MiB: as .jsonl, one record a line, it may have any size")
        return read.removeprefix(b"\xef\xbb\xbf")


def _opened(path: Path, file: IO[bytes]) -> io.BufferedReader:
    if path.suffix not in ARCHIVES:
        return io.BufferedReader(_Bounded(file, None))
    budget = max(SPARED, GROWTH * path.stat().st_size)
    return io.BufferedReader(_Bounded(_unpacked(path, file), budget))


def _unpacked(path: Path, file: IO[bytes]) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if path.suffix == ".bz2":
        return bz2.BZ2File(file)
    return _Zstandard(file)


class _Zstandard:
    """Frame after frame; the stream of the library takes a file that was cut short for a whole one."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file, self._ready, self._packed = file, b"", b""
        self._begin = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj
        self._frame, self._whole = self._begin(), False

    def read(self, size: int) -> bytes:
        while not self._ready and (fed := self._packed or self._file.read(FED)):
            self._ready = self._frame.decompress(fed)
            self._packed, self._whole = self._frame.unused_data, self._frame.eof
            self._frame = self._begin() if self._whole else self._frame
        if not self._ready and not self._whole:
            raise EOFError("it ends in the middle of its contents")
        given, self._ready = self._ready[:size], self._ready[size:]
        return given


class _Bounded(io.RawIOBase):
    """Gives what there is, up to a number of bytes (None: all). Raises ValueError beyond."""

    def __init__(self, inner: Any, budget: int | None) -> None:
        self._inner, self._budget, self._read = inner, budget, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            got = self._inner.read(len(buffer))
        except Exception as error:  # each library has errors of its own for what is no such archive
            raise OSError(str(error)) from error
        self._read += len(got)
        if self._budget is not None and self._read > self._budget:
            raise ValueError(f"it unpacks to more than {self._budget} bytes")
        buffer[: len(got)] = got
        return len(got)
