"""Single answers, wanted or not: what z0 is measured on, weights, and recorded numbers of TRL."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from loomtune import api
from loomtune.batching import collate
from loomtune.contracts import Batch, Sample
from loomtune.errors import UserError
from loomtune.testing import check_objective, loss_of, toy
from loomtune.testing.toy import ToyTokenizer
from loomtune.toolkit import log_probs, row_sums
from loomtune_plugins.objectives.kto import Kto
from loomtune_plugins.objectives.kto_branch import branch
from loomtune_plugins.objectives.kto_settings import KtoSettings

SHARED = Path(os.environ.get("LOOMTUNE_SHARED", Path(__file__).parents[4] / "shared")) / "references"
ROWS = [
    {"prompt": "a loom ", "completion": "weaves cloth", "label": True},
    {"prompt": "warp ", "completion": "flies", "label": False},
    {"prompt": "the ", "completion": "weft", "label": 1},
]


def together(rows: list[dict[str, Any]] = ROWS, limit: int = 100, **settings: Any) -> list[Sample]:
    objective = Kto(KtoSettings(**settings))
    return list(objective.together([objective.sample(row, ToyTokenizer(), limit) for row in rows], limit))


def batch_of(samples: list[Sample], *, unfolded: bool = False) -> Batch:
    return collate([sample.unfolded() for sample in samples] if unfolded else samples, range(len(samples)), 0)


def computed(batches: list[Batch], **settings: Any) -> dict[str, float]:
    """Loss, gradient norm and metrics of a step in micro-batches; a policy that is not the reference."""
    objective = Kto(KtoSettings(**settings))
    roles = toy.roles(objective)
    network = roles["policy"].engine.network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
        statistics = objective.statistics(roles, batches, toy.world())
    examples = sum(objective.weights(batch)["loss"] for batch in batches)
    found: dict[str, list[float]] = {}
    total = torch.zeros(())
    for batch in batches:
        sums = objective.loss(roles, batch, {"loss": examples}, statistics)
        total = total + sums.terms["loss"] / examples
        for name, (value, weight) in sums.metrics.items():
            before = found.get(name, [0.0, 0.0])
            found[name] = [before[0] + float(value), before[1] + float(weight)]
    total.backward()
    norm = math.hypot(*(float(p.grad.norm()) for p in network.parameters() if p.grad is not None))
    means = {name: value / weight for name, (value, weight) in found.items() if weight}
    return {"loss": float(total.detach()), "norm": norm, **means}


@pytest.mark.parametrize("variant", ["kto", "apo_zero_unpaired"])
def test_it_keeps_the_contract(variant: str) -> None:
    check_objective(Kto(KtoSettings(variant=variant, entropy=True)), ROWS)


def test_each_prompt_is_measured_with_the_next_answer_and_the_last_with_the_first() -> None:
    samples = together()
    for i, sample in enumerate(samples):
        prompt, answer, foreign = sample.segments
        assert (prompt.is_target.any(), answer.parent, foreign.parent) == (False, 0, 0)
        assert foreign.tokens.tolist() == samples[(i + 1) % 3].segments[1].tokens.tolist()
    assert [sample.numbers["label"] for sample in samples] == [1.0, 0.0, 1.0]


def test_a_foreign_answer_is_cut_to_the_room_that_the_prompt_leaves() -> None:
    first, second, _ = together(limit=12)
    assert (len(first.segments[0].tokens), len(first.segments[2].tokens)) == (8, 4)  # of "flies" and its end
    assert (len(second.segments[0].tokens), len(second.segments[2].tokens)) == (6, 5)


def test_where_nothing_is_measured_no_answer_is_added() -> None:
    assert {len(sample.segments) for sample in together(variant="apo_zero_unpaired")} == {2}
    assert {len(sample.segments) for sample in together(ROWS[:1])} == {2}


def reference_loss(settings: KtoSettings, samples: list[Sample]) -> float:
    """The paper's formula on whole sequences, one at a time."""
    objective = Kto(settings)
    roles = toy.roles(objective)
    with torch.no_grad():
        for parameter in roles["policy"].engine.network.parameters():
            parameter.mul_(1.1)
        batch = batch_of(samples)
        policy, reference = (row_sums(log_probs(roles[name], batch), batch) for name in ("policy", "reference"))
    ratios = (policy - reference).view(-1, 3).tolist()
    z0 = max(0.0, sum(ratio[2] for ratio in ratios) / len(ratios))
    values = []
    for sample, (_, own, _) in zip(samples, ratios, strict=True):
        sigma = 1 / (1 + math.exp(-settings.beta * (own - z0 if sample.numbers["label"] else z0 - own)))
        values.append((settings.desirable if sample.numbers["label"] else settings.undesirable) * (1 - sigma))
    return sum(values) / len(values)


@pytest.mark.parametrize(("desirable", "undesirable"), [(1.0, 1.0), (1.3, 0.4), (0.2, 2.0)])
def test_both_weights_count_as_the_paper_says(desirable: float, undesirable: float) -> None:
    settings = {"desirable": desirable, "undesirable": undesirable, "beta": 0.05}
    found = computed([batch_of(together())], **settings)
    assert found["loss"] == pytest.approx(reference_loss(KtoSettings(**settings), together()), rel=1e-5)


def test_micro_batches_and_unfolding_change_nothing() -> None:
    samples = together()
    whole = computed([batch_of(samples)], entropy=True)
    parts = computed([batch_of(samples[:2], unfolded=True), batch_of(samples[2:])], entropy=True)
    assert whole["kl"] >= 0 and set(whole) == set(parts)
    assert all(parts[name] == pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in whole.items())


