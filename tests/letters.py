"""Rows in memory, a tokenizer of letters and an objective of pairs: what makes samples, for any process to import."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from loomtune.contracts import Data, Dropped, Objective, Row, Sample, Segment, Tokenizer


@dataclass
class Rows(Data):
    """Rows in memory, which counts how often they were read."""

    rows_of: list[Row]
    read: int = 0
    version: str = "1"

    def check(self) -> None: ...

    def splits(self) -> tuple[str, ...]:
        return ("train",)

    def rows(self, split: str) -> Iterator[Row]:
        self.read += 1
        yield from self.rows_of

    def fingerprint(self) -> str:
        return self.version + json.dumps(self.rows_of)


class Letters(Tokenizer):
    """A token a letter."""

    eos_id, pad_id, bos_id = 1, 0, None
    template = "a"

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        return "".join(map(chr, tokens))

    def render(self, messages: object, *, reply: bool = False) -> str:
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        return self.template

    def save(self, folder: Path) -> None: ...


@dataclass
class Pairs(Objective):
    """The prompt, and two answers that share it; every second row has a rating.

    dies: by whom a row whose prompt is `poison` is not survived: others than this process. here: rows of this process.
    """

    version: str = "1"
    dies: int = 0
    here: list[str] = field(default_factory=list)

    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        if "prompt" not in row:
            raise ValueError("has no prompt")
        if row["prompt"] == "poison" and self.dies not in (0, os.getpid()):
            os.kill(os.getpid(), signal.SIGKILL)
        self.here.append(row["prompt"])
        prompt = tokenizer.encode(row["prompt"])[:max_length]
        left = max_length - len(prompt)
        answers = [tokenizer.encode(row[key])[:left] for key in ("chosen", "rejected")]
        return Sample(
            (segment(prompt, False), *(segment(answer, True, 0) for answer in answers)), {"margin": row.get("m", 0.5)}
        )

    def fingerprint(self) -> str:
        return self.version

    def keeps_rows(self) -> bool:
        return True

    def weights(self, batch: object) -> dict[str, float]:
        raise NotImplementedError

    def loss(self, *_: object) -> object:  # type: ignore[override]
        raise NotImplementedError


def segment(tokens: list[int], target: bool, parent: int = -1) -> Segment:
    return Segment(np.array(tokens, np.int32), np.full(len(tokens), target), parent)


def row(prompt: str = "ask", chosen: str = "good", rejected: str = "bad", **more: object) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


@dataclass
class Tide(Rows):
    """Rows that stream. bad: numbers of those that cannot be read. halts: number of the one that never comes.

    seeks: seconds of work until the first row from a place on is found. mark: what a place is made of.
    """

    window: int = 4
    bad: tuple[int, ...] = ()
    halts: int = -1
    seeks: float = 0.0
    mark: Callable[[int], Any] = int

    def stream(self, place: Any = None) -> Iterator[tuple[Row | Dropped, Any]]:
        began = time.process_time()
        while place and time.process_time() - began < self.seeks:
            pass
        for number, one in enumerate(self.rows_of):
            if number == self.halts:
                time.sleep(3600)
            if number >= int(place or 0):
                yield Dropped(f"rows:{number}", "is ill") if number in self.bad else one, self.mark(number + 1)


def beside() -> list[psutil.Process]:
    """The processes that this one has started to tokenise."""
    found = []
    for each in psutil.Process().children():
        with suppress(psutil.Error):  # it may have ended
            found += [each] if "loomtune.beside" in each.cmdline() else []
    return found


def busy(pipe: Connection) -> None:
    """Does not look at the pipe."""
    time.sleep(3600)


def modules(pipe: Connection) -> None:
    """Takes what is sent, and answers with the modules that it needed."""
    pipe.recv()
    pipe.send([name for name in sys.modules if "." not in name])
