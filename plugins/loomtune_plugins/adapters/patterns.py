"""Names and patterns of names, as users write them in settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

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
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def by_start(name: str, pattern: str) -> bool:
    """True where a parameter's name matches, or that of a module that holds it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


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
