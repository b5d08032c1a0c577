"""What is generated from is the same to the bit under every strategy, also where what computes is not fp32."""

from __future__ import annotations

import gc
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from loomtune.catalogue import installed
from loomtune.contracts import EngineSpec, Role, Sampling
from loomtune.testing import toy
from loomtune.world import World
from loomtune_plugins.rollouts.huggingface import HuggingFace
from loomtune_plugins.rollouts.settings import HuggingFaceSettings
from ranks import together

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("single", {}),
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "zero 1": ("zero", {"stage": 1}),
    "zero 2": ("zero", {"stage": 2}),
    "zero 3": ("zero", {"stage": 3, "persist": 0}),
}
ADAPTERS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"rank": 4, "targets": ["all-linear"]}}
BOTH = {"torch.float32", "torch.bfloat16"}
PROMPT = [[1, 40, 77, 130, 5, 200, 9, 33]]

Said = tuple[set[str], Any, list[list[int]]]
"""Types of the parameters, logits, completions."""


def here() -> World:
    return World(
        dist.get_rank(),
        dist.get_world_size(),
        0,
        torch.device("cpu"),
        dist.group.WORLD,
        replica=dist.get_rank(),
        replicas=dist.get_world_size(),
    )


def spec(model: Path, adapter: str, *, trained: bool, precision: str = "bf16") -> EngineSpec:
    build = installed().build
    return EngineSpec(
        model=build("model", "huggingface", {"path": str(model)}),
        adapter=build("adapter", adapter, ADAPTERS[adapter]),
        kernel=build("kernel", "sdpa", {}),
        optimizer=toy.ToyOptimizer() if trained else None,
        precision=precision,
        seed=0,
    )


def said(model: Path, adapter: str, trained: bool) -> dict[str, Said]:
    """What each strategy's gathered module is made of and says, at the beginning of a run in bf16."""
    world, found = here(), {}
    for name, (strategy, settings) in STRATEGIES.items():
        sharding = installed().build("sharding", strategy, settings)
        engine = sharding.engine(spec(model, adapter, trained=trained), world)
        with engine.gathered() as module:
            types = {str(parameter.dtype) for parameter in module.parameters()}
            logits = module(torch.tensor(PROMPT)).logits.float().numpy()
            tokens = module.generate(torch.tensor(PROMPT), max_new_tokens=8, do_sample=False)
        found[name] = types, logits, tokens.tolist()
        engine.close()
    return found


@pytest.mark.parametrize(
    ("adapter", "trained"),
    [
        pytest.param("full", True, marks=pytest.mark.slow),
        ("lora", True),
        pytest.param("full", False, marks=pytest.mark.slow),
    ],
    ids=["full", "lora", "frozen"],
)
def test_in_bf16_every_strategy_generates_from_the_same_numbers(
    adapter: str, trained: bool, tied_model: Path, tmp_path: Path
) -> None:
    first, second = together(2, tmp_path, said, tied_model, adapter, trained)
    kept, logits, tokens = first["single"]
    assert kept == ({"full": {"torch.float32"}, "lora": BOTH}[adapter] if trained else {"torch.bfloat16"})
    for rank in (first, second):
        for name, (types, their_logits, their_tokens) in rank.items():
            assert types in (kept, BOTH), f"{name}: what is only multiplied may be lighter"
            assert (their_logits == logits).all() and their_tokens == tokens, name


class Collectives(TorchDispatchMode):
    """Counts what processes do together, whoever asks for it: torch's and DeepSpeed's own calls end here."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += call.namespace in ("c10d", "_c10d_functional")
        return call(*args, **(kwargs or {}))


def held() -> int:
    """Bytes of all tensors that this process holds."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


def counted(model: Path, adapter: str, name: str) -> dict[str, Any]:
    """What a rollout of 8 tokens and one of 64 take of a strategy."""
    strategy, settings = STRATEGIES[name]
    built = installed().build("sharding", strategy, settings)
    engine = built.engine(spec(model, adapter, trained=True, precision="fp32"), here())
    rollout = HuggingFace(HuggingFaceSettings(batch=2))
    prompts = [PROMPT[0], PROMPT[0][:3], PROMPT[0][:5]]
    counts, memory, during = [], [held()], []
    for length in (8, 64, 64):
        with Collectives() as mode:
            rollout.generate(Role("policy", engine), prompts, [1, 2, 3], Sampling(max_tokens=length), here())
        counts.append(mode.count)
        memory.append(held())
    with engine.gathered() as module:
        during.append(held())
        first = module
    with engine.gathered() as module:
        assert module is first, "a network is built once"
    saved = sum(4 * tensor.numel() for _, tensor in engine.stream_weights())
    parameters = len(list(engine.network.parameters()))
    engine.close()
    return {"counts": counts, "memory": memory, "during": during, "saved": saved, "parameters": parameters}


def both_counted(model: Path, adapter: str) -> list[dict[str, Any]]:
    return [counted(model, adapter, name) for name in ("fsdp", "zero 3")]


@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_weights_are_gathered_once_for_a_rollout_of_any_length_and_let_go(
    adapter: str, tied_model: Path, tmp_path: Path
) -> None:
    for rank in chain(*together(2, tmp_path, both_counted, tied_model, adapter)):
        (few,) = set(rank["counts"])
        assert rank["parameters"] / 2 < few <= 2 * rank["parameters"]
        assert rank["during"][0] - rank["memory"][0] >= rank["saved"], "there is a whole copy within the context"
        assert max(rank["memory"]) - rank["memory"][0] < rank["saved"] / 20, "and none after it"
