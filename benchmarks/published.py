"""Forecasts beside what others have measured and published: `make published`, or `python benchmarks/published.py`.

Each row of `published.yaml` is composed as the same run of loomtune, rehearsed, and forecast for the hardware that it
names. Its logits are rehearsed as the published code makes them, all of a micro-batch at once, where loomtune makes
1,024 at a time. With `--keep` forecasts stay in a file, and a row whose plan is the same is not forecast anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from loomtune import api
from loomtune.plan import Plan
from loomtune_plugins.planner.forecast import Speed

HERE = Path(__file__).parent
MARKERS = "published"

EVERY = ("objective=pretrain", "data=files", "data.path=rows.txt", "precision=bf16", "optimizer=adamw", "model=random")
"""Of every run: each token is learned, rows are full, weights and moments are kept in fp32."""

SPREAD = 1.5
"""High over low end of a forecast, at most."""

NEAR = 0.1
"""Of the published memory, by which a forecast may be off."""

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """A published run.

    speed: tokens/s of a GPU, as published: the least and the most. memory: GiB of a GPU, `allocated` or `reserved` by
    its kind.
    attention: how many times as long as the planner's kernel the published run's takes, at least and at most.
    lacks: what loomtune has not, by what that makes incomparable: time, memory or both. url, date: of the publication.
    """

    name: str
    source: str
    url: str
    date: str
    gpus: int
    overrides: tuple[str, ...]
    speed: Range | None
    memory: float | None
    kind: str
    attention: Range
    lacks: Mapping[str, str]
    differs: tuple[str, ...]

    def counts(self, what: str) -> bool:
        """Whether its `time`, or its `allocated` or `reserved` memory, is one that loomtune could have had."""
        if what == "time":
            return self.speed is not None and not {"time", "both"} & set(self.lacks)
        return self.kind == what and not {"memory", "both"} & set(self.lacks)

    def plan(self) -> Plan:
        """As loomtune would run it."""
        return api.compose([*EVERY, *self.overrides], processes=self.gpus)


def rows(path: Path = HERE / "published.yaml") -> list[Row]:
    """All of the file."""
    said = yaml.safe_load(path.read_text())
    return [_row(one, said["sources"][one["source"]], said["models"][one["model"]]) for one in said["rows"]]


def _row(one: Mapping[str, Any], source: Mapping[str, Any], shape: Mapping[str, Any]) -> Row:
    speed = one.get("speed")
    return Row(
        name=one["name"],
        source=one["source"],
        url=source["url"],
        date=str(source["date"]),
        gpus=one["gpus"],
        overrides=tuple(_overrides(one, source, shape)),
        speed=None if speed is None else (speed[0], speed[1]) if isinstance(speed, list) else (speed, speed),
        memory=one.get("memory"),
        kind=one.get("kind", ""),
        attention=tuple(source.get("attention", (1.0, 1.0))),
        lacks=one.get("lacks", {}),
        differs=tuple(source.get("differs", [])),
    )


def _overrides(one: Mapping[str, Any], source: Mapping[str, Any], shape: Mapping[str, Any]) -> Iterator[str]:
    """Later ones win."""
    found = [
        *source.get("run", []),
        *([f"hardware={one['hardware']}"] if "hardware" in one else []),
        *one.get("run", []),
    ]
    words = dict(word.split("=", 1) for word in found)
    shared = int(words.get("sharding.tensor", 1)) * int(words.get("sharding.sequence", 1))
    yield from (f"{key}={value}" for key, value in words.items())
    yield from (f"model.shape.{key}={json.dumps(value)}" for key, value in shape.items())
    yield f"sharding.activation_checkpointing={json.dumps(one['checkpointing'] == 'full')}"
    yield f"max_length={one['length']}"
    yield f"batch.micro={one['micro']}"
    yield f"batch.size={one['gpus'] // shared * one['micro'] * one.get('accumulate', 1)}"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the planner says of a row. speed: tokens/s of a GPU, low and high; bytes: at the peak, by cause."""

    speed: Range
    bytes: int
    moment: str
    causes: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def gib(self) -> float:
        """Of the peak."""
        return self.bytes / 2**30

    @property
    def spread(self) -> float:
        """How much is left open."""
        return self.speed[1] / self.speed[0]


