"""Settings of preference objectives that would do nothing, or something else than what was typed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from loomtune import api
from loomtune.catalogue import installed
from loomtune.compose import compose
from loomtune.contracts import DistributionLoss
from loomtune.errors import UserError
from loomtune.plan import Finding
from loomtune.samples import of_run
from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.objectives import preflight
from support import write_rows


def made(objective: str, losses: tuple[str, ...] = (), **settings: object) -> Any:
    catalogue = installed()
    built = catalogue.build("objective", objective, settings)
    if losses:
        built.use({name: catalogue.build("loss", name, {}) for name in losses}, {})
    return built


@pytest.mark.parametrize("objective", ["sft", "pretrain", "reward", "dpo", "cpo", "simpo", "orpo", "kto"])
def test_a_misspelt_bos_is_refused(objective: str) -> None:
    with pytest.raises(UserError, match=r"objective\.bos=alwyas is not known.*'always'"):
        made(objective, bos="alwyas")


@pytest.mark.parametrize("objective", ["dpo", "cpo", "simpo", "orpo", "kto"])
@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_a_beta_that_prefers_nothing_is_refused(objective: str, beta: float) -> None:
    with pytest.raises(UserError, match=r"objective\.beta=.* prefers nothing"):
        made(objective, beta=beta)


def test_a_divergence_that_no_loss_looks_at_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"objective\.divergence=js_divergence has no effect with loss=\[apo_zero,sft\]"
    ):
        made("dpo", ("apo_zero", "sft"), divergence="js_divergence")
    made("dpo", ("apo_zero", "ipo"), divergence="js_divergence")


IDLE = [
    *[("dpo", "kl", key, value) for key, value in (("beta", 0.7), ("tail", 0.5), ("weighting", True))],
    *[("dpo", "sft", key, value) for key, value in (("beta", 0.7), ("tail", 0.5), ("reference", "live"))],
    ("dpo", "simpo", "reference", "stored"),
    ("cpo", "sft", "beta", 0.7),
    ("orpo", "odds_ratio", "likelihood", "answer"),
]


@pytest.mark.parametrize(("objective", "loss", "key", "value"), IDLE, ids=str)
def test_a_setting_that_no_chosen_loss_reads_is_refused(objective: str, loss: str, key: str, value: object) -> None:
    told = rf"objective\.{key}={str(value).lower()} has no effect with loss=\[{loss}\]"
    with pytest.raises(UserError, match=told) as error:
        made(objective, (loss,), **{key: value})
    assert f"objective.{key}" in error.value.faults[0].cure
    made(objective, (loss,))


@pytest.mark.parametrize(
    ("losses", "settings"),
    [
        (("kl", "sigmoid"), {"beta": 0.7, "tail": 0.5, "weighting": True}),
        (("sft",), {"weighting": True}),
        (("kl",), {"reference": "live"}),
        (("simpo", "sigmoid"), {"reference": "stored"}),
        (("apo_zero",), {"reference": "stored", "tail": 0.5}),
    ],
    ids=str,
)
def test_a_setting_that_one_of_the_losses_reads_is_taken(losses: tuple[str, ...], settings: dict[str, Any]) -> None:
    made("dpo", losses, **settings)


@pytest.mark.parametrize("loss", ["ipo", "sigmoid_norm", "simpo", "odds_ratio"])
def test_tokens_that_count_less_are_refused_where_all_of_them_divide(loss: str) -> None:
    with pytest.raises(UserError, match=rf"loss={loss} is of means over tokens, and objective\.tail=0\.5") as error:
        made("dpo", ("sigmoid", loss), tail=0.5)
    assert "objective.tail" in error.value.faults[0].cure


class Apart(DistributionLoss):
    """Says no more than it must."""

    def distance(self, policy: Tensor, reference: Tensor) -> Tensor:
        return (policy - reference).square().sum(-1)


def test_a_loss_of_distributions_needs_a_reference_without_saying_so() -> None:
    with pytest.raises(UserError, match="loss=apart compares with a reference"):
        made("cpo").use({"apart": Apart()}, {})


def test_prompts_are_learned_where_a_loss_of_tokens_reads_them() -> None:
    row = {"prompt": "a loom ", "chosen": "weaves", "rejected": "flies"}
    for losses, learned in ((("sft", "odds_ratio"), True), (("odds_ratio",), False)):
        sample = made("orpo", losses).sample(row, ToyTokenizer(), 100)
        assert bool(sample.segments[0].is_target.any()) is learned
        assert sample.segments[1].is_target.all()
    assert made("orpo", ("sft",)).fingerprint() != made("orpo", ("odds_ratio",)).fingerprint()


def test_a_runs_samples_learn_no_prompt_that_no_loss_reads(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOMTUNE_CACHE", str(tmp_path / "cache"))
    rows = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a loom ", "chosen": "weaves", "rejected": "flies"}])
    data = ["data=jsonl", f"data.path={rows}", f"model.path={tiny_model}", f"run.dir={tmp_path / 'run'}"]
    plan = api.compose([*data, "objective=orpo", "loss=[odds_ratio]", "steps=1"])
    api.check(plan)
    prompt, *_ = of_run(api.prepare(plan))["train"][0].segments
    assert not prompt.is_target.any()


def test_answers_none_of_which_counts_are_refused() -> None:
    with pytest.raises(UserError, match=r"objective\.desirable=0 and objective\.undesirable=0"):
        made("kto", desirable=0.0, undesirable=0.0)
    made("kto", desirable=0.0)


def test_losses_none_of_which_counts_are_refused() -> None:
    losses = {name: installed().build("loss", name, {"weight": 0.0}) for name in ("sigmoid", "sft")}
    with pytest.raises(UserError, match="every chosen loss has the weight 0"):
        made("cpo").use(losses, {})


def held(*settings: str) -> list[Finding]:
    plan = compose(["recipe=null", "data=jsonl", "data.path=rows.jsonl", *settings])
    return list(preflight(plan, {}))


def test_a_weight_below_0_is_refused_whoever_made_the_loss() -> None:
    (found,) = held("objective=dpo", "loss=[sigmoid,sft]", "loss.sft.weight=-0.5")
    assert found.fatal and "loss.sft.weight=-0.5 would unlearn" in found.what
    plan = compose(["recipe=null", "data=jsonl", "data.path=rows.jsonl", "objective=dpo"])
    foreign = replace(plan, settings={**plan.settings, "loss": {"theirs": {"name": "theirs", "weight": -1}}})
    assert [one.fatal for one in preflight(foreign, {})] == [True]


def test_a_weight_of_0_is_a_warning() -> None:
    (found,) = held("objective=dpo", "loss=[sigmoid,kl]", "loss.kl.weight=0")
    assert not found.fatal and "loss.kl.weight=0 learns nothing" in found.what
    assert held("objective=dpo", "loss=[sigmoid,kl]") == []


@pytest.mark.parametrize(
    ("chosen", "warned"),
    [
        (["objective=dpo"], True),
        (["objective=kto"], True),
        (["objective=sft", "loss=[kl]"], True),
        (["objective=sft"], False),
        (["objective=cpo"], False),
    ],
    ids=str,
)
def test_a_reference_without_what_training_begins_with_is_a_warning(chosen: list[str], warned: bool) -> None:
    found = held("adapter=lora", "adapter.path=saved", *chosen)
    assert [one.fatal for one in found] == [False] * warned
    assert all("adapter.path=saved" in one.what and "adapter.under=[saved]" in one.cure for one in found)
    assert held("adapter=lora", "adapter.under=[saved]", *chosen) == []


def test_a_loss_that_cannot_be_built_is_not_also_missed(mixed_data: Path, tiny_model: Path) -> None:
    data = ["data=jsonl", f"data.path={mixed_data}", f"model.path={tiny_model}"]
    plan = api.compose([*data, "objective=dpo", "loss=[kl]", "loss.kl.direction=sideways"])
    with pytest.raises(UserError) as error:
        api.check(plan)
    assert "direction=sideways" in str(error.value) and "no loss is chosen" not in str(error.value)
