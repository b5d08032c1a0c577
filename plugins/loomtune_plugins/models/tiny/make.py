"""Makes the shipped model anew: `python -m loomtune_plugins.models.tiny.make` (`make base`).

Builds the tokenizer, pretrains from drawn weights by `recipe=sql_quiz_base` on generated text, and puts the last
checkpoint's model, in bfloat16, where `model=tiny` and the default `model=huggingface` find it.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(overrides: list[str]) -> None:
    """Trains and puts the files in place. overrides: further settings of the run."""
    from loomtune import api
    from loomtune_plugins.data.sql_quiz import tokenizer

    tokenizer.build(HERE)
    result = api.train(["recipe=sql_quiz_base", *overrides])
    if result.status != "completed":
        raise SystemExit(f"the pretraining ended as {result.status}: {result.error}")
    latest = (result.folder / "checkpoints" / "LATEST").read_text().strip()
    ship(result.folder / "checkpoints" / latest / "model")


def ship(trained: Path) -> None:
    """Half the bytes: weights are read into fp32 again, and rounding costs far less than what fine-tuning moves."""
    import torch
    from safetensors.torch import load_file, save_file

    parts = [load_file(path) for path in sorted(trained.glob("*.safetensors"))]
    halved = {name: tensor.to(torch.bfloat16) for part in parts for name, tensor in part.items()}
    save_file(halved, HERE / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(sys.argv[1:])
