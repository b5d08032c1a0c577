"""The filters that chat templates may use, each held to what it may cost.

Left out is what no such template needs and what would be hard to bound: web pages (`urlize`, `striptags`, `xmlattr`),
paragraphs (`wordwrap`, `pprint`), and chance (`random`), which would render one conversation in two ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from itertools import chain
from types import GeneratorType
from typing import Any

from jinja2.filters import FILTERS, make_attrgetter
from jinja2.tests import TESTS
from jinja2.utils import pass_environment

from loomtune_plugins.models.templates_budget import CHARACTER, CONTAINERS, ELEMENT, Budget, Forbidden

_NAMES = (
    "abs attr batch capitalize center count d default dictsort e escape first float forceescape format groupby indent "
    "int items last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice "
    "sort string sum title trim truncate upper"
)
WIDEST = 10_000
"""The largest width, and the largest number of parts, that anything is brought to."""
_PADDED = re.compile(r"%(\([^()]*\(|(\([^()]*\))?[-+ #.\dhlL]*?(\*|\d{5}))")
"""Of what `%` formats: a key with parentheses, a width that comes from elsewhere, or one of five digits."""
_WALKING = frozenset(["list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr", "sum"])
"""Filters that go through what they are given one by one."""

Guard = Callable[..., None]


class Guards:
    """What is asked before something runs that could make more than it is given."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def filters(self) -> Mapping[str, Guard]:
        """By the filter's name; arguments as the filter has them."""
        lists: dict[str, Guard] = dict.fromkeys(("sort", "groupby"), self.characters)
        widths = {"center": self.width, "truncate": self.width, "round": self.narrow}
        parts = {"batch": self.parts, "slice": self.parts}
        text: dict[str, Guard] = {
            "replace": self.replace,
            "indent": self.indent,
            "format": self.printf,
            "trim": self.strip,
            "title": self.titled,
            **dict.fromkeys(("upper", "lower", "capitalize"), self.cased),
        }
        escaped: dict[str, Guard] = dict.fromkeys(("e", "escape", "forceescape"), self.escaped)
        return {
            **lists,
            **widths,
            **parts,
            **text,
            **escaped,
            "sum": self.numbers,
            "string": self.told,
        }

    def methods(self) -> Mapping[str, Guard]:
        """By the name of a text's method; the text is the first argument."""
        searching = dict.fromkeys(("rfind", "rindex", "rpartition"), self.backwards)
        cases = dict.fromkeys(("casefold", "upper", "lower", "title", "capitalize", "swapcase"), self.cased)
        padding = dict.fromkeys(("center", "ljust", "rjust", "zfill"), self.width)
        splitting = {"split": self.split, "rsplit": self.resplit, "splitlines": self.lines}
        stripping = dict.fromkeys(("strip", "lstrip", "rstrip"), self.strip)
        guards = {**searching, **cases, **padding, **splitting, **stripping, "replace": self.replace}
        return {name: _asked(guard) for name, guard in guards.items()}

    def characters(self, value: Any, *_: Any, **__: Any) -> None:
        """A text of which each character may become a text."""
        self._budget.walked(value)

    def cased(self, value: Any, *_: Any, **__: Any) -> None:
        """A text in other letters, for which Python has three of four bytes for each meanwhile."""
        self.told(value)
        self._budget.afford(12 * len(value) if isinstance(value, str) else 0)

    def titled(self, value: Any, *_: Any, **__: Any) -> None:
        """Jinja's takes a text to pieces."""
        self.told(value)
        self.characters(value)

    def width(self, value: Any, width: Any = 80, *_: Any, **__: Any) -> None:
        """A text brought to a width."""
        self.told(value)
        if isinstance(width, int) and abs(width) > WIDEST:
            raise Forbidden(f"it asks for {width} characters")

    def narrow(self, value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
        """So many digits; more are no number's."""
        if isinstance(precision, int) and abs(precision) > 30:
            raise Forbidden(f"it asks for {precision} digits")

    def parts(self, value: Any, count: Any, *_: Any, **__: Any) -> None:
        """So many parts, filled up."""
        self.characters(value)
        self.width("", count)

    def told(self, value: Any, *_: Any, **__: Any) -> None:
        """A value that is told in words: a character of what is in it may become ten."""
        if not isinstance(value, str):
            self._budget.afford(10 * self._budget.size(value))

    def escaped(self, value: Any, *_: Any) -> None:
        """A text in which each character may become six."""
        self.told(value)
        self._budget.afford(6 * len(value) if isinstance(value, str) else 0)

    def replace(self, text: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
        """As many as there are, each longer by some."""
        for value in (text, old, new):
            self.told(value)
        text, old, new = (value if isinstance(value, str) else str(value) for value in (text, old, new))
        self._budget.room((text, new), text.count(old) * max(0, len(new) - len(old)))

    def indent(self, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
        """At most as many lines as characters."""
        self.told(text)
        length = len(width) if isinstance(width, str) else width
        self.width("", length)
        if isinstance(text, str):
            self._budget.afford(_lines(text) * (CHARACTER + 4 * length) + 4 * len(text))

    def printf(self, text: Any, *values: Any, **named: Any) -> None:
        """Percent signs, each of which may write all of the values, padded to four digits of characters."""
        if not isinstance(text, str):
            return
        if _PADDED.search(text):
            raise Forbidden("it pads what it formats by thousands of characters")
        self._budget.afford(text.count("%") * (WIDEST + 10 * self._budget.size([values, named])))

    def numbers(self, value: Any, attribute: Any = None, start: Any = 0) -> None:
        """Sums of lists would copy each list as often as there are others."""
        if not isinstance(start, int | float):
            raise Forbidden("it sums what are no numbers")

    def backwards(self, text: str, wanted: Any = "", *_: Any) -> None:
        """What Python searches from the end, it compares at each place."""
        self._budget.work(len(text) * len(wanted) if isinstance(wanted, str) else 0)

    def strip(self, text: Any, characters: Any = None, *_: Any, **__: Any) -> None:
        """Each character is looked for among those to be taken away."""
        self.told(text)
        self._budget.work(len(text) * len(characters) if isinstance(text, str) and isinstance(characters, str) else 0)

    def resplit(self, text: str, sep: Any = None, maxsplit: Any = -1) -> None:
        """Parts that are searched for from the end."""
        self.backwards(text, sep)
        self.split(text, sep)

    def split(self, text: str, sep: Any = None, maxsplit: Any = -1) -> None:
        """As many texts as there are separators, or half as many as characters."""
        parts = text.count(sep) + 1 if isinstance(sep, str) and sep else len(text) // 2
        self._budget.afford(parts * CHARACTER)

    def lines(self, text: str, *_: Any, **__: Any) -> None:
        """As many texts as there are lines."""
        self._budget.afford(_lines(text) * CHARACTER)


def _lines(text: str) -> int:
    """How many there are at most, by the characters that Python takes for their ends."""
    return 1 + sum(map(text.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))


def filters(budget: Budget) -> dict[str, Callable[..., Any]]:
    """Those of Jinja, guarded; `tojson` writes as transformers' does, without Jinja's escapes for web pages."""
    guards = Guards(budget).filters()
    guarded = {name: _paid(budget, FILTERS[name], guards.get(name), name in _WALKING) for name in _NAMES.split()}
    return {**guarded, "join": _join(budget), "tojson": _tojson(budget)}


def tests(budget: Budget) -> dict[str, Callable[..., Any]]:
    """Those of Jinja; the clock is read after each."""
    known: Mapping[str, Any] = TESTS
    return {name: _paid(budget, test, None) for name, test in known.items()}


def _asked(guard: Guard) -> Guard:
    """A guard whose objection to its arguments is about the template, not about a row."""

    def asked(*args: Any, **kwargs: Any) -> None:
        try:
            guard(*args, **kwargs)
        except TypeError as error:
            raise Forbidden(f"it calls something with other arguments than that takes ({error})") from error

    return asked


def _paid(
    budget: Budget, function: Callable[..., Any], guard: Guard | None, walking: bool = False
) -> Callable[..., Any]:
    """walking: whether the clock is to be read, and each element paid for, while it goes through them."""
    given = 1 if hasattr(function, "jinja_pass_arg") else 0
    ask = _asked(guard) if guard is not None else None

    @wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        if ask is not None:
            ask(*args[given:], **kwargs)
        if walking and len(args) > given and isinstance(args[given], (str, *CONTAINERS)):
            args = (*args[:given], _counted(budget, args[given]), *args[given + 1 :])
        result = function(*args, **kwargs)
        budget.look()
        if isinstance(result, GeneratorType):
            return _counted(budget, result)
        return budget.made(result)

    return paid


def _counted(budget: Budget, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        budget.spend(CHARACTER + ELEMENT)
        yield value


def _join(budget: Budget) -> Callable[..., str]:
    told = Guards(budget).told

    @pass_environment
    def join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
        """One text of many, as Jinja joins them where nothing is escaped."""
        if attribute is not None:
            value = map(make_attrgetter(environment, attribute), value)
        parts: list[str] = []
        for one in chain((d,), budget.walked(value)):
            told(one)
            budget.spend(ELEMENT)
            parts.append(str(one))
        budget.room(parts, len(parts[0]) * len(parts))
        joined: str = budget.made(parts[0].join(parts[1:]))
        return joined

    return join


def _tojson(budget: Budget) -> Callable[..., str]:
    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """JSON, paid for chunk by chunk where blanks of any depth may be in it."""
        widths = [len(one) if isinstance(one, str) else one for one in (indent, *(separators or ()))]
        if any(isinstance(width, int) and width > 100 for width in widths):
            raise Forbidden("it writes JSON with more blanks than anybody reads")
        budget.afford(12 * budget.size(x))
        shape = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
        if indent is None and separators is None:
            text: str = budget.made(json.dumps(x, **shape))
            return text
        chunks = []
        for chunk in json.JSONEncoder(**shape).iterencode(x):
            budget.spend(len(chunk) + 50)
            chunks.append(chunk)
        budget.room(chunks)
        return "".join(chunks)

    return tojson
