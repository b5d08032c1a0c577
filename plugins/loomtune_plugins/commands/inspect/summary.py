"""What is said of a whole split: a few lines for people, and the same as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loomtune.plan import Finding
from loomtune.run import Run
from loomtune_plugins.commands.inspect.figures import SHOWN, Figures, Tally, histogram
from loomtune_plugins.commands.inspect.layout import Layout
from loomtune_plugins.commands.inspect.spelling import Speller

PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Summary:
    """facts: names and what is said, in order. histogram: (from, to, samples) of lengths in tokens."""

    title: str
    subtitle: str
    facts: list[tuple[str, str]]
    histogram: list[tuple[int, int, int]]


def summary(run: Run, split: str, found: Figures, laid: Layout, speller: Speller) -> Summary:
    """In words."""
    chosen = " · ".join(_choice(run.plan.chosen(axis), axis) for axis in ("objective", "data", "model"))
    facts = [fact for fact in _facts(run, split, found, laid, speller) if fact[1]]
    return Summary(f"split {split}", chosen, facts, histogram(found.lengths))


def _choice(chosen: Mapping[str, Any], axis: str) -> str:
    """An axis' choice, and the name of what it reads."""
    path = Path(str(chosen.get("path") or "")).name
    return f"{axis}={chosen['name']}" + (f" {path}" if path else "")


def _facts(run: Run, split: str, found: Figures, laid: Layout, speller: Speller) -> Iterator[tuple[str, str]]:
    several = f" of {found.rows:,} rows" if found.rows != found.samples else ""
    part = ", the first window of a stream" if split == "train" and run.data.window else ""
    yield "samples", f"{found.samples:,}{several}{part}{_sources(run, split)}"
    share = found.targets / found.tokens if found.tokens else 0.0
    yield "tokens", f"{found.tokens:,}, of which {found.targets:,} are targets ({_percent(share)})"
    yield "too long", _cut(run, split)
    yield "equal samples", _repeated(found.equal)
    yield "prompts met again", _repeated(found.asked)
    yield "first token", _common(found.begins, speller)
    yield "first target", _common(found.learns, speller)
    yield "last token", _common(found.ends, speller)
    yield "steps", _steps(run, split, laid)
    yield "places filled", _filling(run, laid)
    lengths = zip(("half", "90 %", "99 %", "all"), PERCENTILES, strict=True)
    yield "lengths", " · ".join(f"{name} ≤ {found.percentile(share):,}" for name, share in lengths)


def _sources(run: Run, split: str) -> str:
    named = {name: count for name, count in run.splits[split].sources.items() if name}
    return f" ({', '.join(f'{name} {count:,}' for name, count in named.items())})" if named else ""


def _cut(run: Run, split: str) -> str:
    made = run.splits[split]
    if not made.cut and not made.skipped:
        return f"none (max_length={run.max_length:,})"
    left = f"; {made.skipped:,} left out, because nothing of their answers would stay" if made.skipped else ""
    return f"{made.cut:,} lose {made.cut_tokens:,} tokens (max_length={run.max_length:,}){left}"


def _repeated(tally: Tally) -> str:
    if not tally.count:
        return "none"
    return f"{tally.count:,} ({', '.join(tally.first)})"


def _common(counted: Counter[int], speller: Speller) -> str:
    total = counted.total()
    named = [f"{speller.one(token)} {_percent(count / total)}" for token, count in counted.most_common(SHOWN)]
    return " · ".join(named) + (f" · and {len(counted) - SHOWN:,} others" if len(counted) > SHOWN else "")


def _steps(run: Run, split: str, laid: Layout) -> str:
    each = f"{run.settings.batch.size:,} rows"
    if split == "train" and run.settings.batch.sampler == "packed":
        each += f" of {run.max_length:,} tokens, {laid.rows / max(1, laid.steps):,.1f} samples"
    epoch = f"{laid.epoch:,} of {each} are an epoch" if laid.epoch else f"of {each}"
    return epoch + (f"; this run has {laid.run:,}" if split == "train" else "")


def _filling(run: Run, laid: Layout) -> str:
    if not laid.steps:
        return ""
    used, other = ("packed", "unpacked") if run.settings.packing else ("unpacked", "packed")
    shares = {"packed": laid.packed, "unpacked": laid.plain}
    said = f"{used} {_percent(shares[used].efficiency)} (this run), {other} {_percent(shares[other].efficiency)}"
    counted = f"; counted on {laid.steps:,} steps" if laid.steps < laid.run else ""
    micro = run.settings.batch.micro
    how = f", batch.micro={micro}" + (f" as on a CPU ({run.token_budget:,} tokens)" if micro == "auto" else "")
    ranks = f", {run.world.replicas:,} ranks" if run.world.replicas > 1 else ""
    return said + counted + how + ranks


def plain(run: Run, split: str, found: Figures, laid: Layout, doubts: Sequence[Finding], speller: Speller) -> Any:
    """As JSON holds it."""
    made = run.splits[split]
    filling = {name: {**asdict(one), "efficiency": one.efficiency} for name, one in _fillings(laid).items()}
    return {
        "split": split,
        **{axis: run.plan.chosen(axis)["name"] for axis in ("objective", "data", "model")},
        "rows": found.rows,
        "samples": found.samples,
        "sources": {name: count for name, count in made.sources.items() if name},
        "tokens": found.tokens,
        "targets": found.targets,
        "target_share": found.targets / found.tokens if found.tokens else 0.0,
        "max_length": run.max_length,
        "cut": made.cut,
        "cut_tokens": made.cut_tokens,
        "left_out": made.skipped,
        "lengths": {f"p{share}": found.percentile(share) for share in PERCENTILES},
        "histogram": [{"from": a, "to": b, "samples": count} for a, b, count in histogram(found.lengths)],
        "equal": asdict(found.equal),
        "prompts_met_again": asdict(found.asked),
        "odd": {name: asdict(tally) for name, tally in found.doubts.items()},
        "first_tokens": _counts(found.begins, speller),
        "first_targets": _counts(found.learns, speller),
        "last_tokens": _counts(found.ends, speller),
        "steps": {"epoch": laid.epoch, "run": laid.run, "counted": laid.steps, "rows_counted": laid.rows},
        "filling": filling,
        "warnings": [{"what": doubt.what, "cure": doubt.cure} for doubt in doubts],
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _fillings(laid: Layout) -> dict[str, Any]:
    return {"unpacked": laid.plain, "packed": laid.packed}


def _counts(counted: Counter[int], speller: Speller) -> list[dict[str, Any]]:
    return [
        {"token": token, "text": speller.text([token]), "samples": count} for token, count in counted.most_common(SHOWN)
    ]
