"""The frozen plan: it survives its file, its hash is of the maths alone, and its findings are told together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from loomtune import api, extras, hookimpl
from loomtune.catalogue import BUILT_IN, Catalogue, Source, installed
from loomtune.compose import compose
from loomtune.errors import UserError
from loomtune.offers import Offer
from loomtune.plan import Estimate, Finding, Plan, between, estimates, findings, refuse
from loomtune.settings import ROOT_KEYS
from loomtune.testing import toy
from loomtune.worker import execute
from support import signals_kept

AWKWARD = "a b'c\"d; $(rm -rf /) `x` \\ é\n# not a comment: - 1e3"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return compose([])


def changed(plan: Plan, key: str, value: Any) -> Plan:
    settings = copy.deepcopy(dict(plan.settings))
    *parents, leaf = key.split(".")
    node: Any = settings
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    return replace(plan, settings=settings)


def test_run_yaml_brings_back_the_same_plan(plan: Plan) -> None:
    kept = changed(changed(plan, "run.name", AWKWARD), "optimizer.lr", 1e-05)
    again = Plan.parse(kept.dump())
    assert again == kept
    assert again.hash == kept.hash
    assert again.root.run.name == AWKWARD
    assert again.dump() == kept.dump()


def test_run_yaml_holds_no_objects_and_names_every_plugin(plan: Plan) -> None:
    text = plan.dump()
    assert "!!" not in text
    assert set(yaml.safe_load(text)["plugins"]) >= set(BUILT_IN)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.lr", 0.5),
        ("seed", 1),
        ("batch.size", 7),
        ("steps", 299),
        ("precision", "bf16"),
        ("schedule.floor", 0.5),
        ("objective.train_on", "all"),
        ("data.seed", 3),
        ("max_length", 17),
        ("evaluate.every", 3),
    ],
)
def test_the_hash_changes_with_what_decides_the_maths(plan: Plan, key: str, value: Any) -> None:
    assert changed(plan, key, value).hash != plan.hash


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("launcher.procs", 8),
        ("sharding", {"name": "fsdp"}),
        ("stop_after", 5),
        ("tracker", {}),
        ("guard", {}),
        ("checkpoint.every", 3),
        ("batch.micro", 1),
        ("run.dir", "elsewhere"),
        ("exporter", {"huggingface": {"name": "huggingface"}}),
    ],
)
def test_the_hash_leaves_out_what_is_only_how(plan: Plan, key: str, value: Any) -> None:
    assert changed(plan, key, value).hash == plan.hash


def test_an_edited_run_yaml_is_refused(plan: Plan) -> None:
    with pytest.raises(UserError, match="it was edited"):
        Plan.parse(plan.dump().replace("precision: fp32", "precision: bf16"))


@pytest.mark.parametrize(
    "text", ["", "[]", "format: 99", "format: 1", "{", "format: 1\nhash: x\noverrides: 3\nsettings: {}\n"]
)
def test_a_file_that_is_no_run_yaml_is_refused_in_words(text: str) -> None:
    with pytest.raises(UserError, match=r"run\.yaml"):
        Plan.parse(text)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no run\.yaml"):
        Plan.load(tmp_path)


@pytest.fixture(scope="module")
def own() -> Plan:
    """Without the default recipe."""
    return compose(["recipe=null"])


def faults(plan: Plan, *overrides: str) -> list[str]:
    for override in overrides:
        key, _, value = override.partition("=")
        plan = changed(plan, key, yaml.safe_load(value))
    return [finding.what for finding in findings(plan, installed()) if finding.fatal]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("batch.size=0", "batch.size=0 is less than 1"),
        ("steps=-1", "steps=-1 is less than 0"),
        ("stop_after=-1", "stop_after=-1 is less than 0"),
        ("max_length=-1", "max_length=-1 is less than 0"),
        ("checkpoint.every=-1", "checkpoint.every=-1 is less than 0"),
        ("checkpoint.keep=0", "checkpoint.keep=0 is less than 1"),
        ("evaluate.rows=-1", "evaluate.rows=-1 is less than 0"),
        ("batch.micro=9", "batch.micro=9 does not lie between 1 and batch.size=8"),
        ("batch.micro=0", "batch.micro=0 does not lie between 1 and batch.size=8"),
        ("batch.micro=some", "batch.micro=some is neither a number nor `auto`"),
        ("epochs=nan", "epochs=nan: nothing would be trained, or without end"),
        ("guard.stall.seconds=.nan", "guard.stall.seconds=nan is no number"),
        ("epochs=inf", "epochs=inf: nothing would be trained, or without end"),
        ("epochs=0", "epochs=0.0: nothing would be trained, or without end"),
        ("precision=fp16", "precision=fp16 is unknown"),
        ("evaluate.mode=best", "evaluate.mode=best is unknown"),
        ("evaluate.every=2", "evaluations are asked for, but no evaluator is chosen"),
    ],
)
def test_a_root_setting_that_makes_no_sense_is_a_fault(own: Plan, override: str, what: str) -> None:
    assert faults(own, override) == [what]


def test_patience_without_a_metric_is_a_fault(own: Plan) -> None:
    assert faults(own, "evaluate.patience=2") == ["evaluate.patience is set, but no metric decides"]


def test_a_run_has_one_kernel(own: Plan) -> None:
    assert faults(own, "kernel=[]") == ["kernel=[]: a run attends by one"]


def test_every_fault_is_told_at_once_with_its_cure() -> None:
    plan = compose(
        ["recipe=null", "batch.size=2", "batch.micro=3", "precision=fp8", "tracker=[report]", "rollout=null"]
    )
    with pytest.raises(UserError) as caught:
        refuse(findings(plan, installed()))
    told = [fault.what.split()[0] for fault in caught.value.faults]
    assert told == ["precision=fp8", "batch.micro=3", "tracker=report"]
    assert all(fault.cure for fault in caught.value.faults)


def test_a_need_that_nothing_chosen_provides_is_a_fault_that_says_how_to_find_it() -> None:
    plan = compose(["rollout=null"])
    (fault,) = [finding for finding in findings(plan, installed()) if finding.fatal]
    assert fault.what == "evaluator=sql_accuracy needs `generation`, which nothing chosen provides"
    assert fault.cure == "`loomtune plugins --trait generation` lists what provides it"


def test_warnings_do_not_refuse() -> None:
    doubt = Finding("odd", "look", fatal=False)
    assert refuse([doubt]) == [doubt]


def catalogue(**hooks: Any) -> Catalogue:
    """A catalogue of two third parties, of which the first answers some hooks and the second always fails."""

    def failing(plan: Plan) -> Sequence[Any]:
        raise ZeroDivisionError

    first = SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})
    second = SimpleNamespace(preflight=hookimpl(failing), estimate=hookimpl(failing))
    return Catalogue(
        [(Source("first", "loomtune-first", "1"), first), (Source("second", "loomtune-second", "1"), second)]
    )


@pytest.fixture
def bare(plan: Plan) -> Plan:
    """Root settings alone, because the catalogue of this test has nothing to choose."""
    return Plan({key: plan.settings[key] for key in ROOT_KEYS if key in plan.settings}, {})


def test_preflight_hooks_add_findings_and_a_failing_one_takes_none_away(bare: Plan) -> None:
    asked = []

    def preflight(plan: Plan) -> list[Finding]:
        asked.append(plan)
        return [Finding("too small", "buy more")]

    found = {finding.what: finding.fatal for finding in findings(bare, catalogue(preflight=preflight))}
    assert asked == [bare]
    assert found["too small"] is True
    assert found["a check before the run is left out: the plugin second failed: ZeroDivisionError: "] is False


def test_a_failing_check_of_what_is_chosen_refuses_the_run(bare: Plan) -> None:
    def preflight(plan: Plan) -> list[Finding]:
        raise ZeroDivisionError("no ranks")

    (fault,) = held(bare, [PLAIN], weaving("loom"), preflight=preflight)
    assert fault.what == "a check before the run is left out: the plugin first failed: ZeroDivisionError: no ranks"
    assert fault.cure.startswith("mend first")


@dataclass
class Nothing:
    """Nothing to set."""


def weaving(name: str, **said: Any) -> Offer[Any]:
    return Offer(name=name, build="nowhere:Nothing", schema=Nothing, summary="weaves", **said)


def held(bare: Plan, adapters: Sequence[Offer[Any]], sharding: Offer[Any], **hooks: Any) -> list[Finding]:
    """What is held across axes against a run of the first of these adapters and a sharding."""
    chosen = {"adapter": {"name": adapters[0].name}, "sharding": {"name": sharding.name}}
    plan = Plan({**bare.settings, **chosen}, {})
    offered = catalogue(adapters=lambda: adapters, shardings=lambda: [sharding], **hooks)
    return [finding for finding in between(plan, offered) if finding.fatal]


WOVEN, PLAIN = weaving("woven", provides=frozenset({"acme:woven"})), weaving("plain")


def test_what_a_choice_excludes_is_refused_with_the_reason_and_what_to_choose_instead(bare: Plan) -> None:
    loom = weaving("loom", excludes={"acme:woven": "it weaves itself"})
    (fault,) = held(bare, [WOVEN, PLAIN], loom)
    assert fault.what == "sharding=loom does not go with adapter=woven: it weaves itself"
    assert fault.cure == "choose adapter=plain or another sharding"
    assert not held(bare, [PLAIN, WOVEN], loom)


def test_a_need_of_a_third_party_is_met_by_its_own_vocabulary(bare: Plan) -> None:
    loom = weaving("loom", needs=frozenset({"acme:woven"}))
    assert not held(bare, [WOVEN], loom)
    (fault,) = held(bare, [PLAIN], loom)
    assert fault.what == "sharding=loom needs `acme:woven`, which nothing chosen provides"


def test_a_choice_may_exclude_what_it_provides_itself(bare: Plan) -> None:
    alone = weaving("alone", provides=frozenset({"acme:x"}), excludes={"acme:x": "there can be one"})
    assert not held(bare, [PLAIN], alone)
    assert len(held(bare, [weaving("too", provides=frozenset({"acme:x"}))], alone)) == 1


def test_preflight_hooks_are_told_who_provides_a_trait(bare: Plan) -> None:
    told = []

    def preflight(provided: Mapping[str, str]) -> list[Finding]:
        told.append(provided)
        return []

    held(bare, [WOVEN], weaving("loom"), preflight=preflight)
    assert told == [{"acme:woven": "adapter=woven"}]


def test_a_choice_whose_libraries_are_missing_names_the_extra(bare: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {("loomtune-first", "fast"): ("warp>=2, which is not installed",)}
    monkeypatch.setattr(extras, "lacking", lambda *asked: lacking.get(asked, ()))
    (fault,) = held(bare, [weaving("woven", extra="fast")], weaving("loom", extra="other"))
    assert fault == Finding(
        "adapter=woven needs warp>=2, which is not installed",
        "pip install 'loomtune-first[fast]'",
        extra="loomtune-first[fast]",
    )


def test_every_axis_of_one_must_be_chosen(bare: Plan) -> None:
    missing = [finding.what for finding in findings(bare, catalogue()) if finding.what.endswith("is chosen")]
    assert missing[:2] == ["no model is chosen", "no data is chosen"]
    assert len(missing) == 8


def test_estimates_come_from_plugins_and_a_failing_one_takes_none_away(bare: Plan) -> None:
    amount = Estimate("memory of a rank", 2e9, "bytes", "weights in fp32")
    assert estimates(bare, catalogue(estimate=lambda: [amount])) == [amount]


ROWS = '{"prompt": "a", "completion": "b"}\n' * 4


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> list[str]:
    """Settings of a small run with a folder of its own."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    data = ["data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}", f"model.path={tiny_model}"]
    return [*data, f"run.dir={tmp_path / 'run'}", "optimizer.lr=1e-3"]


