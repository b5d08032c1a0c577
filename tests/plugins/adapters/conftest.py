"""A Llama of two layers, its weights, and what an engine does to bring a woven skeleton to life."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adapter_fakes import InMemory
from loomtune.contracts import Adapter, WeightSource


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a Llama with weights of its own."""

    def make(tied: bool = False, **more) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True, **more,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture
def bring_to_life() -> Callable[..., tuple[nn.Module, WeightSource]]:
    """Weaves a skeleton on the meta device and reads its parameters, as engines do."""

    def live(adapter: Adapter, model: LlamaForCausalLM, seed: int = 7) -> tuple[nn.Module, WeightSource]:
        with torch.device("meta"):
            skeleton = LlamaForCausalLM(model.config)
        base = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        module, source = adapter.weave(skeleton, InMemory(base), seed)
        assert all(parameter.is_meta for parameter in module.parameters())
        rotary = model.model.rotary_emb.inv_freq
        _materialise(module)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(source.read(name))
            for name, buffer in adapter.base(module).named_buffers():
                assert "inv_freq" in name
                buffer.copy_(rotary)
        return module, source

    return live


@pytest.fixture
def tokens() -> Tensor:
    return torch.arange(2 * 9).reshape(2, 9) * 5 % 48


def _materialise(module: nn.Module) -> None:
    """Storage for every parameter and buffer; what was one parameter in two places stays one, as under engines."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="cpu")
                part._parameters[name] = made.setdefault(id(parameter), nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")
