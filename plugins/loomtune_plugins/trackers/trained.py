"""What a run trains, in a few lines: one for each kind of parameter, with the numbers of layers put together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

MOST = 20
"""Lines of kinds; of more, the smallest are added up in the last line."""

_WRAPPING = re.compile(r"^base_model\.model\.|\.default(\.weight)?$")
"""What peft puts around names, which says nothing about the parameter."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """Parameters that differ in numbers alone. name: `model.layers.{0..31}.mlp.up_proj.lora_A`."""

    name: str
    shape: Shape
    count: int

    @property
    def size(self) -> int:
        """Numbers in all of them."""
        return self.count * prod(self.shape)


def kinds(trained: Mapping[str, Shape]) -> list[Kind]:
    """In the order of the module."""
    found: dict[tuple[tuple[str, ...], Shape], list[tuple[int, ...]]] = {}
    for name, shape in trained.items():
        parts = _WRAPPING.sub("", name).split(".")
        pattern = tuple("" if part.isdecimal() else part for part in parts)
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        found.setdefault((pattern, tuple(shape)), []).append(numbers)
    return [Kind(_named(pattern, places), shape, len(places)) for (pattern, shape), places in found.items()]


def _named(pattern: Sequence[str], places: Sequence[tuple[int, ...]]) -> str:
    """The pattern with numbers where it is empty."""
    columns = zip(*places, strict=True)
    return ".".join(part or _spans(next(columns)) for part in pattern)


def _spans(numbers: Iterable[int]) -> str:
    """`3` of one number, `{0..31}` of neighbours, `{0..3,8}` of others."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    told = ",".join("..".join(map(str, span)) for span in spans)
    return told if told.isdecimal() else f"{{{told}}}"


def lines(trained: Mapping[str, Shape], model: Mapping[str, Shape]) -> list[str]:
    """What is trained comes to, and each kind with count, shape and size. model: all that the model has by itself.

    Where that is what is trained there is nothing to list.
    """
    total, whole = _size(trained.values()), _size(model.values())
    if total == whole and trained.keys() <= model.keys():
        return [f"trains all {total:,} parameters of the model"]
    head = f"trains {total:,} parameters, {total / max(1, whole):.3%} of the {whole:,} that the model has by itself"
    return [head, *_aligned(_cells(kinds(trained)))]


def _size(shapes: Iterable[Shape]) -> int:
    return sum(prod(shape) for shape in shapes)


def _cells(found: Sequence[Kind]) -> list[tuple[str, str, str]]:
    """Name, count and shape, size; what is too small to have a line is added up."""
    listed = sorted(found, key=lambda kind: -kind.size)[: MOST - 1] if len(found) > MOST else found
    cells = [(kind.name, f"{kind.count} x {kind.shape}", f"{kind.size:,}") for kind in found if kind in listed]
    if rest := [kind for kind in found if kind not in listed]:
        parameters = sum(kind.count for kind in rest)
        cells.append((f"{len(rest)} smaller kinds", f"{parameters} x", f"{sum(kind.size for kind in rest):,}"))
    return cells


def _aligned(cells: Sequence[tuple[str, str, str]]) -> list[str]:
    name, shape, size = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [f"  {one:<{name}}  {two:<{shape}}  {three:>{size}}" for one, two, three in cells]