def test_the_folder_of_another_run_is_refused_naming_what_differs(run: list[str]) -> None:
    api.prepare(api.compose(run))
    other = [*(text for text in run if "lr" not in text), "optimizer.lr=2e-3", "seed=4", "launcher.procs=1"]
    with pytest.raises(UserError, match="holds another run") as caught:
        api.prepare(api.compose(other))
    assert "optimizer.lr (0.001 -> 0.002)" in str(caught.value)
    assert "seed (0 -> 4)" in str(caught.value)
    assert "launcher.procs" not in caught.value.faults[0].what


def test_the_same_run_may_go_on_in_its_folder_in_another_manner(run: list[str]) -> None:
    folder = api.prepare(api.compose(run))
    again = api.prepare(api.compose([*run, "sharding=single", "launcher.procs=1", "tracker=[jsonl]", "stop_after=1"]))
    assert again == folder
    assert Plan.load(folder).root.stop_after == 1


NEW = ("batch.sampler", "data.max_growth", "data.max_record", "data.stream", "data.window", "objective.system")
"""Settings that a version before did not have."""


def older(plan: Plan, *keys: str) -> Plan:
    """The plan as a version without these settings composed it."""
    for key in keys:
        node, _, leaf = key.rpartition(".")
        less = {name: value for name, value in plan.settings[node].items() if name != leaf}
        plan = replace(plan, settings={**plan.settings, node: less})
    return plan


