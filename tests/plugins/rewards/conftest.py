"""A run of one process, as far as rewards look at it, and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from loomtune.contracts import Answer
from loomtune.errors import Preempted


@dataclass
class OneRank:
    """What a reward asks of a run. told: what the user heard."""

    told: list[str] = field(default_factory=list)
    stop: Any = field(default_factory=lambda: SimpleNamespace(requested=False))
    world: Any = field(default_factory=lambda: SimpleNamespace(rank=0, size=1, gather=lambda thing: [thing]))
    tokenizer: Any = field(
        default_factory=lambda: SimpleNamespace(decode=lambda tokens, special=False: "".join(map(chr, tokens)))
    )

    def tell_once(self, message: str) -> None:
        self.told.append(message)

    def heed(self, said: str = "") -> None:
        if self.stop.requested:
            raise Preempted(said)


@pytest.fixture
def run() -> Any:
    return OneRank()


@pytest.fixture
def answered() -> Callable[..., list[Answer]]:
    def of(texts: Sequence[str], prompt: str = "?", **row: Any) -> list[Answer]:
        tokens = list(map(ord, prompt))
        return [Answer({"prompt": prompt, **row}, tokens, list(map(ord, text)), text, True) for text in texts]

    return of
