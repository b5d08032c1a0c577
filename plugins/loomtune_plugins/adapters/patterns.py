"""Names and patterns of names, as users write them in settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import translate
from functools import cache

from loomtune.errors import Fault, UserError, near


def select(
    key: str, patterns: Sequence[str], known: Sequence[str], matches: Callable[[str, str], bool], what: str
) -> list[str]:
    """Known names that any of the patterns matches, in the order of `known`.

    Raises UserError naming every pattern that matches nothing, since it would do nothing in silence.
    """
    idle = [pattern for pattern in patterns if not any(matches(name, pattern) for name in known)]
    if idle:
        raise UserError(*(_matches_nothing(key, pattern, known, what) for pattern in idle))
    return [name for name in known if any(matches(name, pattern) for pattern in patterns)]


def by_end(name: str, pattern: str) -> bool:
    """True where a module's whole name or its last parts match: `q_proj` matches `model.layers.0.self_attn.q_proj`."""
    matches = _matcher(pattern)
    return matches(name) or _matcher(f"*.{pattern}")(name)


def by_start(name: str, pattern: str) -> bool:
    """True where a parameter's name matches, or that of a module that holds it."""
    return _matcher(pattern)(name) or _matcher(f"{pattern}.*")(name)


@cache
def _matcher(pattern: str) -> Callable[[str], bool]:
    """Matches whole names. A part such as `4-15` means every number from 4 to 15; the rest is as a shell reads it."""
    parts = (_range(part) or f"(?:{translate(part)})" for part in pattern.split("."))
    expression = re.compile(r"\.".join(part.replace(r"\Z", "").replace(r"\z", "") for part in parts))
    return lambda name: expression.fullmatch(name) is not None


def _range(part: str) -> str:
    ends = re.fullmatch(r"(\d+)-(\d+)", part)
    return f"(?:{'|'.join(map(str, range(int(ends[1]), int(ends[2]) + 1)))})" if ends else ""


def _matches_nothing(key: str, pattern: str, known: Sequence[str], what: str) -> Fault:
    hint = near(pattern, dict.fromkeys([*known, *_parts(known)]))
    return Fault(f"{key} names '{pattern}', which matches no {what}.{hint}", f"set {key} to {_examples(known)}")


def _parts(known: Iterable[str]) -> list[str]:
    """What a user may have meant by a short name: every end and every beginning of a name."""
    parts: dict[str, None] = {}
    for name in known:
        words = name.split(".")
        parts.update(dict.fromkeys(".".join(words[i:]) for i in range(1, len(words))))
        parts.update(dict.fromkeys(".".join(words[:i]) for i in range(1, len(words))))
    return list(parts)


def _examples(known: Sequence[str]) -> str:
    ends = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in known))
    some = [end for end in ends if end not in ("weight", "bias")] or list(known)
    return f"names or patterns of what there is, such as {', '.join(some[:8])}" if some else "an empty list"
