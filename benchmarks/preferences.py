"""Preferences, reward models and distillation on the embedded task: `python benchmarks/preferences.py --help`.

Each seed has a chain of runs of its own: the default recipe, and what begins from it, every one a `loomtune train`.
What is there already is not run again, so the command may be stopped at any time. Nothing is chosen by what it prints:
the recipes' values were chosen on validation questions of seed 0, and the numbers are of test questions.
"""

from __future__ import annotations

import json
from pathlib import Path

from chains import ROOT, Chain, Stage, Table, of

SMALL, LAYERS = "small", 3
"""The folder of the student, and how many of the shipped model's layers it has."""

HELD = "evaluator.heldout.split=test"
RANKS = f"objective=cpo loss=[sigmoid] optimizer.lr=0 steps=1 evaluator=[heldout] {HELD}"
"""A run that learns nothing and has no reference: of which pairs is the right query likelier?"""

STAGES = (
    Stage("sft", "recipe=sql_quiz"),
    Stage("sft_ranks", f"recipe=sql_dpo {RANKS}", "sft", accuracy=False),
    Stage("dpo", f"recipe=sql_dpo {HELD}", "sft"),
    Stage("dpo_ranks", f"recipe=sql_dpo {RANKS}", "dpo", accuracy=False),
    Stage("longer", f"recipe=sql_dpo objective=sft loss=[] {HELD}", "sft"),
    Stage("longer_ranks", f"recipe=sql_dpo {RANKS}", "longer", accuracy=False),
    Stage("reward", f"recipe=sql_reward {HELD}", "sft", accuracy=False),
    Stage("alone", f"recipe=sql_distill objective=sft {HELD}", SMALL),
    Stage("distill", f"recipe=sql_distill {HELD}", SMALL, teacher="sft"),
    Stage(
        "distill_loss",
        f"recipe=sql_distill objective=sft optimizer.lr=0 steps=1 evaluator=[heldout] {HELD}",
        "distill",
        accuracy=False,
    ),
)


def make_small(folder: Path) -> None:
    """The shipped model's first layers, with its embedding, last norm and tokenizer: a smaller model that knows SQL."""
    from safetensors.torch import load_file, save_file

    from loomtune_plugins.models.folders import TINY

    folder.mkdir(parents=True, exist_ok=True)
    for file in TINY.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((TINY / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    left_out = tuple(f"model.layers.{layer}." for layer in range(LAYERS, 100))
    weights = {
        name: kept for name, kept in load_file(TINY / "model.safetensors").items() if not name.startswith(left_out)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


ACCURACY, LIKELIER, PREFERRED = "sql_accuracy", "heldout_rewards/accuracies", "heldout_rewards/accuracies"
TABLES: tuple[Table, ...] = (
    (
        "DPO",
        "The right query of a test pair is *likelier* where the policy gives it the higher log-probability, and "
        "*preferred* where it gained more over the reference than the wrong one. Longer: supervised fine-tuning with "
        "the same questions, steps and rate in DPO's place.",
        {
            "SFT: accuracy": of("sft", ACCURACY),
            "likelier": of("sft_ranks", LIKELIER),
            "DPO: accuracy": of("dpo", ACCURACY),
            "likelier ": of("dpo_ranks", LIKELIER),
            "preferred": of("dpo", PREFERRED),
            "longer: accuracy": of("longer", ACCURACY),
            "likelier  ": of("longer_ranks", LIKELIER),
        },
    ),
    (
        "A reward model",
        "The share of test pairs whose right query has the higher reward.",
        {"accuracy": of("reward", "heldout_accuracy")},
    ),
    (
        "Distillation",
        f"Teacher: the SFT run's model. Student: the shipped model's first {LAYERS} of 4 layers, trained by SFT alone "
        "and by its teacher, with the same questions, steps and rate. Loss: of the right queries to the test "
        "questions, in nats a token.",
        {
            "teacher: accuracy": of("sft", ACCURACY),
            "SFT alone: accuracy": of("alone", ACCURACY),
            "loss": of("alone", "heldout_loss"),
            "distilled: accuracy": of("distill", ACCURACY),
            "loss ": of("distill_loss", "heldout_loss"),
        },
    ),
)


SAID = """Written by `make preferences` on {today}: {versions}; {processor}, one thread each.

Every seed has its own questions, its own SFT run of the default recipe, and what begins from it. Accuracy: the share of
{questions} test questions whose query, drawn greedily, returns what the right one returns. Pairs are of the same
questions; schemas share no table or column name with those of training.
"""


CHAIN = Chain(STAGES, TABLES, SAID, ROOT / "docs" / "preferences.md", "preferences")


def main() -> None:
    asked = CHAIN.arguments(__doc__ or "", "preferences")
    make_small(asked.out / SMALL)
    CHAIN.follow(asked)


if __name__ == "__main__":
    main()
