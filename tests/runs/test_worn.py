"""A reward run's adapter is worn by the policy's network, which afterwards is what it was, under every strategy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loomtune import api
from loomtune.errors import UserError
from runs.scoring import ADAPTER, LORA, TEXTS, scored_between_steps
from runs.worlds import Worlds
from support import write_rows

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
def expected(liking: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The scores by transformers' own model of the merged weights: the head's product with the last token's state."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    out = api.export(liking, tmp_path_factory.mktemp("merged") / "model", check=False)
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
    layout: str, liking: Path, expected: list[float], tiny: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    size, how = LAYOUTS[layout]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ADAPTER).write_text(str(liking))
    settings = [*tiny, *LORA, *how, "steps=2", "seed=7"]
    found = worlds.train(size, settings, tmp_path / "run", scored_between_steps).result["metrics"]
    assert found["kept"] == [True, True, True], "after a request to leave, an error, and a score"
    rough = "bf16" in layout
    assert found["scores"] == pytest.approx(expected, rel=0.1 if rough else 1e-4, abs=0.1 if rough else 1e-5)
    plain = worlds.train(size, settings, tmp_path / "plain").lines[-1]
    assert (found["loss"], found["norm"]) == (plain["loss"], plain["grad_norm"]), "the next step is the same"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"loom {n}", "completion": "over"} for n in range(16)]
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def grpo(tied_model: Path, prompts: Path) -> list[str]:
    """A policy that learns by LoRA, whoever scores it."""
    data = ["data=jsonl", f"data.path={prompts}", f"model.path={tied_model}", "tracker=[jsonl]", "reward=[model]"]
    objective = ["objective=grpo", "objective.group=2", "objective.max_new_tokens=6", "rollout=huggingface"]
    return [*data, *LORA, *objective, "batch.size=4", "steps=2", "optimizer.lr=1e-3", "checkpoint.every=1"]


def test_a_worn_adapter_scores_as_a_network_of_its_own_does(
    liking: Path, grpo: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    merged = api.export(liking, tmp_path / "merged", check=False)
    worn = worlds.train(1, [*grpo, f"reward.model.adapter={liking}", "sharding=single"], tmp_path / "worn")
    own = worlds.train(1, [*grpo, f"roles.reward.model.path={merged}", "sharding=single"], tmp_path / "own")
    assert worn.series("rewards/mean") == pytest.approx(own.series("rewards/mean"), rel=1e-4)
    assert worn.series("loss") == pytest.approx(own.series("loss"), abs=1e-5)


def test_a_resumed_run_wears_the_same_adapter_and_none_that_was_changed(
    liking: Path, grpo: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    shutil.copytree(liking, tmp_path / "reward")
    settings = [*grpo, f"reward.model.adapter={tmp_path / 'reward'}", "sharding=single"]
    whole, stopped = worlds.train(1, settings, tmp_path / "whole"), tmp_path / "stopped"
    worlds.train(1, [*settings, "stop_after=1"], stopped)
    resumed = worlds.resume(1, stopped)
    for name in ("rewards/mean", "loss", "grad_norm"):
        assert resumed.series(name) == whole.series(name)
    manifest = tmp_path / "reward" / "checkpoints" / "step-00000006" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(UserError, match=r"began from other files of reward\.model"):
        worlds.resume(1, stopped)


def refused(*settings: str) -> str:
    """What is said of settings, of which the last of a key counts."""
    settings = tuple({text.partition("=")[0]: text for text in settings}.values())
    with pytest.raises(UserError) as error:
        api.check(api.compose([*settings]))
    return str(error.value)


def test_what_would_not_be_the_reward_that_was_trained_is_refused(
    liking: Path, grpo: list[str], worlds: Worlds, tmp_path: Path, tiny: list[str], tiny_model: Path
) -> None:
    worn, own = f"reward.model.adapter={liking}", "roles.reward.model.path="
    assert api.check(api.compose([*grpo, worn])) is not None
    assert api.check(api.compose([*grpo, f"{worn}/checkpoints/step-00000006"])) is not None
    assert "adapter.rank=4, and the policy has 8" in refused(*grpo, worn, "adapter.rank=8")
    assert "objective.separator='', and here it is '|'" in refused(*grpo, worn, "objective.separator='|'")
    assert "the files of model are not those of the policy" in refused(*grpo, worn, f"model.path={tiny_model}")
    without = [one for one in grpo if not one.startswith("adapter")]
    assert "adapter=full adds no adapter" in refused(*without, worn, "adapter=full")
    assert "both name the reward model" in refused(*grpo, worn, f"{own}{liking}")
    assert f"set reward.model.adapter={liking} instead" in refused(*grpo, f"{own}{liking}")
    sft = worlds.train(1, [*tiny, "sharding=single", "steps=1"], tmp_path / "sft").folder
    assert "has no head 'reward'" in refused(*grpo, f"{own}{sft}")
    assert "trained the model itself" in refused(*grpo, f"reward.model.adapter={sft}")
    lora = worlds.train(1, [*tiny, *LORA, "sharding=single", "steps=1"], tmp_path / "lora").folder
    assert "has no head 'reward'" in refused(*grpo, f"reward.model.adapter={lora}")
    assert "is no run that has a checkpoint" in refused(*grpo, f"reward.model.adapter={tmp_path}")
    assert "needs a model as its reward" in refused(*grpo)
