"""Optuna looks for a better learning rate than the default recipe's: `python benchmarks/sweep.py OUT`.

Rates are chosen by validation questions; the best and the default are then asked the test questions, which nothing else
saw. What is there already is not run again, so the command may be killed at any time and started again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

QUESTIONS = 500
"""Of each split: one standard deviation of an accuracy near 0.7 is then 2 points."""

COMMAND = [sys.executable, "-m", "loomtune.cli"]


def run_words(asked: argparse.Namespace) -> list[str]:
    """Settings of every run; whatever else there is comes from the default recipe."""
    measured = ["split=validation", f"rows={QUESTIONS}"]
    return [
        "sharding=single",
        "tracker=[jsonl]",
        f"seed={asked.seed}",
        f"steps={asked.steps}",
        f"data.validation={QUESTIONS}",
        f"data.test={QUESTIONS}",
        "evaluator=[sql_accuracy]",
        *(f"evaluator.sql_accuracy.{word}" for word in measured),
        "evaluate.before=false",
        f"evaluate.every={max(1, asked.steps // 3)}",
    ]


def sweep_words(asked: argparse.Namespace) -> list[str]:
    """What Hydra is asked for: fewer random trials than Optuna's ten, which would be all of them."""
    return [
        "optimizer.lr=tag(log,interval(5e-4,2e-2))",
        "hydra/sweeper=optuna",
        f"hydra.sweeper.n_trials={asked.trials}",
        f"hydra.sweeper.n_jobs={asked.jobs}",
        "hydra.sweeper.sampler.n_startup_trials=3",
        f"hydra.launcher.jobs={asked.jobs}",
        "hydra.launcher.metric=sql_accuracy",
        "hydra.launcher.mode=max",
        f"hydra.launcher.prune_after={max(1, asked.steps // 3)}",
        f"hydra.sweep.dir={asked.out / 'sweep'}",
    ]


def on_test(folder: Path) -> float:
    """Accuracy on the test questions of a run's last checkpoint."""
    words = [str(folder), "evaluator=[sql_accuracy]", "evaluator.sql_accuracy.split=test"]
    ran = subprocess.run([*COMMAND, "evaluate", *words], check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(ran.stdout[ran.stdout.index("{") :])["sql_accuracy"])


def main() -> int:
    """Exit code 0 where what was found beats the default."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("out", type=Path, help="folder of the runs")
    asked.add_argument("--steps", type=int, default=600)
    asked.add_argument("--trials", type=int, default=8)
    asked.add_argument("--jobs", type=int, default=2, help="trials at a time")
    asked.add_argument("--seed", type=int, default=0)
    options = asked.parse_args()
    options.out = options.out.absolute()
    default = options.out / "default"
    if not (default / "result.json").is_file():
        subprocess.run([*COMMAND, "train", *run_words(options), f"run.dir={default}"], check=True)
    swept = subprocess.run([*COMMAND, "train", "-m", *run_words(options), *sweep_words(options)], check=False)
    if swept.returncode:
        return swept.returncode
    best = yaml.safe_load((options.out / "sweep" / "best.yaml").read_text())
    found, before = on_test(Path(best["run"])), on_test(default)
    rate = next(word for word in best["overrides"] if word.startswith("optimizer.lr="))
    print(f"test questions answered: {before:.1%} by the default rate, {found:.1%} by {rate}")
    return 0 if found > before else 1


if __name__ == "__main__":
    sys.exit(main())
