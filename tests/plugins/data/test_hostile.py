"""Files that were made to do harm: each is refused, or skipped with its row number, within 10 s and 500 MB.

Both readings are tried: that of a run, which refuses bad records after the last, and that of preparation, which drops
them.
"""

import bz2
import contextlib
import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import hostile

GOOD = b'{"prompt": "a", "completion": "b"}'
MB = 1 << 20


class Reader:
    """Keeps a process for all files, until one kills it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, path: Path | str, data: str = "files", **settings: Any) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            program = [sys.executable, hostile.__file__]
            self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{json.dumps({'data': data, 'settings': {'path': str(path), **settings}})}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"reading ended with {self._process.wait()}"
        outcome: dict[str, Any] = json.loads(line)
        return outcome

    def close(self) -> None:
        if self._process:
            self._process.communicate()


@pytest.fixture(scope="module")
def ask() -> Iterator[Reader]:
    with contextlib.closing(Reader()) as reader:
        yield reader


def record(more: bytes) -> bytes:
    return GOOD[:-1] + b", " + more + b"}"


RECORDS = {
    "ten megabytes": (b'{"prompt": "' + b"x" * (10 * MB) + b'", "completion": "b"}', "too long"),
    "no UTF-8": (b'{"prompt": "\xff\xfe", "completion": "b"}', "no UTF-8 text"),
    "NUL bytes": (b'{"prompt": "\0", "completion": "b"}', "no JSON"),
    "only NUL bytes": (b"\0" * 1000, "no JSON"),
    "deep": (record(b'"x": ' + b"[" * 200_000 + b"]" * 200_000), "nested too deeply"),
    "deep, as far as it can be parsed": (record(b'"x": ' + b"[" * 500 + b"]" * 500), "nested too deeply"),
    "millions of lists": (record(b'"x": [' + b"[]," * 2_700_000 + b"0]"), "too many values"),
    "millions of objects": (record(b'"x": [' + b'{"a":{}},' * 900_000 + b"0]"), "too many values"),
    "a key twice": (record(b'"prompt": "c"'), "a key twice"),
    "a key twice of many": (record(b",".join(b'"%d": 0' % (n % 200_000) for n in range(200_001))), "a key twice"),
    "half a character": (b'{"prompt": "\\ud800", "completion": "b"}', "no UTF-8 text"),
    "half a character in a key": (record(b'"\\uDFFF": 1'), "no UTF-8 text"),
    "100,000 digits": (record(b'"x": ' + b"9" * 100_000), "no JSON"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_hostile_line_is_skipped_with_its_number(tmp_path: Path, ask: Reader, name: str) -> None:
    line, reason = RECORDS[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join((GOOD, line, GOOD)))
    outcome = ask(path)
    assert f"{path}:2: " in outcome["strict"]
    assert outcome["kept"]["rows"] == 2
    assert [one[:2] for one in outcome["kept"]["first"]] == [["rows.jsonl:2", reason]]


ENDS = {"deep", "millions of lists", "millions of objects"}
"""After which nothing can be told apart where no line ends."""

LONG = {"millions of objects", "a key twice of many"}
"""What takes seconds, and is as another that does not."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in RECORDS if "NUL" not in name],
)
def test_a_hostile_record_of_an_array_is_skipped_or_refused_with_its_number(
    tmp_path: Path, ask: Reader, name: str
) -> None:
    line, reason = RECORDS[name]
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + b",\n".join((GOOD, line, GOOD)) + b"]")
    outcome = ask(path)
    assert f"{path}:2: " in outcome["strict"]
    if name in ENDS:
        assert f"{path}:2: " in outcome["kept"]
    else:
        assert outcome["kept"]["rows"] == 2
        assert [one[:2] for one in outcome["kept"]["first"]] == [["rows.json:2", reason]]


def test_escaped_nul_is_a_character_that_a_stage_may_clean(tmp_path: Path, ask: Reader) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "\\u0000", "completion": "b"}\n')
    assert ask(tmp_path / "rows.jsonl")["kept"]["rows"] == 1


def test_what_is_no_number_stays_only_where_nobody_reads_it(tmp_path: Path, ask: Reader) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(record(b'"x": NaN, "y": 1e999') + b"\n" + record(b'"score": NaN'))
    assert ask(path)["kept"]["rows"] == 2
    outcome = ask(path, score="score", threshold=1.0)
    assert outcome["kept"] != {} and "has no column 'score'" in str(outcome)


