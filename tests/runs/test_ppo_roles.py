"""PPO with a reward model that was learned from ranked replies of OpenAssistant: four roles, and what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loomtune import api
from runs.held import counted
from runs.worlds import Worlds
from support import SHAPE, byte_tokenizer, shared, write_rows

WIDER = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "initializer_range": 0.05}
LORA = ["adapter=lora", "adapter.rank=4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a million parameters with drawn weights, beside which what LoRA adds is small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(**{**SHAPE, **WIDER, "max_position_embeddings": 256}, tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(folder)
    return byte_tokenizer(folder)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real trees with a short question, of which the first replies are kept, cut short."""
    rows = map(json.loads, shared("data", "oasst", "en_100_tree.jsonl").read_text().splitlines())
    kept = [{**tree, "prompt": _short(tree["prompt"])} for tree in rows if len(tree["prompt"]["text"]) < 60]
    return write_rows(tmp_path_factory.mktemp("oasst") / "trees.jsonl", kept)


def _short(question: Mapping[str, Any]) -> dict[str, Any]:
    replies = [{**reply, "text": reply["text"][:60], "replies": []} for reply in question["replies"]]
    return {**question, "replies": replies}


@pytest.fixture(scope="module")
def common(base: Path, trees: Path) -> list[str]:
    data = [f"model.path={base}", "model.chat_template=plain", "data=oasst", f"data.path={trees}", "sharding=single"]
    return [*data, "tracker=[jsonl]", "checkpoint.background=false", "optimizer.lr=1e-3", "batch.size=8"]


@pytest.fixture(scope="module")
def reward_run(worlds: Worlds, common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model, learned from pairs of replies by LoRA."""
    settings = [*common, *LORA, "objective=reward", "steps=3"]
    return worlds.train(1, settings, tmp_path_factory.mktemp("reward") / "run").folder


@pytest.fixture(scope="module")
def learned(
    worlds: Worlds, common: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """A run of PPO on the questions, and what it held."""

    def run(*settings: str) -> dict[str, Any]:
        ppo = ["objective=ppo", "objective.max_new_tokens=12", "objective.epochs=2", "data.format=prompt", "steps=2"]
        chosen = [*common, *ppo, "rollout=huggingface", "reward=[model]", *settings]
        return worlds.train(1, chosen, tmp_path_factory.mktemp("ppo") / "run", work=counted).result

    return run


def test_with_lora_four_roles_hold_one_base_and_without_it_four(
    learned: Callable[..., dict[str, Any]], reward_run: Path, base: Path, tmp_path: Path
) -> None:
    merged = api.export(reward_run, tmp_path / "merged", check=False)
    one = learned(*LORA, f"reward.model.adapter={reward_run}")
    four = learned("objective.value=model", f"roles.reward.model.path={merged}")
    size = (base / "model.safetensors").stat().st_size
    assert (one["roles"], one["engines"]) == (["policy", "reference", "value"], 1), "the reward is worn by the policy"
    assert (four["roles"], four["engines"]) == (["policy", "reference", "reward", "value"], 4)
    assert one["parameters"] < 1.1 * size and four["parameters"] > 3.95 * size
    assert one["states"] < 0.2 * size and four["states"] > 3.9 * size, "two moments of two trained networks"
    for run in (one, four):
        rewards = [line["rewards/mean"] for line in run["lines"] if "rewards/mean" in line]
        assert len(rewards) == 1 and len(run["lines"]) == 2 and all(line["grad_norm"] > 0 for line in run["lines"])


@pytest.mark.slow
def test_a_value_may_start_from_what_the_reward_model_learned(
    learned: Callable[..., dict[str, Any]], reward_run: Path, tmp_path: Path
) -> None:
    merged = api.export(reward_run, tmp_path / "merged", check=False)
    own = ["objective.value=model", f"roles.reward.model.path={merged}"]
    fresh, warm = learned(*own), learned(*own, f"roles.value.model.path={merged}")
    assert fresh["lines"][0]["value/mean"] == 0 != warm["lines"][0]["value/mean"]
    assert fresh["lines"][0]["rewards/mean"] == warm["lines"][0]["rewards/mean"]
