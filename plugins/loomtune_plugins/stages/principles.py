"""Constitutions: principles that answers are held against, in a YAML file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loomtune.errors import Fault, UserError, near

OURS = Path(__file__).parent / "constitution.yaml"

LONGEST = 1 << 20
"""Bytes of a file."""

PARTS: Mapping[str, tuple[str, ...]] = {"critique": ("critique", "revision"), "choice": ("question",)}
"""Part of a constitution to what each of its principles says beside its name."""

PROMPTS: Mapping[str, tuple[str, ...]] = {
    "critique": ("critique",),
    "revision": ("revision",),
    "choice": ("conversation", "question", "a", "b"),
    "reasoning": ("conversation", "question", "a", "b"),
    "verdict": (),
    "opening": (),
}
"""How models are asked, and the places that must be filled in each."""


@dataclass(frozen=True, slots=True)
class Principle:
    """name: as it is told in rows. says: its words."""

    name: str
    says: Mapping[str, str]


class Constitution:
    """The file that a setting names, or ours. key: of that setting."""

    def __init__(self, path: str, key: str) -> None:
        self._path, self._key = Path(path).expanduser() if path else OURS, key

    def check(self, part: str) -> None:
        """Raises UserError naming everything that is wrong with the file, or that a part of it is missing."""
        told = self._told
        faults = [*_unknown(told), *self._faults(told.get(part), part), *_prompts(told.get("prompts", {}))]
        if faults:
            cure = f"see {OURS} for an example; {self._key}= without a value takes that one"
            raise UserError(*(Fault(f"{self._key}={self._path}: {what}", cure) for what in faults))

    def fingerprint(self) -> str:
        """Digest of the file, and of ours where it lends the prompts."""
        return hashlib.sha256(self._path.read_bytes() + OURS.read_bytes()).hexdigest()

    def principles(self, part: str) -> list[Principle]:
        """Those of a part of a file that was checked."""
        return [
            Principle(str(one.get("name", number)), {key: one[key].strip() for key in PARTS[part]})
            for number, one in enumerate(self._told[part], start=1)
        ]

    def prompt(self, name: str, **places: str) -> str:
        """What a model is asked, with its places filled. What is filled in is not looked at again."""
        return re.sub(r"\{(\w+)\}", lambda found: places.get(found[1], found[0]), self._prompts[name])

    @cached_property
    def _prompts(self) -> dict[str, str]:
        return {**_read(OURS)["prompts"], **self._told.get("prompts", {})}

    @cached_property
    def _told(self) -> dict[str, Any]:
        try:
            return _read(self._path)
        except (OSError, ValueError) as error:
            what = f"{self._key}={self._path} cannot be read: {error}"
            raise UserError.of(what, f"name a YAML file of principles; {OURS} is an example") from error

    def _faults(self, listed: Any, part: str) -> Iterator[str]:
        if not isinstance(listed, list) or not listed:
            yield f"it has no list of principles under '{part}'"
            return
        names = [str(one.get("name", number)) for number, one in enumerate(listed, 1) if isinstance(one, dict)]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"two principles under '{part}' are called '{name}'"
        for number, one in enumerate(listed, start=1):
            yield from _principle(one, part, f"{part} {number}")


def _principle(one: Any, part: str, where: str) -> Iterator[str]:
    known = ("name", *PARTS[part])
    if not isinstance(one, dict):
        yield f"{where} is no principle with {' and '.join(PARTS[part])}"
        return
    for key in PARTS[part]:
        if not isinstance(one.get(key), str) or not one[key].strip():
            yield f"{where} has no text as its '{key}'"
    for key in one.keys() - set(known):
        yield f"{where} has '{key}', which nothing reads.{near(str(key), known)}"


def _unknown(told: Mapping[str, Any]) -> Iterator[str]:
    known = (*PARTS, "prompts")
    for key in told.keys() - set(known):
        yield f"it has '{key}', which nothing reads.{near(str(key), known)}"


def _prompts(told: Any) -> Iterator[str]:
    if not isinstance(told, dict):
        yield "'prompts' is no mapping from names to texts"
        return
    for name, text in told.items():
        if name not in PROMPTS:
            yield f"prompts has '{name}', which nothing reads.{near(str(name), PROMPTS)}"
        elif not isinstance(text, str):
            yield f"the prompt '{name}' is no text"
        elif missing := [place for place in PROMPTS[name] if f"{{{place}}}" not in text]:
            yield f"the prompt '{name}' lacks {', '.join(f'{{{place}}}' for place in missing)}"


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if path.stat().st_size > LONGEST:
        raise ValueError(f"it has more than {LONGEST} bytes")
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(told, dict):
        raise ValueError("it holds no mapping of parts to principles")
    return told