def cells(name: str) -> bytes:
    head = b"prompt,completion,messages\na,b,[]\n"
    return {
        "ten megabytes": head + b'a,"' + b"x" * (10 * MB) + b'",[]\n',
        "deep": head + b"a,b," + b"[" * 90_000 + b"]" * 90_000 + b"\n",
        "never closed": head + b'a,"b,[]\n' + b"and so on,b,[]\n" * MB,
        "short lines in quotes": head + b'a,"' + b"fifteen letters\n" * MB + b'",[]\n',
        "NUL and no UTF-8": head + b"\0,\xff,[]\n",
    }[name]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ten megabytes", "rows.csv:3: is longer than data.max_record"),
        ("deep", "rows.csv:3: is JSON too deeply nested"),
        ("never closed", "a cell in quotes does not end within data.max_record=8388608 bytes"),
        ("short lines in quotes", "(after rows.csv:2)"),
        ("NUL and no UTF-8", "rows.csv:3: is no UTF-8 text"),
    ],
)
def test_a_hostile_cell_is_told_with_its_line(tmp_path: Path, ask: Reader, name: str, told: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(cells(name))
    outcome = ask(path, format="completion")
    assert told in outcome["strict"]
    assert "rows.csv:" in str(outcome["kept"])


def window() -> bytes:
    """Refers a gigabyte back, which would have to be held."""
    far = zstandard.ZstdCompressionParameters(window_log=30)
    pack = zstandard.ZstdCompressor(compression_params=far).compressobj()
    return pack.compress(GOOD + b"\n") + pack.flush()


def packed(pack: Callable[[bytes], bytes], of: bytes = b"\0", times: int = 4) -> bytes:
    """One row, and then nothing, which is 64 MiB long each time."""
    return pack(GOOD + b"\n") + pack(of * (64 * MB)) * times


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "zeros.jsonl.gz": (lambda: packed(gzip.compress, times=2), "unpacks to more than"),
    "gigabytes-of-zeros.jsonl.gz": (lambda: packed(gzip.compress, times=32), "unpacks to more than"),
    "empty-lines.jsonl.gz": (lambda: packed(gzip.compress, b"\n"), "empty lines follow each other"),
    "zeros.jsonl.bz2": (lambda: packed(bz2.compress), "unpacks to more than"),
    "zeros.jsonl.zst": (lambda: packed(zstandard.compress, times=64), "unpacks to more than"),
    "window.jsonl.zst": (window, "too much memory"),
    "spaces.json.gz": (lambda: packed(gzip.compress, b" "), "unpacks to more than"),
    "zeros.csv.gz": (lambda: packed(gzip.compress), "unpacks to more than"),
    "zeros.parquet.gz": (lambda: packed(gzip.compress), "unpacks to more than"),
    "inside.jsonl.gz.gz": (lambda: gzip.compress(packed(gzip.compress)), "is an archive in an archive"),
    "cut.jsonl.gz": (lambda: gzip.compress(GOOD * 999)[:-9], "cannot be read"),
    "cut.jsonl.zst": (lambda: zstandard.compress(GOOD * 999)[:-9], "ends in the middle"),
}


AFTER_A_ROW = {name for name in BOMBS if "zeros.jsonl" in name or name.startswith(("empty", "spaces"))}

LARGE = {"gigabytes-of-zeros.jsonl.gz", "zeros.jsonl.bz2"}
"""What takes seconds to be made."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in BOMBS])
def test_an_archive_that_grows_without_measure_is_refused(tmp_path: Path, ask: Reader, name: str) -> None:
    made, told = BOMBS[name]
    path = tmp_path / name
    path.write_bytes(made())
    outcome = ask(path)
    assert told in outcome["strict"]
    assert told in outcome["kept"]
    assert (f"(after {name}:1)" in outcome["kept"]) == (name in AFTER_A_ROW), outcome


def test_a_table_that_declares_gigabytes_is_refused(tmp_path: Path, ask: Reader) -> None:
    path, ends = tmp_path / "rows.parquet", pa.array([0, 30_000_000, 30_000_000, 30_000_000], pa.int32())
    long = pa.ListArray.from_arrays(ends, pa.array(numpy.zeros(30_000_000, "i1")))
    pq.write_table(pa.table({"text": ["a"] * 3, "x": long}), path, compression="zstd")
    assert "unpacks to more than" in ask(path)["kept"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1")
    assert "is no readable Parquet file" in ask(path)["strict"]


def test_one_large_value_that_stands_for_thousands_takes_memory_for_few(tmp_path: Path, ask: Reader) -> None:
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * (20 * MB)]))
    pq.write_table(
        pa.table({"text": one}), tmp_path / "rows.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30
    )
    assert ask(tmp_path / "rows.parquet")["kept"]["reasons"] == {"too long": 2000}


@pytest.mark.parametrize("times", [10, pytest.param(180, marks=pytest.mark.slow)])
def test_bytes_changed_anywhere_in_a_table_are_told_or_do_no_harm(tmp_path: Path, ask: Reader, times: int) -> None:
    rows = pa.table({"prompt": [f"a{number}" for number in range(200)], "completion": ["b"] * 200})
    pq.write_table(rows, tmp_path / "rows.parquet")
    for name, begin in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with begin(str(tmp_path / name), rows.schema) as writer:
            writer.write_table(rows, 50)
    rng = random.Random(0)
    for path in sorted(tmp_path.iterdir()):
        for _ in range(times):
            content = bytearray(path.read_bytes())
            for place in rng.sample(range(len(content)), k=rng.choice([1, 3, 10])):
                content[place] = rng.randrange(256)
            broken = path.with_stem("broken")
            broken.write_bytes(content)
            outcome = ask(broken)
            assert "broken" in str(outcome["strict"]) or outcome["strict"] == 200, outcome


@pytest.mark.parametrize("data", ["jsonl", "parquet", "files", "oasst"])
def test_what_may_never_end_is_not_opened(tmp_path: Path, ask: Reader, data: str) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for path in (tmp_path / "rows.jsonl", tmp_path / "zero.jsonl", "/dev/zero"):
        assert "is a pipe or a device, which may never end" in ask(path, data)["strict"]
