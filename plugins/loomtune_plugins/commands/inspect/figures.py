"""What a whole split amounts to: its tokens, lengths, ends and duplicates, in one pass over the mapped samples.

What is kept of a sample are its length and two digests of 8 bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Sample, Segment, Tokenizer
from loomtune.contracts.batch import NO_PARENT
from loomtune.run import Run

if TYPE_CHECKING:
    from loomtune.samples import Samples

SHOWN = 3
"""Examples, and commonest tokens, that are named."""

BINS = 12
STEPS = (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 40, 50, 64, 80)
"""Widths of a histogram's bins, times a power of ten from 100 on."""


@dataclass(slots=True)
class Tally:
    """How often something was seen, and where first."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, origin: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(origin)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a split.

    rows: what samples came of. lengths: tokens of each sample. equal: samples that are an earlier one again; asked:
    prompts to which there are several answers. begins, learns, ends: samples by their first, first learned and last
    token. doubts: by what is doubtful, the samples for which it is.
    """

    rows: int
    lengths: NDArray[np.int64]
    targets: int
    equal: Tally
    asked: Tally
    begins: Counter[int]
    learns: Counter[int]
    ends: Counter[int]
    doubts: Mapping[str, Tally]

    @property
    def samples(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def percentile(self, share: int) -> int:
        """The length that so many percent of samples do not exceed."""
        return int(np.percentile(self.lengths, share, method="inverted_cdf")) if self.samples else 0


DOUBTS = ("two_beginnings", "no_end", "two_ends", "only_end", "no_target")


def figures(run: Run, split: str) -> Figures:
    """Reads every sample of a split once."""
    samples = run.splits[split]
    doubts = {name: Tally() for name in DOUBTS}
    begins, learns, ends = Counter[int](), Counter[int](), Counter[int]()
    whole, asked = np.zeros(len(samples), np.uint64), np.zeros(len(samples), np.uint64)
    rows, targets, last = 0, 0, ""
    scored = run.objective.roles()["policy"].head != "lm"
    for index in range(len(samples)):
        sample, origin = samples[index], samples.origin(index)
        rows, last, targets = rows + (origin != last), origin, targets + sample.targets
        first, prompt = first_target(sample)
        whole[index] = _digest(_identity(sample))
        asked[index] = _digest(prompt.tobytes()) if len(prompt) > 1 else 0
        begins.update(sample.segments[0].tokens[:1].tolist())
        learns.update(first)
        ends.update(sample.segments[-1].tokens[-1:].tolist())
        goes_on = sample.length >= run.max_length and index + 1 < len(samples) and samples.origin(index + 1) == origin
        for name in _doubts(sample, run.tokenizer, scored=scored):
            if not (name == "no_end" and goes_on):  # a document is cut into samples, the last of which has its end
                doubts[name].add(origin)
    asked[list(_again(whole))] = 0  # what is there again is no other answer
    equal, answers = _tally(samples, whole, "="), _tally(samples, asked, "asks what")
    return Figures(rows, samples.lengths, targets, equal, answers, begins, learns, ends, doubts)


def _digest(content: bytes) -> int:
    return max(1, int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))


def _again(digests: NDArray[np.uint64]) -> dict[int, int]:
    """Place of what was there before to its first place, in order; a digest of 0 is none."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    earlier = first[inverse]
    places = np.flatnonzero((earlier != np.arange(len(digests))) & (digests != 0))
    return dict(zip(places.tolist(), earlier[places].tolist(), strict=True))


def _tally(samples: Samples, digests: NDArray[np.uint64], between: str) -> Tally:
    """What is there again, and where it was first."""
    tally = Tally()
    for place, first in _again(digests).items():
        tally.add(f"{samples.origin(place)} {between} {samples.origin(first)}")
    return tally


def _identity(sample: Sample) -> bytes:
    """All that is learned of a sample, and from what."""
    parts = [b"%d:%d:" % (segment.parent, len(segment.tokens)) for segment in sample.segments]
    arrays = [segment.tokens.tobytes() + segment.is_target.tobytes() for segment in sample.segments]
    return b"".join([*parts, *arrays, repr(sorted(sample.numbers.items())).encode()])


def first_target(sample: Sample) -> tuple[list[int], NDArray[np.int32]]:
    """(the first learned token, all before it); all tokens where nothing is learned."""
    segment = next((one for one in sample.segments if one.is_target.any()), None)
    if segment is None:
        return [], sample.segments[0].tokens
    at = int(segment.is_target.argmax())
    before, learned = segment.tokens[:at], segment.tokens[at : at + 1].tolist()
    while segment.parent != NO_PARENT:
        segment = sample.segments[segment.parent]
        before = np.concatenate([segment.tokens, before])
    return learned, before


def _doubts(sample: Sample, tokenizer: Tokenizer, *, scored: bool) -> Iterator[str]:
    """What is odd about a sample. scored: its targets are places at which a number is read, not tokens."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    first = sample.segments[0].tokens[:2].tolist()
    if bos is not None and first == [bos, bos]:
        yield "two_beginnings"
    targets = [segment.tokens[segment.is_target] for segment in _leaves(sample)]
    if not sample.targets:
        yield "no_target"
    elif not scored:
        told = [one for one in targets if len(one)]
        if any(one[-1] != eos for one in told):
            yield "no_end"
        if any(one[-2:].tolist() == [eos, eos] for one in told):
            yield "two_ends"
        if any(one.tolist() == [eos] for one in told):
            yield "only_end"


def _leaves(sample: Sample) -> list[Segment]:
    inner = {segment.parent for segment in sample.segments}
    return [segment for number, segment in enumerate(sample.segments) if number not in inner]


def histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(from, to, samples) of bins of round width, from the shortest on.

    Where a few are far longer than all others, the last bin takes all of these, or the rest would be one bar.
    """
    if not len(lengths):
        return []
    shortest, longest = int(lengths.min()), int(lengths.max())
    usual = int(np.percentile(lengths, 99, method="inverted_cdf"))
    top = longest if longest - shortest <= 2 * (usual - shortest) else usual
    width = _width((top - shortest) // BINS + 1)
    first, last = shortest // width, top // width
    counts = np.bincount(np.minimum(lengths // width, last) - first)
    ends = [*(at * width + width - 1 for at in range(first, last)), max(longest, last * width + width - 1)]
    return [((first + at) * width, end, int(count)) for at, (end, count) in enumerate(zip(ends, counts, strict=True))]


def _width(least: int) -> int:
    scale = 1
    while scale * STEPS[-1] < least:
        scale *= 10
    return next(step * scale for step in STEPS if step * scale >= least)
