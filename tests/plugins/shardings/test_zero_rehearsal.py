"""ZeRO rehearsed: what DeepSpeed allocates and sends on real ranks, seen without storage and without peers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loomtune import api
from loomtune.batching import collate
from loomtune.catalogue import installed
from loomtune.contracts import EngineSpec, Role
from loomtune.rehearsal import rehearsed, weightless
from loomtune.testing import toy
from loomtune.toolkit import log_probs
from loomtune.toolkit.placing import HOSTED
from loomtune.world import World
from loomtune_plugins.planner.observing import Observer
from loomtune_plugins.planner.observing_memory import Memory
from ranks import together
from toys import sample

RANKS = 2
SHAPE = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": False}
TEXT = "warp and weft, heddle and reed " * 6

WAYS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3, "persist": 1000},
    "stage 3, recomputing": {"stage": 3, "persist": 1000, "activation_checkpointing": True},
    "stage 1, offloaded": {"stage": 1, "offload": "optimizer"},
    "stage 2, offloaded": {"stage": 2, "offload": "optimizer"},
    "stage 3, offloaded": {"stage": 3, "persist": 1000, "offload": "all"},
}

Sent = Counter[tuple[str, int, str]]


class Listener(TorchDispatchMode):
    """Counts (operation, bytes of its largest tensor, type) of all that is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Sent = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            largest = max((one for one in tree_leaves(args) if isinstance(one, Tensor)), key=lambda one: one.nbytes)
            self.sent[func._schema.name, largest.nbytes, str(largest.dtype)] += 1
        return func(*args, **(kwargs or {}))


def spec(adapter: str, *, real: bool) -> EngineSpec:
    """Of a Llama of 1.1 M parameters."""
    catalogue = installed()
    model = catalogue.build("model", "random", {"shape": SHAPE})
    return EngineSpec(
        model=model if real else weightless(model, 0, False),
        adapter=catalogue.build("adapter", adapter, {}),
        kernel=catalogue.build("kernel", "sdpa", {}),
        optimizer=catalogue.build("optimizer", "adamw", {}),
        precision="fp32",
        seed=0,
    )


def take(engine: Any) -> None:
    """Two steps of two micro-batches."""
    rows = [collate([sample(text)], range(1), toy.ToyTokenizer.pad_id) for text in (TEXT, TEXT[:-40])]
    for _ in range(2):
        for number, batch in enumerate(rows):
            with engine.accumulating(last=number == 1):
                engine.backward(-log_probs(Role("policy", engine), batch).sum() / 100)
        engine.step(0.01, 1.0, lambda norm: True)


def on_rank(way: dict[str, Any], adapter: str) -> tuple[int, Sent]:
    """The most bytes that the allocator of a real rank gave out at once, and what it sent."""
    from runs.allocations import Recorder

    world = World(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"), dist.group.WORLD)
    sharding, listener = installed().build("sharding", "zero", {**way, "bucket_mb": 1}), Listener()
    made = spec(adapter, real=True)
    with Recorder()() as records, listener:
        take(sharding.engine(made, world))
    return records.peak, listener.sent


@contextmanager
def imagined(way: dict[str, Any], adapter: str = "full", kind: str = "") -> Iterator[tuple[Any, Memory, Sent]]:
    """Within it a rehearsed engine that has taken its steps, its memory and what it sent."""
    memory, listener = Memory(), Listener()
    plan = api.compose(["model=llama_1m", "objective=sft", "data=jsonl", "data.path=none", "steps=1", "sharding=zero"])
    with rehearsed(plan, RANKS) as assembly, Observer(memory).looking(), listener:
        sharding = installed().build("sharding", "zero", {**way, "bucket_mb": 1})
        engine = sharding.rehearsed(spec(adapter, real=False), assembly.run.world, kind)
        take(engine)
        yield engine, memory, listener.sent


def check(way: str, folder: Path, adapter: str = "full") -> None:
    peak, sent = together(RANKS, folder, on_rank, WAYS[way], adapter)[0]
    with imagined(WAYS[way], adapter) as (_, memory, expected):
        seen = max(moment.bytes for moment in memory.moments.values())
        assert abs(seen / peak - 1) < 0.01, f"{seen} bytes foreseen, {peak} measured"
        assert expected == sent


def test_a_rehearsal_allocates_and_sends_what_real_ranks_do(tmp_path: Path) -> None:
    check("stage 3", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if way != "stage 3"])
def test_so_does_every_stage(way: str, tmp_path: Path) -> None:
    check(way, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stage 2", "stage 3"])
def test_and_with_an_adapter(way: str, tmp_path: Path) -> None:
    check(way, tmp_path, "lora")


def test_what_is_kept_has_its_cause_and_afterwards_deepspeed_asks_its_peers_again() -> None:
    """Of a parameter 20 bytes over the ranks in fp32: itself, its master, its gradient, two moments."""
    with imagined({"stage": 3, "persist": 0}) as (engine, _, _):
        numel = sum(getattr(one, "ds_numel", 0) for one in engine.network.parameters())
        held: Counter[str] = Counter()
        for cause, tensor in {id(t.untyped_storage()): (c, t) for c, t in engine.kept()}.values():
            held[cause] += tensor.untyped_storage().nbytes()
        assert held["parameters"] == 4 * numel // RANKS
        assert held["gathered"] == 2**20
        assert abs(held["optimizer"] - 3 * 4 * numel // RANKS) < 100
        assert held["gradients"] >= 4 * numel // RANKS
    from deepspeed.runtime.zero import partitioned_param_coordinator, utils

    asked = partitioned_param_coordinator.assert_ints_same_as_other_ranks
    assert asked is utils.assert_ints_same_as_other_ranks


@pytest.mark.parametrize("way", ["stage 3, offloaded", pytest.param("stage 2, offloaded", marks=pytest.mark.slow)])
def test_what_is_offloaded_lies_on_the_host_of_an_accelerator(way: str) -> None:
    stays = {**WAYS[way], "offload": "none"}
    with imagined(stays, kind="cuda") as (_, memory, _):
        whole = sum(memory.causes.values())
        assert not sum(memory.host.values())
    with imagined(WAYS[way], kind="cuda") as (engine, memory, _):
        numel = sum(getattr(one, "ds_numel", one.numel()) for one in engine.network.parameters())
        near, far = sum(memory.causes.values()), sum(memory.host.values())
    assert far > 3 * 4 * numel // RANKS, "masters and moments"
    assert whole - near > 3 * 4 * numel // RANKS - 4 * 2**20, "but for buckets, and room for the largest gradient"
    assert not HOSTED.get()


@pytest.mark.slow
def test_on_a_cpu_the_host_is_the_device() -> None:
    with imagined(WAYS["stage 3, offloaded"]) as (_, memory, _):
        assert not sum(memory.host.values())


@pytest.mark.slow
def test_an_accelerator_has_a_second_bucket_to_reduce_while_one_fills() -> None:
    """`overlap_comm` of stages 1 and 2, which a CPU does without."""
    with imagined({"stage": 2}) as (_, one, _):
        single = max(moment.bytes for moment in one.moments.values())
    with imagined({"stage": 2}, kind="cuda") as (_, two, _):
        double = max(moment.bytes for moment in two.moments.values())
    assert double - single > 0
