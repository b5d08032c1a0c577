"""Attention over rows that are cut over ranks, in every family: the same states and gradients as over whole rows."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from loomtune.batching import collate
from loomtune.contracts import Batch, Sample, Segment, View
from loomtune.contracts.model import Exchange
from loomtune.errors import UserError
from loomtune.testing import toy
from loomtune.toolkit.dropout import dropout_keys
from loomtune.toolkit.network import Network
from loomtune_plugins.kernels.sdpa import SDPA
from loomtune_plugins.kernels.settings import SDPASettings
from loomtune_plugins.models import exchange, stretches
from loomtune_plugins.models.random import Random
from loomtune_plugins.models.settings import RandomSettings
from loomtune_plugins.shardings.stretches import Stretched
from plugins.models.conftest import shape
from ranks import together

Case = tuple[str, str, dict[str, Any]]
"""Family, attention, changes of its shape."""

EVERYDAY: list[Case] = [
    ("llama", "sdpa", {}),
    ("llama", "eager", {"num_key_value_heads": 1}),
    ("llama", "sdpa", {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4}),
    ("mistral", "sdpa", {}),
    ("gpt2", "sdpa", {}),
]
SELDOM: list[Case] = [
    ("llama", "sdpa", {"num_key_value_heads": 1}),
    ("llama_stretched", "sdpa", {"num_key_value_heads": 4}),
    ("mistral", "eager", {}),
    ("gemma2", "eager", {}),
    ("gemma3", "sdpa", {}),
    ("gemma3", "eager", {}),
    ("qwen2", "sdpa", {}),
    ("qwen3", "sdpa", {}),
    ("granite", "sdpa", {}),
    ("cohere", "sdpa", {}),
    ("mixtral", "sdpa", {}),
    ("gpt2", "eager", {}),
]


def chosen(words: str, family: str, attention: str = "", **more: Any) -> Random:
    return Random(RandomSettings(shape={**shape(family), **more}, attention=attention, tokenizer=words))


def segment(length: int, seed: int, parent: int = -1) -> Segment:
    tokens = np.random.default_rng(seed).integers(3, 259, length).astype(np.int32)
    return Segment(tokens, np.arange(length) > 0, parent)


def batches() -> Iterator[tuple[str, Batch]]:
    """Rows of all lengths; two answers that share a prompt; a single token; a batch without rows."""
    rows = [Sample((segment(length, length),)) for length in (21, 9, 1)]
    shared = Sample((segment(7, 0), segment(11, 1, 0), segment(8, 2, 0)))
    yield "plain", collate(rows, [0, 1, 2], 0)
    yield "shared", collate([shared, rows[1]], [0, 1], 0)
    yield "one", collate([rows[2]], [0], 0)
    yield "none", collate([], [], 0)


def network(model: Random, sequence: Any = None) -> Network:
    """With values, on the CPU."""
    spec = dataclasses.replace(toy.spec(model), kernel=SDPA(SDPASettings()))
    made = (Network(spec) if sequence is None else Stretched(spec, sequence)).to_empty(device="cpu")
    made.base.tie_weights()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(made.initial(name, None))
    spec.model.restore_buffers(made.base)
    return made


def read(of: Network, batch: Batch, reader: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a reader makes of a batch, and the gradients of a sum of waves of it."""
    of.zero_grad()
    with dropout_keys(batch):
        made = of(batch, reader, True)
    made.sin().sum().backward()
    return made.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in of.named_parameters()}


