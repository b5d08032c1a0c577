"""Makes the shipped model anew: `python -m loomtune_plugins.models.tiny.make` (`make base`).

Builds the tokenizer, pretrains on generated text by `recipe=sql_quiz_base`, first from drawn weights, then on new text
from where that ended (a warm restart of the cosine), and puts the last checkpoint's model, in bfloat16, where
`model=tiny` and the default `model=huggingface` find it. It takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loomtune.compose import quoted

HERE = Path(__file__).parent
AGAIN = ("model=huggingface", "data.seed=1", "data.rows=40000", "steps=2500", "optimizer.lr=2e-3")
"""What the second part changes: other text, and a lower peak."""


def main(overrides: list[str]) -> None:
    """Trains and puts the files in place. overrides: further settings of the run."""
    from loomtune_plugins.data.sql_quiz import tokenizer

    tokenizer.build(HERE)
    first = _train(["recipe=sql_quiz_base", *overrides])
    ship(_train(["recipe=sql_quiz_base", *AGAIN, f"model.path={quoted(str(first))}", *overrides]))


def _train(overrides: list[str]) -> Path:
    """Trains, and gives the model's folder of the last checkpoint."""
    from loomtune import api

    result = api.train(overrides)
    if result.status != "completed":
        raise SystemExit(f"the pretraining ended as {result.status}: {result.error}")
    latest = (result.folder / "checkpoints" / "LATEST").read_text().strip()
    return result.folder / "checkpoints" / latest / "model"


def ship(trained: Path) -> None:
    """Half the bytes: weights are read into fp32 again, and rounding costs far less than what fine-tuning moves."""
    import torch
    from safetensors.torch import load_file, save_file

    parts = [load_file(path) for path in sorted(trained.glob("*.safetensors"))]
    halved = {name: tensor.to(torch.bfloat16) for part in parts for name, tensor in part.items()}
    save_file(halved, HERE / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(sys.argv[1:])
