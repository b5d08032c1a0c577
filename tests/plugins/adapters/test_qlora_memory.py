"""What a model of 300 M parameters takes in 4 bits: its tensors, the process that makes and trains it, its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loomtune.batching import collate
from loomtune.catalogue import installed
from loomtune.checkpoint.memory import give_back
from loomtune.contracts import EngineSpec, Role
from loomtune.toolkit import log_probs
from loomtune.world import World
from ranks import together
from runs.memory import Watch
from runs.processes import COMMAND, run
from support import mixed_rows, write_rows
from toys import sample

pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")

SHAPE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 1466,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LARGEST = 2048 * 5632


def born(shape: dict[str, Any]) -> Any:
    build = installed().build
    spec = EngineSpec(
        model=build("model", "random", {"shape": shape}),
        adapter=build("adapter", "qlora", {"rank": 4}),
        kernel=build("kernel", "sdpa", {}),
        optimizer=build("optimizer", "adamw", {}),
        precision="fp32",
        seed=0,
    )
    return build("sharding", "single", {}).engine(spec, World(0, 1, 0, torch.device("cpu")))


def step(engine: Any) -> None:
    batch = collate([sample("warp"), sample("weft")], range(2), 0)
    engine.backward(-log_probs(Role("policy", engine), batch).sum())
    engine.step(1e-3, 1.0, lambda norm: True)


def measured() -> dict[str, int]:
    """Weights of the packed layers, bytes that they take, and peaks of the process above where it stood before."""
    from loomtune_plugins.adapters.lora.quantised import QuantisedLinear

    step(born({**SHAPE, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}))  # imports what it needs
    watch = Watch()
    with watch.phase("birth"):
        engine = born(SHAPE)
    layers = [part for part in engine.network.modules() if isinstance(part, QuantisedLinear)]
    give_back()
    with watch.phase("step"):
        step(engine)
    return {
        "weights": sum(layer.in_features * layer.out_features for layer in layers),
        "held": sum(parameter.nbytes for layer in layers for parameter in layer.parameters()),
        "others": sum(p.nbytes for p in engine.network.parameters() if p.dtype != torch.uint8),
        **watch.peaks,
    }


@pytest.mark.slow
def test_a_large_model_takes_little_more_than_half_a_byte_a_weight_from_birth_on(tmp_path: Path) -> None:
    (found,) = together(1, tmp_path, measured)
    print({name: f"{value / found['weights']:.3f} bytes a weight" for name, value in found.items()}, found)
    assert found["weights"] > 300e6
    assert found["held"] < 0.52 * found["weights"]
    held = found["held"] + found["others"]
    one = 4 * LARGEST  # bytes of the largest matrix in fp32
    assert found["birth"] < held + 4 * one + 24 * (1 << 22), "no more than a layer at a time is whole"
    assert found["birth"] < 0.65 * found["weights"] + 4 * one + 24 * (1 << 22)
    # Kept for the backward pass, the matrices alone would take four bytes a weight.
    assert found["step"] < 1.8 * found["weights"], "a matrix is unpacked for as long as it computes"


@pytest.mark.slow
def test_a_large_model_leaves_merged_as_what_was_trained(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", mixed_rows(12))
    shape = [f"model.shape.{key}={str(value).lower()}" for key, value in SHAPE.items()]
    folder, log = tmp_path / "run", tmp_path / "log"
    chosen = ["model=random", *shape, "data=jsonl", f"data.path={rows}", "adapter=qlora", "adapter.rank=4"]
    more = ["optimizer.lr=1e-3", "steps=2", "batch.size=4", "tracker=[jsonl]", f"run.dir={folder}"]
    assert run([*COMMAND, "train", *chosen, *more, "launcher.procs=1", "sharding=single"], log) == 0, log.read_text()
    assert run([*COMMAND, "export", str(folder)], log) == 0, log.read_text()
    said = json.loads((folder / "export" / "huggingface" / "export.json").read_text())
    print(said)
    assert (folder / "export" / "huggingface" / "config.json").is_file()
