"""What a rollout asks of a run, with real engines: a policy, a step's worth of change, and what it says itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loomtune.catalogue import installed
from loomtune.contracts import Completion, EngineSpec, Role, Rollout, Sampling
from loomtune.world import World
from support import byte_tokenizer

PROMPTS = [[70, 80, 90], [70, 80, 90], [66, 67], [99] * 12, [65]]
STOP = 2
SAMPLING = Sampling(max_tokens=6, max_length=64, temperature=1.0, stop=(STOP,))


def alone() -> World:
    return World(0, 1, 0, torch.device("cpu"))


def policy(
    path: Path, adapter: str = "full", world: World | None = None, sharding: str = "single", **more: Any
) -> Role:
    """The policy of a run that trains the model in a folder."""
    build = installed().build
    spec = EngineSpec(
        model=build("model", "huggingface", {"path": str(path)}),
        adapter=build("adapter", adapter, more),
        kernel=build("kernel", "sdpa", {}),
        optimizer=build("optimizer", "adamw", {}),
        precision="fp32",
        seed=0,
    )
    return Role("policy", build("sharding", sharding, {}).engine(spec, world or alone()))


def learn(role: Role) -> None:
    """Changes every trained weight, the same on every rank, as checkpoints are read."""
    whole = {name: tensor.clone() for name, tensor in role.engine.stream_weights()}
    for name in role.engine.trained():
        noise = torch.Generator().manual_seed(len(name))
        whole[name] += 0.1 * torch.randn(whole[name].shape, generator=noise)

    def read(name: str, what: str, region: Any) -> torch.Tensor:
        return whole[name] if region is None else whole[name][region]

    role.engine.load(read, optimizer=False)


def vllm(*urls: str, **settings: Any) -> Rollout:
    made: Rollout = installed().build("rollout", "vllm", {"urls": list(urls), "patience": 20.0, **settings})
    return made


def furthest(
    role: Role, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], temperature: float = 1.0
) -> float:
    """Largest difference, in nats, between the completions' log-probabilities and the policy's own."""
    found = 0.0
    with role.engine.gathered() as module, torch.no_grad():
        for prompt, one in zip(prompts, completions, strict=True):
            assert len(one.log_probs) == len(one.tokens) > 0
            logits = module(input_ids=torch.tensor([[*prompt, *one.tokens]]), use_cache=False).logits[0]
            said = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            own = said[range(len(one.tokens)), list(one.tokens)]
            found = max(found, float((own - torch.tensor(one.log_probs)).abs().max()))
    return found


def model_for_real(folder: Path, *, tied: bool) -> Path:
    """One whose heads have a width that vLLM's attention takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=300, num_hidden_layers=2, max_position_embeddings=64, **shape)
    config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(4.0 if weight.dim() > 1 else 1.0)
        model.save_pretrained(folder)
    return byte_tokenizer(folder)
