"""Layers cut over ranks: true gradients and their norm, the parts that each rank holds, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from loomtune.batching import collate
from loomtune.catalogue import installed
from loomtune.contracts import Batch, Engine, EngineSpec, Role, Sample, Segment
from loomtune.errors import UserError
from loomtune.testing import toy
from loomtune.toolkit import log_probs
from loomtune.toolkit.network import Network, saved_name
from loomtune.world import World
from loomtune_plugins.shardings.tensor import _check_dropout, cut
from ranks import together

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ODD: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 42,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 299,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True, "hidden_size": 48},
    "llama, odd": ODD,
    "qwen3": {"model_type": "qwen3"},
    "phi3": {"model_type": "phi3", "hidden_size": 48},
    "llama, biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "hidden_size": 48},
    "qwen2": {"model_type": "qwen2", "hidden_size": 48},
    "olmo2": {"model_type": "olmo2", "hidden_size": 48},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 8},
    "gemma3": {"model_type": "gemma3_text", "num_hidden_layers": 6},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "granite": {"model_type": "granite", "logits_scaling": 3.0, "hidden_size": 48},
    "cohere": {"model_type": "cohere", "logit_scale": 0.25, "hidden_size": 48},
    "glm4": {"model_type": "glm4"},
    "smollm3": {"model_type": "smollm3", "hidden_size": 48},
    "starcoder2": {"model_type": "starcoder2", "hidden_size": 48},
    "phi": {"model_type": "phi", "hidden_size": 64, "head_dim": 8, "resid_pdrop": 0.1},
    "gpt_neox": {"model_type": "gpt_neox", "hidden_size": 64, "hidden_dropout": 0.1},
}
EVERYDAY = ["llama, tied", "qwen3", "phi3"]


def spec(family: str, **changes: Any) -> EngineSpec:
    plugins = installed()
    model = plugins.build("model", "random", {"shape": {**SIZES, **FAMILIES[family], **changes}, "attention": "eager"})
    return EngineSpec(
        model=model,
        adapter=plugins.build("adapter", "full", {}),
        kernel=plugins.build("kernel", "sdpa", {}),
        optimizer=plugins.build("optimizer", "adamw", {}),
        precision="fp32",
        seed=3,
    )


def rows() -> list[list[Sample]]:
    """Micro-batches of different lengths and numbers of rows, one of them without any."""
    draw = torch.Generator().manual_seed(0)
    lengths: list[list[int]] = [[7, 5], [9], [3, 4, 6], []]
    made = [[torch.randint(3, 299, (n,), generator=draw).int().numpy() for n in some] for some in lengths]
    return [
        [Sample((Segment(tokens, (tokens > 40) & (np.arange(len(tokens)) > 0)),)) for tokens in some] for some in made
    ]


def batches(replica: int = 0, replicas: int = 1) -> list[Batch]:
    """This replica's micro-batches; every one has equally many."""
    return [collate(some, range(10 * i, 10 * i + len(some)), 0) for i, some in enumerate(rows())][replica::replicas]


def backward(engine: Any, given: list[Batch]) -> None:
    for number, batch in enumerate(given):
        with engine.accumulating(last=number == len(given) - 1):
            engine.backward(-log_probs(Role("policy", engine), batch).sum() / 20)


def reference(family: str) -> dict[str, Tensor]:
    """Gradients in float64 on one process."""
    engine: Any = installed().build("sharding", "single", {}).engine(spec(family), toy.world())
    engine.network.double()
    backward(engine, batches())
    return {saved_name(name): p.grad for name, p in engine.trainable.items()}


