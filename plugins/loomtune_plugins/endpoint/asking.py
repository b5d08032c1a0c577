"""What is asked of a language model, and what comes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, str]
"""`role` (system, user, assistant) and `content`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One question.

    messages: the conversation that is to be answered.
    draw: tells draws of the same question apart; the seed of a sampled answer, as far as a service heeds one.
    options: where some are named, no text is wanted but the log-probability of each as the answer's only token.
    opening: what the answer begins with, where text is continued; a chat service is not told.
    """

    messages: Sequence[Message]
    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    draw: int = 0
    options: tuple[str, ...] = ()
    opening: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came of one.

    text: without what ends it. ended: False where it was cut at its longest.
    log_probs: of each option, in nats. One that the service does not show is given the least that it shows.
    failed: why there is none of these; empty where there is. refused: whether asking again would fail again.
    tokens: (read, written), as reported.
    """

    text: str = ""
    ended: bool = True
    log_probs: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""
    refused: bool = False
    tokens: tuple[int, int] = (0, 0)


Done = Callable[[int, Reply], None]
"""Is told the place of a question among those asked, and its reply, as soon as it is there."""


Gate = Callable[[], None]
"""Raises UserError where no more may be asked; called before each attempt."""


class Source(ABC):
    """A model that can be asked."""

    @abstractmethod
    def check(self) -> None:
        """Raises UserError, without torch and without asking anybody, where it cannot be there."""

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Which model it is, as plain data: with the request it decides which kept answer is one to it."""

    @abstractmethod
    def request(self, ask: Ask) -> dict[str, Any]:
        """All that is sent of a question, as JSON holds it."""

    @abstractmethod
    def answer(self, asks: Sequence[Ask], done: Done, gate: Gate) -> None:
        """Has all of them answered. A failure of one is its reply.

        Raises UserError where no question can be answered (a wrong key, a cap that is reached), after those that are
        under way.
        """

    def memory(self) -> int:
        """Bytes that a process needs for it."""
        return 0
