"""What is trained on: samples as token segments, and batches in which every target says where it is predicted from.

A *sample* is what an objective makes of one row: one or more segments of tokens. A segment may have a parent, whose
tokens it sees as its prefix: SFT has one segment a sample, a preference pair may have three (prompt; chosen and
rejected, both children of the prompt). A *batch* lays the segments of some samples into rows. Packing (several samples
in a row) and prefix sharing (a parent computed once) are the same idea, and no code ever shifts labels.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, device

NO_PARENT = -1
NO_SEGMENT = -1


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of a sample.

    tokens: `(length,)` int32 token ids.
    is_target: `(length,)` bool; True where the token is to be predicted. The first token of a segment without a parent
        cannot be one, because nothing comes before it.
    parent: index, within the sample, of the segment that precedes this one; `NO_PARENT` for none.
    columns: float32 numbers by name, `(targets,)` or `(targets, width)` each: an advantage, an old log-probability.
    """

    tokens: NDArray[np.int32]
    is_target: NDArray[np.bool_]
    parent: int = NO_PARENT
    columns: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """What an objective made of one row: its segments, and numbers of its own (a rating, a margin, a label).

    All samples of an objective have the same names of numbers and of columns.
    parts: of an unfolded sample, which segment each is a copy of; empty where each is itself.
    """

    segments: tuple[Segment, ...]
    numbers: Mapping[str, float] = field(default_factory=dict)
    parts: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of all segments together."""
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def trees(self) -> list[int]:
        """Tokens of each segment without a parent together with those that follow until the next such one."""
        lengths: list[int] = []
        for segment in self.segments:
            if segment.parent == NO_PARENT:
                lengths.append(0)
            lengths[-1] += len(segment.tokens)
        return lengths

    def unfolded(self) -> Sample:
        """The sample with a copy of all that precedes it for each last segment, instead of one that is shared.

        A target is learned once: in the first copy.
        """
        inner = {segment.parent for segment in self.segments}
        if len(self.segments) - len(inner - {NO_PARENT}) <= 1:
            return self
        made: list[Segment] = []
        parts: list[int] = []
        for leaf in sorted(set(range(len(self.segments))) - inner):
            parent = NO_PARENT
            for part in self._down_to(leaf):
                seen = part in parts
                made.append(_copy(self.segments[part], parent, learned=not seen))
                parent = len(parts)
                parts.append(part)
        return replace(self, segments=tuple(made), parts=tuple(parts))

    def _down_to(self, part: int) -> list[int]:
        """A segment's ancestors, the first one first, and itself."""
        path = [part]
        while (parent := self.segments[path[0]].parent) != NO_PARENT:
            path.insert(0, parent)
        return path

    def with_column(self, name: str, values: NDArray[np.float32]) -> Sample:
        """The sample with one more column. values: of its targets `(targets, ...)`, segment by segment."""
        parts = np.split(values, np.cumsum([segment.is_target.sum() for segment in self.segments])[:-1])
        each = zip(self.segments, parts, strict=True)
        return replace(self, segments=tuple(replace(s, columns={**s.columns, name: part}) for s, part in each))

    @property
    def targets(self) -> int:
        """Tokens to be predicted."""
        return int(sum(segment.is_target.sum() for segment in self.segments))

    def plain(self) -> dict[str, Any]:
        """As JSON holds it, for the samples that a checkpoint must keep."""
        return {"numbers": dict(self.numbers), "segments": [_plain(segment) for segment in self.segments]}

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Sample:
        """The sample that `plain` described, to the bit."""
        return cls(tuple(_parse(segment) for segment in plain["segments"]), plain["numbers"])


def _copy(segment: Segment, parent: int, *, learned: bool) -> Segment:
    if learned:
        return replace(segment, parent=parent)
    nothing = {name: values[:0] for name, values in segment.columns.items()}
    return replace(segment, parent=parent, is_target=np.zeros_like(segment.is_target), columns=nothing)


_TYPES: Mapping[str, type] = {"tokens": np.int32, "is_target": np.bool_}


def _plain(segment: Segment) -> dict[str, Any]:
    packed = {}
    for name, values in {"tokens": segment.tokens, "is_target": segment.is_target, **segment.columns}.items():
        packed[name] = [list(values.shape), b64encode(values.astype(_TYPES.get(name, np.float32)).tobytes()).decode()]
    return {"parent": segment.parent, "columns": packed}


def _parse(plain: Mapping[str, Any]) -> Segment:
    columns = {}
    for name, (shape, packed) in plain["columns"].items():
        columns[name] = np.frombuffer(b64decode(packed), _TYPES.get(name, np.float32)).reshape(shape)
    return Segment(columns.pop("tokens"), columns.pop("is_target"), plain["parent"], columns)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sample with its place among those of the split, which are its rows where each makes one sample.

    given: the row as the data's plugin gave it, where the objective keeps rows. visit: the how-manieth sample that the
    run draws, the same on any world.
    """

    row: int
    sample: Sample
    given: Mapping[str, Any] = field(default_factory=dict)
    visit: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """One micro-batch before it has tensors: which samples, by their number in the order of the run.

    rows: the samples of each row; several where samples are packed. A number is unique for each visit of a row of the
        data (one visited in two epochs has two), the same on any world size; it seeds dropout. Empty where a rank takes
        part in a micro-batch without rows of its own.
    """

    rows: tuple[tuple[int, ...], ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        """All samples, row by row."""
        return tuple(number for row in self.rows for number in row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch on one rank.

    tokens: `(rows, length)` int64.
    positions: `(rows, length)` int64, counted from the start of the sample along its parents (0 for padding).
    segments: `(rows, length)` int64, the segment of each token, numbered within the batch; `NO_SEGMENT` for padding.
    parents: `(segments,)` int64, the parent of each segment; `NO_PARENT` for none.
    sample_of_segment: `(segments,)` int64, which sample a segment belongs to.
    part: `(segments,)` int64, which of its sample's segments it is; copies of one have the same number.
    predict_from: `(targets,)` int64, index into `rows * length`: the position whose hidden state predicts the target.
    target: `(targets,)` int64 token ids.
    row: `(targets,)` int64, the segment that a target belongs to; row sums of log-probabilities go by it.
    sample_numbers: `(samples,)` int64, the number of each sample in the order of the run; seeds dropout.
    columns: the samples' numbers, `(samples,)` each, and the segments' columns, `(targets,)` or `(targets, width)`
        each, by name, in float32; a batch without samples has them too, of length 0.
    """

    tokens: Tensor
    positions: Tensor
    segments: Tensor
    parents: Tensor
    sample_of_segment: Tensor
    part: Tensor
    predict_from: Tensor
    target: Tensor
    row: Tensor
    sample_numbers: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, where: device) -> Batch:
        """The same batch with its tensors on a device."""
        moved = {name: getattr(self, name).to(where) for name in self.__slots__ if name != "columns"}
        return replace(self, columns={name: tensor.to(where) for name, tensor in self.columns.items()}, **moved)


Step = Sequence[Batch]
"""The micro-batches of one optimizer step on one rank. Every rank has equally many; some may be empty."""