@pytest.mark.parametrize(("ratios", "baseline"), [((-3.0, 5.0), 1.0), ((-3.0, 1.0), 0.0)])
def test_z0_is_held_at_0_after_the_mean_over_the_step_and_not_before(
    ratios: tuple[float, ...], baseline: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, left, batch = Kto(KtoSettings()), list(ratios), batch_of(together())
    monkeypatch.setattr(objective, "_log_ratios", lambda *_: (left.pop(0), 1))
    with torch.no_grad():
        around = objective.statistics(toy.roles(objective), [batch, batch], toy.world())["around"]
    assert (around.baseline, around.counts) == (baseline, (2.0, 4.0))


def test_a_micro_batch_that_statistics_did_not_see_is_read_by_itself() -> None:
    objective, batch = Kto(KtoSettings()), batch_of(together())
    roles = toy.roles(objective)
    with torch.no_grad():
        statistics = objective.statistics(roles, [batch], toy.world())
        sums = [objective.loss(roles, one, {"loss": 3.0}, statistics) for one in (batch, batch_of(together()))]
    assert sums[0].terms["loss"] == pytest.approx(sums[1].terms["loss"])


@pytest.mark.parametrize("label", [True, False])
def test_a_step_of_one_kind_of_answers_works(label: bool) -> None:
    found = computed([batch_of(together([{**row, "label": label} for row in ROWS]))])
    assert math.isfinite(found["loss"]) and found["norm"] > 0
    there, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert f"rewards/{there}" in found and f"rewards/{absent}" not in found and "rewards/margins" not in found


def test_margins_are_the_difference_of_the_means() -> None:
    found = computed([batch_of(together())])
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"], rel=1e-5)


@pytest.mark.parametrize("unfolded", [False, True])
@pytest.mark.parametrize("part", [1, 2])
def test_a_branch_is_what_a_batch_of_these_answers_alone_would_be(unfolded: bool, part: int) -> None:
    samples = together()
    alone = batch_of(_alone(samples, part))
    found = branch(batch_of(samples, unfolded=unfolded), part)
    for name in ("tokens", "positions", "target", "predict_from"):
        assert torch.equal(getattr(found, name), getattr(alone, name)), name
    assert torch.equal(found.segments < 0, alone.segments < 0)
    packed = collate(samples, range(3), 0, rows=[2, 1])
    assert torch.equal(branch(packed, part).tokens, collate(_alone(samples, part), range(3), 0, rows=[2, 1]).tokens)


def _alone(samples: list[Sample], part: int) -> list[Sample]:
    return [Sample((one.segments[0], one.segments[part]), one.numbers) for one in samples]


@pytest.mark.parametrize("label", ["yes", None, 2, 0.5])
def test_a_row_with_another_label_is_refused(label: Any) -> None:
    with pytest.raises(ValueError, match="not true or false"):
        Kto(KtoSettings()).sample({**ROWS[0], "label": label}, ToyTokenizer(), 100)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "it has prompt, chosen, rejected: set data.format=unpaired"),
        ({"prompt": "q", "completion": "a", "score": 3}, "it has prompt, completion, score: .*data.threshold="),
        ({"prompt": "q", "answers": ["a", "b"]}, "it has prompt, answers: set data.answers=answers"),
    ],
)
def test_a_row_of_another_form_says_what_it_has_and_how_to_read_it(row: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"has no label, which objective=kto wants; {told}"):
        Kto(KtoSettings()).sample({**row, "origin": "rows.jsonl:1"}, ToyTokenizer(), 100)


def test_settings_that_say_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"variant=kta.*\n.*\n.*undesirable=-1") as refused:
        Kto(KtoSettings(variant="kta", undesirable=-1.0))
    assert "'kto'?" in str(refused.value)


def test_a_step_of_one_row_is_refused_before_the_run(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = [f"model.path={tiny_model}", "data=jsonl", f"data.path={data}", "objective=kto", "batch.size=1"]
    with pytest.raises(UserError, match="no answer to another prompt"):
        api.check(api.compose([*given, "sharding=single"]))
    assert not api.check(api.compose([*given, "sharding=single", "objective.variant=apo_zero_unpaired"]))


@pytest.fixture(scope="module")
def recorded() -> dict:
    if not (SHARED / "kto.json").is_file():
        pytest.skip(f"no recorded references in {SHARED}")
    return json.loads((SHARED / "kto.json").read_text())


def model(name: str) -> LlamaForCausalLM:
    config = json.loads((SHARED / "tiny_llama_config.json").read_text())
    config.pop("architecture")
    module = LlamaForCausalLM(LlamaConfig(**config))
    module.load_state_dict(load_file(SHARED / f"tiny_{name}.safetensors"))
    return module


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_loss_and_gradients_are_those_recorded(recorded: dict, name: str) -> None:
    case = next(case for case in recorded["cases"] if case["name"] == name)
    policy = model("policy")
    settings = {**case["args"], "entropy": True}
    found = loss_of("kto", settings, recorded["batch"], policy, model("reference"))
    assert found.loss == pytest.approx(case["loss"], rel=1e-4)
    norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(case["grad"]["global_l2"], rel=1e-3)
    for key in ("kl", "entropy", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
        assert found.metrics[key] == pytest.approx(case["metrics"][key], rel=1e-4), key


def test_weights_of_the_recorded_names_count(recorded: dict) -> None:
    def loss(**weights: float) -> float:
        return loss_of("kto", {"beta": 0.1, **weights}, recorded["batch"], model("policy"), model("reference")).loss

    wanted, unwanted = loss(undesirable_weight=0.0), loss(desirable_weight=0.0)
    assert loss(desirable_weight=2.0, undesirable_weight=0.5) == pytest.approx(2 * wanted + 0.5 * unwanted, rel=1e-5)