def here(settings: dict[str, Any]) -> tuple[Any, World]:
    """The strategy and this rank's place."""
    sharding = installed().build("sharding", "fsdp", settings)
    world = World(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"), dist.group.WORLD)
    replica, replicas = sharding.replicas(world)
    return sharding, World(world.rank, world.size, 0, world.device, world.control, replica, replicas)


def gradients(families: list[str], settings: dict[str, Any]) -> list[tuple[float, dict[str, Any], bool]]:
    """On each rank: the norm, whole gradients, and whether what ranks hold in common is the same to the bit."""
    sharding, world = here(settings)
    found = []
    for family in families:
        engine = sharding.engine(spec(family), world)
        backward(engine, batches(world.replica, world.replicas))
        kept = {saved_name(name): engine.layout.full(p.grad) for name, p in engine.trainable.items()}
        everyone = world.gather([kept, [asked := engine.step(0.1, 1.0, lambda norm: False)]])
        same = all(
            torch.equal(other[name], gradient) and norm == asked
            for other, (norm,) in everyone
            for name, gradient in kept.items()
        )
        found.append((asked, {name: gradient.numpy() for name, gradient in kept.items()} if world.leads else {}, same))
        engine.close()
    return found


def check_gradients(families: list[str], size: int, settings: dict[str, Any], folder: Path) -> None:
    ranks = together(size, folder, gradients, families, settings)
    for family, *everyone in zip(families, *ranks, strict=True):
        assert all(same for _, _, same in everyone), f"ranks agree on the gradients of {family}"
        (norm, found, _), expected = everyone[0], reference(family)
        assert found.keys() == expected.keys()
        whole = float(torch.stack([gradient.square().sum() for gradient in expected.values()]).sum().sqrt())
        assert norm == pytest.approx(whole, rel=3e-6), family
        for name, gradient in expected.items():
            off, size_of_it = (float(g.norm()) for g in (torch.from_numpy(found[name]) - gradient, gradient))
            assert off < 2e-5 * size_of_it + 1e-7 * whole, f"{name} of {family} is off by {off} in {size_of_it}"


def test_gradients_and_their_norm_are_those_of_float64_on_one_process(tmp_path: Path) -> None:
    check_gradients(EVERYDAY, 2, {"tensor": 2}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, {"tensor": 2}),
        (4, {"tensor": 2}),
        (4, {"tensor": 4}),
        (4, {"tensor": 2, "replicate": 2}),
        (4, {"tensor": 2, "sequence": 2}),
        (2, {"tensor": 2, "activation_checkpointing": True}),
        (4, {"tensor": 2, "prefetch": 1, "reshard": False}),
        (4, {"tensor": 2, "accumulate_sharded": True}),
        (4, {"tensor": 2, "offload": True}),
        (4, {"replicate": 2}),
        (4, {}),
    ],
)
def test_every_family_has_true_gradients(size: int, settings: dict[str, Any], tmp_path: Path) -> None:
    fitting = [name for name in FAMILIES if name != "llama, odd" or settings.get("tensor") != 4]
    for start in range(0, len(fitting), 4):
        check_gradients(fitting[start : start + 4], size, settings, tmp_path)


def disagreeing(family: str) -> tuple[float, float, bool, int]:
    """The norm, the same where the second rank's gradients of what both hold whole are off, whether weights are alike
    after a step of these, and how many numbers were off."""
    sharding, world = here({"tensor": 2})
    norms, off = [], 0
    for noise in (0.0, 1e-2):
        engine = sharding.engine(spec(family), world)
        backward(engine, batches(world.replica, world.replicas))
        for parameter in engine.trainable.values():
            placed = dict(zip(parameter.device_mesh.mesh_dim_names, parameter.placements, strict=True))
            if "tensor" not in placed or placed["tensor"].is_replicate():
                parameter.grad.to_local().add_(noise * world.rank)
                off += parameter.numel()
        norms.append(engine.step(0.1, 0.0, lambda norm: True))
    kept = {name: p.to_local() for name, p in engine.trainable.items() if p.numel() == p.to_local().numel()}
    first, second = world.gather(kept)
    return norms[0], norms[1], all(torch.equal(first[name], second[name]) for name in kept), off


@pytest.mark.parametrize("family", ["llama, biased"])
def test_ranks_have_one_norm_and_equal_copies_where_kernels_round_differently(family: str, tmp_path: Path) -> None:
    """As atomic additions of accelerators do."""
    (clean, first, alike, off), (_, second, too, _) = together(2, tmp_path, disagreeing, family)
    assert off and first == second == clean and alike and too


Part = tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Tensor]]


def written(engine: Engine) -> list[Part]:
    """What this rank would write of a checkpoint."""
    return [
        (one.name, one.shape, one.offset, {key: tensor.clone() for key, tensor in one.tensors.items()})
        for one in engine.shards()
    ]


def joined(parts: Iterable[Part]) -> dict[tuple[str, str], Tensor]:
    """Each parameter's tensors, from parts that must cover it once."""
    made: dict[tuple[str, str], Tensor] = {}
    times: dict[tuple[str, str], Tensor] = {}
    for name, shape, offset, tensors in parts:
        for key, values in tensors.items():
            whole = made.setdefault((name, key), torch.zeros(shape if values.dim() else ()))
            seen = times.setdefault((name, key), torch.zeros(whole.shape))
            at = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=bool(values.dim())))
            whole[at], seen[at] = values, seen[at] + 1
    assert all(bool((seen == 1).all()) for seen in times.values() if seen.dim()), "each number is written once"
    return made


def alike(some: list[Part], others: list[Part]) -> bool:
    """The same parts of the same parameters, with the same numbers."""
    pairs = zip(some, others, strict=True)
    return all(a[:3] == b[:3] and all(torch.equal(a[3][key], b[3][key]) for key in a[3]) for a, b in pairs)