def states(view: View) -> Tensor:
    return view.states


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference as a part of the largest value; as it is where all is rounding (biases of keys)."""
    if not other.numel():
        return 0.0
    largest = float(other.abs().max())
    return float((one - other).abs().max()) / (largest if largest > 1e-6 else 1.0)


def differences(words: str, cases: list[Case], double: bool) -> dict[str, float]:
    """How far states and summed gradients are from those of whole rows."""
    found = {}
    for family, attention, more in cases:
        model = chosen(words, family, attention, **more)
        whole, cut = network(model), network(model, dist.group.WORLD)
        if double:
            whole, cut = whole.double(), cut.double()
        for name, batch in batches():
            if double and name == "shared":  # the kernel's mask is in the type of computation
                continue
            expected, gradients = read(whole, batch, states)
            made, parts = read(cut, batch, states)
            worst = [apart(made, expected)]
            for key, part in parts.items():
                dist.all_reduce(part)
                worst.append(
                    apart(part, gradients[key]) if gradients[key].abs().max() > 1e-12 else float(part.abs().max())
                )
            found[f"{family} {attention} {more} {name}"] = max(worst)
    return found


def check(ranks: list[dict[str, float]], bound: float) -> None:
    for found in ranks:
        assert found and not {name: value for name, value in found.items() if not value < bound}


def test_states_and_gradients_over_rows_that_are_cut_are_those_of_whole_rows(words: Path, tmp_path: Path) -> None:
    check(together(2, tmp_path, differences, str(words), EVERYDAY, False), 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_so_they_are_in_every_family(size: int, words: Path, tmp_path: Path) -> None:
    check(together(size, tmp_path, differences, str(words), EVERYDAY + SELDOM, False), 3e-5)


def test_in_float64_nothing_but_rounding_is_left(words: Path, tmp_path: Path) -> None:
    cases: list[Case] = [("llama", "sdpa", {}), ("mistral", "sdpa", {})]
    check(together(2, tmp_path, differences, str(words), cases, True), 1e-12)


def kept(of: Network, batch: Batch) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in of.parameters()}
    sizes: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        of(batch, lambda view: view.heads["lm"](view.states).logsumexp(-1), True)
    return sum(size for size, _ in sizes.values())


def memory(words: str) -> tuple[int, int]:
    model = chosen(words, "llama", "sdpa", max_position_embeddings=2048)
    row = collate([Sample((segment(2048, 0),))], [0], 0)
    return kept(network(model), row), kept(network(model, dist.group.WORLD), row)


def test_a_rank_keeps_half_of_a_long_row_s_activations(words: Path, tmp_path: Path) -> None:
    for whole, cut in together(2, tmp_path, memory, str(words)):
        assert whole > 2048 * 32 * 4 * 20, "this counts activations"
        assert 0.45 < cut / whole < 0.55


def generations(words: str) -> list[bool]:
    """Whether a model generates alike before and within the pause of an exchange, and reads alike after it."""
    cut = network(chosen(words, "llama", "sdpa"), dist.group.WORLD)
    whole = network(chosen(words, "llama", "sdpa"))
    prompt = torch.arange(3, 10 + dist.get_rank()).unsqueeze(0)  # of different lengths: any exchange would hang
    batch = next(batches())[1]
    with torch.no_grad():
        before = cut(batch, states, True)
        with cut.plain() as module:
            made = cast(Any, module).generate(prompt, max_new_tokens=8, do_sample=False)
        expected = cast(Any, whole.base).generate(prompt, max_new_tokens=8, do_sample=False)
        return [torch.equal(made, expected), torch.equal(cut(batch, states, True), before)]


def test_generation_works_on_whole_rows_by_itself_and_leaves_no_trace(words: Path, tmp_path: Path) -> None:
    assert together(2, tmp_path, generations, str(words)) == [[True, True]] * 2


def of_ranks(size: int) -> Exchange:
    return cast(Exchange, SimpleNamespace(size=size))


@pytest.mark.parametrize(
    ("ranks", "tensor", "what"),
    [(3, 1, "4 attention heads cannot.*3 ranks.*to 1 or 2 or 4"), (4, 2, "4 .* cut over 2 ranks.*to 1 or 2")],
)
def test_heads_that_cannot_be_dealt_out_are_refused_with_what_would_do(
    ranks: int, tensor: int, what: str, words: Path
) -> None:
    model = chosen(str(words), "llama")
    with pytest.raises(UserError, match=rf"(?s){what}$"):
        model.check_sequence(ranks, tensor)
    model.check_sequence(2, tensor)
    with pytest.raises(UserError, match="cannot be dealt out"):
        model.exchange_attention(model.ghost(), of_ranks(3))


def test_attention_that_is_not_known_is_refused(words: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)=flex_attention cannot.*set model\.attention to sdpa or eager"):
        chosen(str(words), "llama", "flex_attention").check_sequence(2)


LONG = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": LONG | {"rope_theta": 1e4}},
        {"rope_parameters": {"full_attention": LONG, "sliding_attention": {"rope_type": "default"}}},
    ],
)
def test_positions_that_follow_the_longest_row_are_refused(rotary: dict[str, Any], words: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)type '(dynamic|longrope)' depend on the longest.*sharding\.sequence=1"):
        chosen(str(words), "llama", **rotary).check_sequence(2)
    chosen(str(words), "llama_stretched").check_sequence(2)


FALCON = {"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("change", ["_is_stateful", "nothing"])
def test_a_model_that_mixes_positions_elsewhere_is_refused(change: str, words: Path) -> None:
    settings = RandomSettings(shape={**FALCON, "vocab_size": 300}, tokenizer=str(words))
    model = Random(settings) if change == "nothing" else chosen(str(words), "llama")
    module = model.ghost()
    setattr(module, change, True)
    with pytest.raises(UserError, match=r"(?s)mixes positions where no exchange reaches.*set sharding\.sequence=1"):
        model.exchange_attention(module, of_ranks(2))


def sinks(words: str) -> str:
    stretches.SINKS = ()  # as if the family were unknown
    sizes = {"model_type": "gpt_oss", "num_local_experts": 2, "sliding_window": 8}
    try:
        network(chosen(words, "llama", "eager", **sizes), dist.group.WORLD)(next(batches())[1], states, True)
    except UserError as error:
        return str(error)
    return ""


def test_attention_that_takes_more_than_queries_keys_and_values_is_refused(words: Path, tmp_path: Path) -> None:
    for said in together(2, tmp_path, sinks, str(words)):
        assert "GptOssAttention attends by s_aux" in said and "set sharding.sequence=1" in said


def with_sinks() -> list[str]:
    """The families of the installed transformers whose attention has sinks, by their source."""
    root = Path(cast(str, importlib.util.find_spec("transformers").origin)).parent / "models"  # type: ignore[union-attr]
    files = (file for file in root.glob("*/modeling_*.py") if "s_aux=self." in file.read_text())
    configs = (file.with_name(file.name.replace("modeling_", "configuration_")).read_text() for file in files)
    return sorted(name for text in configs for name in re.findall(r'^    model_type = "(\w+)"', text, re.MULTILINE))


def test_families_with_sinks_are_refused_before_any_process_exists(words: Path) -> None:
    with pytest.raises(UserError, match="gpt_oss models attend by sinks"):
        chosen(str(words), "llama", "eager", model_type="gpt_oss").check_sequence(2)
    assert "gpt_oss" in with_sinks()
    for family in with_sinks():
        for described in ({"model_type": family}, {"model_type": "seeing", "text_config": {"model_type": family}}):
            with pytest.raises(UserError, match=rf"(?s){family} models attend by sinks.*set sharding\.sequence=1"):
                stretches.check(described, "", heads=8, ranks=2, tensor=1)
    stretches.check({"model_type": "mixtral"}, "", heads=8, ranks=2, tensor=1)


def test_an_exchange_that_is_taken_away_leaves_the_model_as_it_was(words: Path) -> None:
    model = chosen(str(words), "gemma3", "sdpa")
    module = model.ghost()
    model.exchange_attention(module, of_ranks(2))
    assert module.config._attn_implementation == "loomtune_exchanged_sdpa" and exchange.of(module) is not None
    model.exchange_attention(module, None)
    assert module.config._attn_implementation == "sdpa" and exchange.of(module) is None