def foretold(row: Row) -> Forecast:
    """Rehearses the row and forecasts it."""
    from loomtune.catalogue import installed
    from loomtune_plugins.planner.forecast import forecast
    from loomtune_plugins.planner.rehearse import rehearse

    began, plan = time.perf_counter(), row.plan()
    with whole_logits():
        trace = rehearse(plan, row.gpus)
    made = forecast(trace, plan, installed()).speed
    seconds = slowed(made, row.attention)
    moment = max(trace.moments, key=lambda name: trace.moments[name].bytes)
    causes = {cause: count for cause, count in trace.peak.causes.items() if count}
    speed = made.tokens / row.gpus / seconds[1], made.tokens / row.gpus / seconds[0]
    return Forecast(speed, trace.peak.bytes, moment, causes, list(trace.notes), time.perf_counter() - began)


def slowed(speed: Speed, attention: Range) -> Range:
    """Seconds of a step whose attention takes so many times as long, at least and at most."""
    assert speed.times is not None and speed.seconds is not None, "the hardware of every row is known"
    spans = [span for (_, cause), span in speed.times.parts.items() if cause == "attention"]
    more = (attention[0] - 1) * sum(span.low for span in spans), (attention[1] - 1) * sum(span.high for span in spans)
    return speed.seconds[0] + more[0], speed.seconds[1] + more[1]


@contextmanager
def whole_logits() -> Iterator[None]:
    """Within it losses make all logits of a micro-batch at once."""
    import loomtune.toolkit

    module: Any = sys.modules[f"{loomtune.toolkit.__name__}.log_probs"]  # the package has a function of that name
    before = module.CHUNK
    module.CHUNK = sys.maxsize
    try:
        yield
    finally:
        module.CHUNK = before


@dataclass(frozen=True, slots=True)
class Verdict:
    """A row beside its forecast."""

    row: Row
    forecast: Forecast

    @property
    def inside(self) -> bool:
        """Whether what was measured lies in a range that is narrow enough."""
        assert self.row.speed is not None
        (low, high), (least, most) = self.forecast.speed, self.row.speed
        return low <= most and least <= high and self.forecast.spread <= SPREAD

    @property
    def error(self) -> float:
        """Of the memory, as a share of the published."""
        assert self.row.memory is not None
        return self.forecast.gib / self.row.memory - 1

    @property
    def near(self) -> bool:
        """Whether the memory is what was published."""
        return abs(self.error) <= NEAR

    def told(self) -> str:
        """A line of the table."""
        row, (low, high) = self.row, self.forecast.speed
        speed = memory = verdict = error = ""
        if row.speed is not None:
            speed = " to ".join(f"{one:,.0f}" for one in sorted(set(row.speed)))
            why = f" {self.off:+.0%}" if self.off else f" too wide: {self.forecast.spread:.2f}"
            verdict = _mark(self.inside, row.counts("time")) + ("" if self.inside else why)
        if row.memory is not None:
            memory = f"{row.memory:.1f}{' reserved' if row.kind == 'reserved' else ''}"
            error = f"{_mark(self.near, row.counts(row.kind))} {self.error:+.1%}"
        cells = [row.name, speed, f"{low:,.0f} to {high:,.0f}", verdict, memory, f"{self.forecast.gib:.1f}", error]
        return f"| {' | '.join([*cells, '; '.join(row.lacks.values())])} |"

    @property
    def off(self) -> float:
        """How far the measured speed lies beyond the nearer end of the range; 0: within."""
        assert self.row.speed is not None
        (low, high), (least, most) = self.forecast.speed, self.row.speed
        return min(0.0, most / low - 1) + max(0.0, least / high - 1)