def parts(family: str, settings: dict[str, Any]) -> dict[str, bool]:
    """What holds on a rank that has taken a step, written what it has, and read it into another engine."""
    sharding, world = here(settings)
    engine, fresh = (sharding.engine(spec(family), world) for _ in range(2))
    source = engine.spec.model.weights(3)
    found = {"born": all(torch.equal(tensor, source.read(name)) for name, tensor in engine.stream_weights())}
    backward(engine, batches(world.replica, world.replicas))
    engine.step(0.1, 1.0, lambda norm: True)
    whole = joined(itertools.chain(*world.gather(written(engine))))
    fresh.load(lambda name, key, at: whole[name, key] if at is None else whole[name, key][at], optimizer=True)
    found["read back"] = alike(written(engine), written(fresh))
    weights = dict(engine.stream_weights())
    found["streamed"] = all(torch.equal(whole[name, "weight"], tensor) for name, tensor in weights.items())
    with engine.gathered() as module:
        plain = dict(module.named_parameters())
        found["gathered"] = all(type(plain[name].data) is Tensor for name in weights)
        found["gathered alike"] = all(torch.equal(plain[name], tensor) for name, tensor in weights.items())
    return found


@pytest.mark.parametrize(
    ("family", "size", "settings"),
    [
        ("llama, odd", 4, {"tensor": 2}),
        pytest.param("qwen3", 4, {"tensor": 4}, marks=pytest.mark.slow),
        pytest.param("llama, odd", 3, {}, marks=pytest.mark.slow),
        pytest.param("llama, tied", 4, {"tensor": 2, "replicate": 2}, marks=pytest.mark.slow),
        pytest.param("qwen3", 4, {"tensor": 2, "offload": True}, marks=pytest.mark.slow),
        pytest.param("phi3", 6, {"tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_parts_cover_each_parameter_once_and_are_read_back_to_the_bit(
    family: str, size: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    for found in together(size, tmp_path, parts, family, settings):
        assert found == dict.fromkeys(found, True)


def memory(settings: dict[str, Any]) -> tuple[int, int, set[str]]:
    """Numbers that a rank keeps, those that there are, and the kinds of tensors that layers compute with."""
    sharding, world = here(settings)
    engine = sharding.engine(spec("llama, tied"), world)
    kinds: set[str] = set()
    layer = engine.network.base.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_pre_hook(lambda module, given: kinds.add(type(given[0]).__name__))
    layer.register_forward_hook(lambda module, given, made: kinds.add(type(made).__name__))
    backward(engine, batches(world.replica, world.replicas))
    mine = sum(p.to_local().numel() for p in engine.trainable.values())
    return mine, sum(p.numel() for p in engine.trainable.values()), kinds


def test_a_rank_keeps_its_part_and_computes_with_plain_tensors(tmp_path: Path) -> None:
    """The quick kernel of `linear` takes no tensor that is spread over ranks."""
    for mine, whole, kinds in together(2, tmp_path, memory, {"tensor": 2}):
        assert mine < 0.52 * whole
        assert kinds == {"Tensor"}


class Refusing(toy.ToyModel):
    """Has a plan of the given styles for layers of the toy network."""

    def __init__(self, plan: dict[str, str]) -> None:
        self.plan = plan

    def tensor_plan(self, module: nn.Module, ranks: int) -> dict[str, str]:
        return self.plan


def refused(model: toy.ToyModel) -> str:
    network = Network(toy.spec(model))
    mesh: Any = type("Mesh", (), {"size": lambda self: 2})()
    with pytest.raises(UserError) as error:
        cut(network, mesh)
    return str(error.value)


def test_a_model_without_a_plan_is_refused() -> None:
    assert "ToyModel does not say how its layers are cut" in refused(toy.ToyModel())


def test_a_cut_that_is_unknown_or_does_not_fit_its_layer_is_refused() -> None:
    assert "'sideways', the cut of the layer 'head', is unknown" in refused(Refusing({"head": "sideways"}))
    told = refused(Refusing({"tokens": "colwise"}))
    assert "the layer 'tokens' is a Embedding, which cannot be cut as 'colwise'" in told and "sharding.tensor=1" in told


def test_dropout_between_cut_layers_is_refused_and_outside_of_them_not() -> None:
    from loomtune.toolkit.dropout import SeededDropout

    plan = {"blocks.0.project": "colwise", "blocks.0.out": "rowwise", "head": "colwise_gather_output"}
    network = Network(toy.spec())
    network.base.add_module("drop", SeededDropout(0.1, 0, "drop"))
    _check_dropout(network.base, plan)
    network.base.get_submodule("blocks.0").add_module("drop", SeededDropout(0.1, 0, "inner"))
    with pytest.raises(UserError, match=r"the dropout 'blocks\.0\.drop' stands between layers that are cut"):
        _check_dropout(network.base, plan)
