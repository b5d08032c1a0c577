"""No rank needs more memory for the run's state than its share: once to hold it, once more to write it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from loomtune import api
from runs.memory import attempt
from runs.ranks import on_ranks
from support import write_rows

MB = 10**6
VOCABULARY = 1536
SHAPE = {
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "tie_word_embeddings": "false",
}


@dataclass(frozen=True)
class Size:
    """Of a Llama with many layers and small embeddings."""

    layers: int
    width: int

    @property
    def inner(self) -> int:
        return self.width * 11 // 4

    @property
    def largest(self) -> int:
        """Bytes of its largest tensor in fp32."""
        return 4 * self.width * max(self.inner, VOCABULARY)

    @property
    def weights(self) -> int:
        """Bytes of all of them."""
        layer = 4 * self.width**2 + 3 * self.width * self.inner + 2 * self.width
        return 4 * (self.layers * layer + 2 * VOCABULARY * self.width + self.width)

    @property
    def shape(self) -> list[str]:
        sizes = {"num_hidden_layers": self.layers, "hidden_size": self.width, "intermediate_size": self.inner}
        return [f"model.shape.{key}={value}" for key, value in (SHAPE | sizes).items()]


@dataclass(frozen=True)
class Copies:
    """Of a rank's share of the weights in fp32: at most while the engine is born, and held while it trains."""

    birth: int
    held: int


FSDP = Copies(birth=1, held=3)
"""Weights and two moments."""
ZERO = Copies(birth=6, held=5)
"""Besides: the module's own weights, which are not the masters, and the partitions of gradients, which stay from step
to step. At its start DeepSpeed moves weights from buffer to buffer, and glibc keeps what that frees: the moments, which
come with the first step, find room there."""


def check(folder: Path, model: Size, ranks: int, slack: int, copies: Copies, *more: str) -> None:
    """Trains a step and saves, then resumes in new processes, and compares every peak with the bounds."""
    rows = write_rows(folder / "rows.jsonl", [{"prompt": "loom", "completion": "weft"}] * 8)
    data = ["data=jsonl", f"data.path={rows}", "batch.size=4", "steps=9", "tracker=[]"]
    plan = api.compose(["model=random", *model.shape, *data, *more, f"run.dir='{folder / 'run'}'"], processes=ranks)
    api.check(plan)
    run = api.prepare(plan)
    weights = model.weights / ranks
    held, saved = copies.held * weights, 3 * weights  # written are weights and moments
    few = 3 * model.largest + slack
    for peaks in on_ranks(ranks, attempt, run):
        assert peaks["birth"] < copies.birth * weights + few, peaks
        assert peaks["save"] < held + saved + few, peaks
        assert peaks["after"] < held + few, peaks
    for peaks in on_ranks(ranks, attempt, run):
        assert peaks["restored"] > 0.9 * held, "the moments are there"
        assert peaks["restore"] < max(copies.birth * weights, held) + few, peaks
        assert peaks["save"] < held + saved + few, peaks


def test_a_rank_holds_its_share_and_writes_a_copy_of_it(tmp_path: Path) -> None:
    """What a first step loads and sets up, some 60 MB, must fit into the slack, and one more share must not."""
    model = Size(layers=6, width=512)
    assert 3 * model.weights / 2 > 120 * MB
    check(tmp_path, model, 2, 110 * MB, FSDP, "sharding=fsdp")


@pytest.mark.slow
def test_a_gigabyte_of_weights_on_four_ranks(tmp_path: Path) -> None:
    """Half of the 300 MB that are promised: what glibc keeps unless it is asked would fit into them."""
    model = Size(layers=20, width=1024)
    assert model.weights > 1e9
    check(tmp_path, model, 4, 150 * MB, FSDP, "sharding=fsdp")


@pytest.mark.slow
def test_a_gigabyte_of_weights_on_four_ranks_of_zero(tmp_path: Path) -> None:
    """Buckets as small as can be: they are the same for every size of model, and are part of the slack here."""
    model = Size(layers=20, width=1024)
    check(tmp_path, model, 4, 150 * MB, ZERO, "sharding=zero", "sharding.bucket_mb=10")
