"""What one rendering of a chat template may cost: a template is a program that came with somebody's model.

Everything that a template makes is paid for in bytes, before it is made where it could be large. Containers are paid
for with all that is in them, each time one is made, so that none can be told, compared or counted at a cost that its
making had not. Whatever single operation runs in C is bounded so; between two of them the clock is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from sys import getsizeof
from time import monotonic, thread_time
from typing import Any

from jinja2.exceptions import SecurityError

BYTES = 8 * 2**20
"""What any rendering may make in all."""

TIMES = 32
"""What it may make beside, for each byte of what it was given; most templates make a fourth of that."""

MOST = 192 * 2**20
"""That at most: a conversation of 8 MiB, which no model reads whole, needs a third of it."""

WORK = 2**27
"""Characters that one operation may look at, each as often as it does: a second of it, at worst."""

CHARACTER = 90
"""Bytes of a character that is a text of its own."""

SECONDS = 1.0
"""Of the thread's own time, so that a busy machine refuses nobody."""

ELEMENT = 16
"""Bytes that an element costs beside what it is."""

LARGEST = 2**63
"""Numbers beyond are of no use to a template, and may take minutes to multiply."""

EMPTY = 50
"""Bytes of a text without characters."""

OFTEN = 2**14
"""Bytes after which the clock is read."""

TOO_MUCH = f"it makes more than {BYTES >> 20} MiB of text and lists, and {TIMES} times what it was given"

CONTAINERS: tuple[type, ...] = (list, tuple, set, frozenset, dict, type({}.items()), type({}.keys()), type({}.values()))


class Forbidden(SecurityError):
    """A template does what no chat template needs to."""


class Budget:
    """What is left to a rendering. Of one thread at a time."""

    __slots__ = ("_deadline", "_given", "_until", "left", "mark")

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, given: Any) -> None:
        """A new rendering. What it was given is measured once it needs more than every rendering has."""
        self._given: tuple[Any, ...] = (given,)
        self.left, self.mark = BYTES, BYTES - OFTEN
        self._deadline, self._until = monotonic() + SECONDS, thread_time() + SECONDS

    def spend(self, size: int) -> None:
        """Takes bytes. Raises Forbidden where they, or the time, are beyond their limit."""
        self.left -= size
        if self.left < self.mark:
            self.look()

    def look(self) -> None:
        """Looks whether there are bytes left, and at the clock."""
        if self.left < 0 and not (self._grows() and self.left >= 0):
            raise Forbidden(TOO_MUCH)
        self.mark = self.left - OFTEN if self.left > OFTEN else 0
        if monotonic() > self._deadline:
            self._late()

    def afford(self, size: int) -> None:
        """Raises Forbidden where something could become larger than what is left."""
        if size > self.left and not (self._grows() and size <= self.left):
            raise Forbidden(TOO_MUCH)

    def work(self, steps: int) -> None:
        """Raises Forbidden where one operation, within which no clock is read, would take so many steps."""
        if steps > WORK:
            raise Forbidden("it looks for much in what is long")

    def walked(self, values: Any) -> Any:
        """Of what is walked through: a text, each character of which becomes one, paid for before."""
        if isinstance(values, str):
            self.spend(CHARACTER * len(values))
        return values

    def made(self, value: Any) -> Any:
        """What was made, paid for with all that is in it."""
        kind = type(value)
        if kind is str:
            self.spend(getsizeof(value))
        elif isinstance(value, CONTAINERS):
            self.spend(self.size(value))
        elif kind is int and abs(value) >= LARGEST:
            raise Forbidden("it computes a number of more than 64 bits")
        else:
            self.spend(getsizeof(value))
        return value

    def passed(self, value: Any) -> Any:
        """What was compared, which is paid for already but may have taken its time."""
        self.look()
        return value

    def size(self, value: Any) -> int:
        """Bytes of a value and of all in it, each as often as it is there; no more than what is left is counted."""
        found = _weight(value, self.left)
        return _weight(value, self.left) if found > self.left and self._grows() else found

    def room(self, parts: Iterable[str], separators: int = 0) -> None:
        """Raises Forbidden where texts, and so many characters between them, are too many to be joined.

        One character beyond ASCII may make each four bytes long; marked as safe, a text escapes what it is joined to.
        """
        length, width = separators, 1
        for part in parts:
            length += len(part)
            if type(part) is not str or not part.isascii():
                width = max(width, 4 if type(part) is str else 20)
        self.afford(length * width)

    @property
    def grown(self) -> bool:
        """Whether it is beyond what every rendering has."""
        return not self._given

    def _grows(self) -> bool:
        """Whether there is more, by what was given, than there was. It is so once."""
        if not self._given:
            return False
        given, self._given = self._given, ()
        more = TIMES * _weight(given, MOST // TIMES)
        self.left += min(more, MOST)
        return True

    def _late(self) -> None:
        """The clock on the wall says so; the thread's own, which is slow to read, decides."""
        left = self._until - thread_time()
        if left < 0:
            raise Forbidden(f"it takes more than {SECONDS:g} s")
        self._deadline = monotonic() + left


def _weight(value: Any, most: int) -> int:
    """Bytes of a value and of all in it; where they are more than so many, not all are counted."""
    found, waiting = 0, [value]
    while waiting and found <= most:
        one = waiting.pop()
        found += getsizeof(one) + ELEMENT
        if isinstance(one, dict):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, CONTAINERS):
            waiting += list(one)  # type: ignore[call-overload]
    return found
