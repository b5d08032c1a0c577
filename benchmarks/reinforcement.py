"""Reinforcement learning on the embedded task: `python benchmarks/reinforcement.py --help`.

Each seed has a chain of runs of its own: the default recipe, and GRPO and PPO that begin from it and are rewarded by
executing the queries that they draw. Beside them, supervised fine-tuning that goes on with the right queries to the
very questions that GRPO was only asked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chains import ROOT, Chain, Job, Stage, of

CURVES = ROOT / "docs" / "reinforcement.svg"
EVERY = 50
"""Steps between two measurements, and over which rewards are averaged in the picture."""

MEASURED = f"evaluate.every={EVERY}"
STAGES = (
    Stage("sft", "recipe=sql_quiz"),
    Stage("grpo", f"recipe=sql_grpo {MEASURED}", "sft"),
    Stage("ppo", f"recipe=sql_ppo {MEASURED}", "sft"),
    Stage("longer", f"recipe=sql_grpo objective=sft reward=[] {MEASURED}", "sft"),
)

SAID = """Written by `make reinforcement` on {today}: {versions}; {processor}, one thread each.

Every seed has its own questions, its own SFT run of the default recipe, and what begins from it. Accuracy: the share of
{questions} test questions whose query, drawn greedily, returns what the right one returns. The schemas of test
questions share no table or column name with any that was trained on.
"""


def _gained(stage: str) -> Any:
    """Points over the SFT run."""

    def cell(found: dict[str, dict[str, float]]) -> float | None:
        before, after = (found.get(name, {}).get("sql_accuracy") for name in ("sft", stage))
        return None if before is None or after is None else after - before

    return cell


TABLES = (
    (
        "GRPO and PPO with the reward of execution",
        "Minutes: of training, on one core, with all that was drawn, executed and measured in between. Longer: "
        "supervised fine-tuning with GRPO's questions, steps and rate, and the right query to each of them.",
        {
            "SFT: accuracy": of("sft", "sql_accuracy"),
            "GRPO: accuracy": of("grpo", "sql_accuracy"),
            "gained": _gained("grpo"),
            "minutes": of("grpo", "minutes"),
            "PPO: accuracy": of("ppo", "sql_accuracy"),
            "gained ": _gained("ppo"),
            "minutes ": of("ppo", "minutes"),
            "longer: accuracy": of("longer", "sql_accuracy"),
        },
    ),
)

CHAIN = Chain(STAGES, TABLES, SAID, ROOT / "docs" / "reinforcement.md", "reinforcement")


def curves(asked: argparse.Namespace) -> None:
    """A picture of every seed's reward and accuracy, step by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes: Any = figure.subplots(1, 4, sharey=True)
    for place, (stage, metric) in enumerate(
        [(s, m) for s in ("grpo", "ppo") for m in ("rewards/mean", "sql_accuracy")]
    ):
        axis = axes[place]
        for seed in asked.seeds:
            if lines := _lines(Job(next(one for one in STAGES if one.name == stage), seed, asked).folder):
                axis.plot(*_smooth(lines, metric), label=f"seed {seed}")
        axis.set_title(f"{stage.upper()}: {'reward, training' if place % 2 == 0 else 'accuracy, test'}", fontsize=9)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(CURVES, metadata={"Date": None})


def _lines(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _smooth(lines: Sequence[dict[str, float]], metric: str) -> tuple[list[float], list[float]]:
    """Steps and values; a metric of every step as means over `EVERY` of them."""
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    if metric != "rewards/mean":
        return [step for step, _ in found], [value for _, value in found]
    parts = [found[start : start + EVERY] for start in range(0, len(found), EVERY)]
    return [part[-1][0] for part in parts], [sum(value for _, value in part) / len(part) for part in parts]


def main() -> None:
    asked = CHAIN.arguments(__doc__ or "", "reinforcement")
    CHAIN.follow(asked)
    if asked.write:
        curves(asked)


if __name__ == "__main__":
    main()