def _mark(held: bool, counts: bool) -> str:
    said = "yes" if held else "no"
    return said if counts else f"({said})"


HEAD = """\
| run | tokens/s of a GPU | foretold | inside | GiB of a GPU | foretold | within 10 % | needs what loomtune has not |
| --- | ---: | ---: | --- | ---: | ---: | --- | --- |"""


def table(verdicts: Sequence[Verdict]) -> str:
    """Markdown: by source, what is counted, and with what it was made."""
    lines = [_summary(verdicts), "", f"Made on {time.strftime('%-d %B %Y')} with {_versions()}.", ""]
    for source in dict.fromkeys(one.row.source for one in verdicts):
        some = [one for one in verdicts if one.row.source == source]
        row = some[0].row
        differs = f" What differs: {'; '.join(row.differs)}." if row.differs else ""
        lines += [
            f"**{source}**{_held(some)}: {row.url}, {row.date}.{differs}",
            "",
            HEAD,
            *(one.told() for one in some),
            "",
        ]
    return "\n".join(lines)


def counted(verdicts: Iterable[Verdict], what: str) -> tuple[int, int]:
    """How many of the rows that count hold, and how many count."""
    some = [one for one in verdicts if one.row.counts(what)]
    return sum(one.inside if what == "time" else one.near for one in some), len(some)


KINDS = {"time": "speed", "allocated": "allocated memory", "reserved": "reserved memory"}
"""What is counted, and what it is called."""


def _held(verdicts: Sequence[Verdict]) -> str:
    """Of some rows, as a remark."""
    found = {called: counted(verdicts, what) for what, called in KINDS.items()}
    said = ", ".join(f"{called} {held} of {of}" for called, (held, of) in found.items() if of)
    return f" ({said})" if said else ""


def _summary(verdicts: Sequence[Verdict]) -> str:
    (fast, of), (near, among), (as_reserved, reserved) = (counted(verdicts, what) for what in KINDS)
    widest = max((one.forecast.spread for one in verdicts), default=1.0)
    return (
        f"Of {of} published speeds that loomtune could have had, {fast} lie inside the range that is foretold, whose "
        f"high end is at most {widest:.2f} times the low. Of {among} published peaks of allocated memory {near} are "
        f"within 10 %; of {reserved} of reserved memory, {as_reserved}. Rows in brackets need what loomtune has not, "
        "and are not counted."
    )


def _versions() -> str:
    names = ("loomtune", "torch", "transformers", "peft")
    return f"{', '.join(f'{name} {version(name)}' for name in names)}, Python {platform.python_version()}"


def collect(chosen: Sequence[Row], kept: Path | None) -> list[Verdict]:
    """Forecasts of all rows, those that are kept of the same plan taken from there."""
    before: dict[str, Any] = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}
    found = []
    for row in chosen:
        key = " ".join(row.overrides)
        if key not in before:
            before[key] = asdict(foretold(row))
            if kept is not None:
                kept.write_text(json.dumps(before, indent=1) + "\n")
        said = before[key]
        verdict = Verdict(row, Forecast(**{**said, "speed": (said["speed"][0], said["speed"][1])}))
        print(verdict.told(), flush=True)
        found.append(verdict)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name or source holds these words")
    parser.add_argument("--keep", type=Path, help="file of forecasts, which goes on from what it holds")
    parser.add_argument("--write", type=Path, help="Markdown file between whose markers the table is put")
    asked = parser.parse_args(arguments)
    chosen = [row for row in rows() if asked.only in f"{row.name} ({row.source})"]
    said = table(collect(chosen, asked.keep))
    if asked.write is None:
        print(said)
    else:
        begin, end = f"<!-- {MARKERS}: begin -->", f"<!-- {MARKERS}: end -->"
        before, rest = asked.write.read_text().split(begin)
        asked.write.write_text(f"{before}{begin}\n{said.rstrip()}\n{end}{rest.split(end)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