def test_a_run_of_a_version_before_goes_on_though_settings_were_added(run: list[str]) -> None:
    plan = api.compose([*run, "sharding=single", "steps=2", "stop_after=1"])
    folder, before = api.prepare(plan), older(plan, *NEW)
    assert before.hash != plan.hash
    (folder / "run.yaml").write_text(before.dump())
    with signals_kept():
        assert execute(Plan.load(folder), folder, toy.world())["step"] == 1
    api.prepare(api.resumed(folder, ["steps=2"]))
    assert Plan.load(folder).hash == before.hash, "that of its checkpoints"
    with signals_kept():
        result = execute(Plan.load(folder), folder, toy.world())
    assert (result["status"], result["step"]) == ("completed", 2)
    with pytest.raises(UserError, match="an export of other maths: seed"):
        api.export(folder, overrides=["seed=1"])


@pytest.mark.parametrize("setting", ["batch.sampler=sequential", "data.max_record=999999"])
def test_an_added_setting_that_is_given_a_value_is_another_run_and_told_alone(run: list[str], setting: str) -> None:
    folder = api.prepare(api.compose(run))
    (folder / "run.yaml").write_text(older(Plan.load(folder), *NEW).dump())
    key, _, value = setting.partition("=")
    with pytest.raises(UserError) as caught:
        api.prepare(api.compose([*run, setting]))
    assert caught.value.faults[0].what.endswith(f"these settings differ: {key} (None -> {value})")


def test_settings_of_another_choice_are_told_as_what_they_are(run: list[str]) -> None:
    before = api.compose(run)
    other = api.compose([*run, "objective=dpo"])
    assert other.as_begun(before, installed()) == other, "nothing of dpo counts as added to sft"
    nested = replace(before, settings={**before.settings, "evaluate": {"every": 0}})
    assert before.as_begun(nested, installed()).hash == nested.hash


def test_how_rollouts_are_computed_is_no_part_of_the_maths_and_how_far_ahead_is(run: list[str]) -> None:
    plan = api.compose([*run, "rollout=huggingface"])
    for key in ("rollout.batch", "rollout.ranks"):
        assert key in plan.how
        assert changed(plan, key, 3).hash == plan.hash
    assert changed(plan, "rollout.ahead", 1).hash != plan.hash
    assert Plan.parse(plan.dump()) == plan
