"""A reward run's adapter is worn by the policy's network, which afterwards is what it was, under every strategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loomtune import api
from runs.scoring import ADAPTER, TEXTS, scored_between_steps
from runs.worlds import Outcome, Worlds
from support import write_rows

Train = Callable[..., Outcome]

LORA = ["adapter=lora", "adapter.rank=4", "max_length=64"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single": (1, ["sharding=single"]),
    "ddp": (2, ["sharding=ddp"]),
    "fsdp": (2, ["sharding=fsdp"]),
    "zero-3": (2, ["sharding=zero", "sharding.stage=3", "sharding.persist=0"]),
    "zero-2": (2, ["sharding=zero", "sharding.stage=2"]),
    "zero-1": (2, ["sharding=zero", "sharding.stage=1"]),
    "ddp, sequence": (2, ["sharding=ddp", "sharding.sequence=2"]),
    "fsdp, offloaded": (2, ["sharding=fsdp", "sharding.offload=true"]),
    "zero-3, offloaded": (2, ["sharding=zero", "sharding.stage=3", "sharding.persist=0", "sharding.offload=all"]),
    "fsdp, bf16": (2, ["sharding=fsdp", "precision=bf16"]),
    "zero-3, bf16": (2, ["sharding=zero", "sharding.stage=3", "precision=bf16"]),
}
SELDOM = ("zero-1", "zero-2", "ddp, sequence", "fsdp, offloaded", "zero-3, offloaded", "fsdp, bf16", "zero-3, bf16")


@pytest.fixture(scope="module")
def reward_run(worlds: Worlds, tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that learned by LoRA to like an answer of three words."""
    folder = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"loom {n}", "chosen": "over and under", "rejected": "no" * (n % 5 + 1)} for n in range(16)]
    data = ["data=jsonl", f"data.path={write_rows(folder / 'pairs.jsonl', rows)}", f"model.path={tied_model}"]
    settings = [*data, *LORA, "adapter.dropout=0.1", "objective=reward", "batch.size=4", "steps=6", "optimizer.lr=1e-2"]
    return worlds.train(1, [*settings, "sharding=single", "tracker=[jsonl]"], folder / "run").folder


@pytest.fixture(scope="module")
def expected(reward_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The scores by transformers' own model of the merged weights: the head's product with the last token's state."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    out = api.export(reward_run, tmp_path_factory.mktemp("merged") / "model", check=False)
    model, tokenizer = LlamaForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    head = load_file(out / "heads.safetensors")["heads.reward.weight"]
    found = []
    for number, (asked, said) in enumerate(TEXTS):
        ids = tokenizer(asked + said)["input_ids"]
        ids += [tokenizer.eos_token_id] if number % 2 == 0 and said else []
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        found.append(float(states[0, -1] @ head[0]))
    assert max(found) - min(found) > 0.1
    return found


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in LAYOUTS]
)
def test_the_policy_computes_what_the_reward_model_says_and_then_is_to_the_bit_what_it_was(
    layout: str, reward_run: Path, expected: list[float], tiny: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    size, how = LAYOUTS[layout]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ADAPTER).write_text(str(reward_run))
    settings = [*tiny, *LORA, *how, "steps=2", "seed=7"]
    found = worlds.train(size, settings, tmp_path / "run", scored_between_steps).result["metrics"]
    assert found["kept"] == [True, True, True], "after a request to leave, an error, and a score"
    rough = "bf16" in layout
    assert found["scores"] == pytest.approx(expected, rel=0.1 if rough else 1e-4, abs=0.1 if rough else 1e-5)
    plain = worlds.train(size, settings, tmp_path / "plain").lines[-1]
    assert (found["loss"], found["norm"]) == (plain["loss"], plain["grad_norm"]), "the next step is the same"
