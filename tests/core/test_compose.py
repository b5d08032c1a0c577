"""What the user typed becomes a plan, or every mistake in it is told at once, each with its cure."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from loomtune.compose import compose, explain, quoted
from loomtune.compose.requests import Requests
from loomtune.errors import UserError
from loomtune.plan import Plan


def refused(*overrides: str, config_dirs: tuple[Path, ...] = ()) -> UserError:
    with pytest.raises(UserError) as caught:
        compose(overrides, [str(folder) for folder in config_dirs])
    return caught.value


MISTAKES = [
    ("optimiser.lr=1", "no setting 'optimiser.lr'. Did you mean 'optimizer.lr'?", "--dry-run"),
    ("adapter=lora adapter.rnak=8", "Did you mean 'adapter.rank'?", "adapter.rank, adapter.alpha"),
    ("adapter.rnak=8", "Did you mean 'adapter.rank'?", "choose adapter=lora or adapter=qlora and set adapter.rank"),
    ("adapter.rank=8", "adapter.rank is not a setting of what is chosen for adapter", "choose adapter=lora"),
    ("tracker.wandb.project=x", "not a setting of what is chosen for tracker", "choose tracker=[...,wandb]"),
    ("tracker.wandbb.project=x", "Did you mean 'tracker.wandb.project'?", "choose tracker=[...,wandb]"),
    ("tracker.console.evry=1", "Did you mean 'tracker.console.every'?", "tracker.console.every"),
    ("loss.sigmoid.weight=1", "not a setting of what is chosen for loss", "choose loss=[...,sigmoid]"),
    ("roles.teacher.model.pth=x", "Did you mean 'path'?", "there are: path"),
    ("role.teacher.model.path=x", "there is no setting 'role.teacher.model.path'", ""),
    ("objective=sftt", "no objective is called 'sftt'. Did you mean 'sft'?", "choose one of: "),
    ("tracker=[jsonl,wandbb]", "no tracker is called 'wandbb'. Did you mean 'wandb'?", "console"),
    ("recipe=nope", "no recipe is called 'nope'", "sql_quiz"),
    ("objective=[sft]", "a run has one objective, not a list", "set objective=<one name>"),
    ("tracker=[jsonl,jsonl]", "names a choice twice", "once"),
    ("optimizer=null", "a run needs one optimizer", "adamw"),
    ("optimizer.name=sgd", "optimizer.name names the choice itself", "set optimizer=sgd"),
    ("tracker.console.name=x", "tracker.console.name names the choice itself", ""),
    ("steps=many", "Value 'many' of type 'str' could not be converted to Integer", "steps is int: optimizer steps"),
    ("steps=1.5", "could not be converted to Integer", "steps is int"),
    ("steps=true", "could not be converted to Integer", "steps is int"),
    ("steps=", "could not be converted to Integer", "steps is int"),
    ("steps=null", "steps", "steps is int"),
    ("optimizer.lr=fast", "could not be converted to Float", "optimizer.lr is float: peak learning rate"),
    ("launcher.procs=[1]", "incompatible with type hint", "launcher.procs is Union[int, str]"),
    ("launcher.environment.A={b:1}", "launcher.environment.A", ""),
    ("adapter=lora adapter.targets=all-linear", "is not a ListConfig", "write a list, adapter.targets=[all-linear]"),
    ("batch={sizee:4}", "Key 'sizee' not in 'BatchSettings'", "the settings size, "),
    ("batch=4", "batch=4", "the settings size, "),
    ("steps=???", "steps has no value", "set steps=<value>"),
    ("steps", "'steps' cannot be read", "write steps=<value>"),
    ("run.name=(x", "cannot be read", """'run.name="(x"'"""),
    ("run.name=a,b", "'run.name=a,b' asks for several runs", """'run.name="a,b"'"""),
    ("objective=sft,dpo", "'objective=sft,dpo' asks for several runs", "start a run for each"),
    ("tracker=jsonl,console", "asks for several runs", "write tracker=[a,b] for several at once"),
    ("steps=range(1,3)", "asks for several runs", "start a run for each"),
    ("~optimizer", "'~optimizer' takes a key away", "set optimizer=null"),
    ("~tracker", "'~tracker' takes a key away", "set tracker=[]"),
    ("adapter@extra=lora", "moves a config to another place", "write adapter=<name>"),
    ("+foo=1", "there is no setting 'foo'", "--dry-run"),
    ("++foo.bar=1", "there is no setting 'foo.bar'", "--dry-run"),
    ("hydra.run.dir=x", "there is no setting 'hydra.run.dir'", ""),
    ("hydra.searchpath=[/tmp]", "there is no setting 'hydra.searchpath'", ""),
    ("hydra/launcher=basic", "there is no setting 'hydra/launcher'", ""),
    ("steps=1 steps=2", "'steps=1' and 'steps=2' set the same key", "leave one of them out"),
    ("_target_=os.system", "there is no setting '_target_'", ""),
    ("model._target_=os.system", "there is no setting 'model._target_'", ""),
    ("model=random model.shape._target_=os.system", "a config names offers, never code", "remove it"),
    ("run.name=${oc.env:HOME}", "run.name calls the resolver 'oc.env'", "write the value itself"),
    ('run.name="${oc.decode:${run.dir}}"', "run.name calls the resolver 'oc.decode'", "write the value itself"),
    ('run.name="a${now:%Y}b"', "run.name calls the resolver 'now'", "write the value itself"),
    ("tracker=[wandb] tracker.wandb.tags=[${oc.env:HOME}]", "tracker.wandb.tags calls the resolver 'oc.env'", ""),
    ("steps=${nowhere}", "steps=${nowhere} cannot be resolved", "refer to a setting that has a value"),
    ("steps=${run.name}", "cannot be resolved", ""),
    ("run.dir=${run.name} run.name=${run.dir}", "Recursive interpolation", ""),
]


@pytest.mark.parametrize(("typed", "what", "cure"), MISTAKES, ids=[typed for typed, _, _ in MISTAKES])
def test_a_mistake_is_told_with_its_cure(typed: str, what: str, cure: str) -> None:
    overrides = shlex.split(typed) if "'" in typed else typed.split(" ")
    faults = refused(*overrides).faults
    assert any(what in fault.what and cure in fault.cure for fault in faults), "\n".join(map(str, faults))
    assert all(fault.cure for fault in faults)


def test_all_mistakes_are_told_at_once() -> None:
    faults = refused(
        "stepz=1", "objective=foo", "optimizer.lr=fast", "run.name=a,b", "~tracker", "adapter.rank=2"
    ).faults
    told = " ".join(fault.what for fault in faults)
    for part in ("'stepz'", "'foo'", "optimizer.lr=fast", "several runs", "~tracker", "adapter.rank"):
        assert part in told
    assert len(faults) == 6


def test_settings_of_an_unknown_choice_are_not_also_called_wrong() -> None:
    (fault,) = refused("objective=foo", "objective.beta=0.1").faults
    assert "no objective is called 'foo'" in fault.what


def test_what_a_recipe_says_of_a_choice_goes_with_that_choice(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    said = "optimizer: {beta1: 0.8, lr: 0.5}\ntracker: {jsonl: {}, wandb: {project: mine}}\n"
    text = f"# @package _global_\ndefaults:\n  - override /tracker: [jsonl, wandb]\n{said}"
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    for same in ([], ["optimizer=adamw"]):
        assert compose(["recipe=mine", *same], [str(tmp_path)]).chosen("optimizer")["beta1"] == 0.8
    other = compose(["recipe=mine", "optimizer=sgd", "tracker=[console,wandb]"], [str(tmp_path)])
    assert other.chosen("optimizer") == compose(["recipe=null", "optimizer=sgd"]).chosen("optimizer")
    assert other.choices("tracker")["wandb"]["project"] == "mine" and "jsonl" not in other.choices("tracker")


def test_a_recipe_whose_settings_its_own_choice_lacks_is_refused_naming_the_key(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /optimizer: sgd\noptimizer:\n  beta1: 0.8\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    (fault,) = refused("recipe=mine", config_dirs=(tmp_path,)).faults
    assert "beta1" in fault.what


@pytest.mark.parametrize(
    ("path", "text", "what"),
    [
        ("recipe/mine.yaml", "# @package _global_\nstepz: 3\n", "stepz"),
        ("recipe/mine.yaml", "# @package _global_\nbatch: {sizee: 3}\n", "sizee"),
        ("recipe/mine.yaml", "# @package _global_\nsteps: many\n", "many"),
        ("recipe/mine.yaml", "# @package _global_\ndefaults:\n  - override /objective: nope\n", "nope"),
        ("recipe/mine.yaml", "# @package _global_\nrun: {name: '${oc.env:HOME}'}\n", "resolver 'oc.env'"),
        ("recipe/mine.yaml", "steps: [1\n", "mine.yaml cannot be read"),
        ("recipe/mine.yaml", "a: &a [1]\nb: [*a, *a]\n", "uses YAML aliases"),
        ("optimizer/mine.yaml", "lr: 3\n", "does not say which optimizer it sets"),
        ("optimizer/mine.yaml", "name: adamw\nlrr: 3\n", "lrr"),
        ("optimizer/mine.yaml", "defaults: [adamw, _self_]\nlrr: 3\n", "lrr"),
        ("model/mine.yaml", "defaults: [random, _self_]\nshape: {_target_: os.system}\n", "never code"),
    ],
)
def test_a_config_of_the_users_own_is_as_strict_as_the_command_line(
    tmp_path: Path, path: str, text: str, what: str
) -> None:
    file = tmp_path / path
    file.parent.mkdir()
    file.write_text(text)
    error = refused(f"{file.parent.name}=mine", config_dirs=(tmp_path,))
    assert what in str(error)
    assert all(fault.cure for fault in error.faults)


def test_a_config_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (fault,) = refused(config_dirs=(tmp_path / "confs",)).faults
    assert fault.what == f"there is no folder {tmp_path / 'confs'}"


def test_a_config_folder_brings_choices_whatever_it_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "my, [odd] 'folder'"
    (folder / "optimizer").mkdir(parents=True)
    (folder / "optimizer" / "gentle.yaml").write_text("defaults: [adamw, _self_]\nlr: 1e-7\n")
    plan = compose(["optimizer=gentle"], [str(folder)])
    assert plan.chosen("optimizer")["name"] == "adamw"
    assert plan.config_dirs == (str(folder),)
    recipe_wins = compose(["optimizer=gentle", "recipe=null"], [str(folder)])
    assert recipe_wins.chosen("optimizer")["lr"] == 1e-7


AWKWARD = [
    "a b",
    "$(touch pwned); `x` | y & z > w",
    "it's",
    'say "hi"',
    "back\\slash",
    "ends with \\",
    "\\'\\\\'",
    "two\nlines",
    "a=b,c={d: e}",
    "*?[x]~#!",
    "é 漢字",
    "null",
    "1e3",
    "",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_a_quoted_value_arrives_as_it_is(text: str) -> None:
    plan = compose([f"run.name={quoted(text)}"])
    assert plan.root.run.name == text
    assert Plan.parse(plan.dump()).root.run.name == text


def test_the_cure_for_a_value_that_cannot_be_read_works() -> None:
    (fault,) = refused("data.path=/tmp/rows (1).jsonl", "data=jsonl").faults
    (cured,) = shlex.split(fault.cure.partition(": ")[2])
    assert compose([cured, "data=jsonl"]).chosen("data")["path"] == "/tmp/rows (1).jsonl"


def test_references_are_resolved() -> None:
    plan = compose(["batch.size=6", "launcher.threads=${batch.size}", "run.name=${objective.name}-of-${batch.size}"])
    assert plan.chosen("launcher")["threads"] == 6
    assert plan.root.run.name == "sft-of-6"


def test_a_mapping_takes_keys_of_the_users_own_with_or_without_a_plus() -> None:
    plan = compose(
        ["launcher.environment.A=1", "+launcher.environment.B=x", "model=random", "model.shape.model_type=llama"]
    )
    assert plan.chosen("launcher")["environment"] == {"A": "1", "B": "x"}
    assert plan.chosen("model")["shape"] == {"model_type": "llama"}


def test_lists_choose_many_null_and_the_empty_list_choose_none() -> None:
    plan = compose(["tracker=[jsonl,wandb]", "tracker.wandb.project=x", "guard=[]", "evaluator=null", "rollout=null"])
    assert list(plan.choices("tracker")) == ["jsonl", "wandb"]
    assert plan.choices("tracker")["wandb"]["project"] == "x"
    assert not plan.choices("guard") and not plan.choices("evaluator") and not plan.choices("rollout")
    assert list(compose(["tracker=jsonl"]).choices("tracker")) == ["jsonl"]


def test_the_default_recipe_runs_only_where_no_data_of_ones_own_are_named() -> None:
    default = compose([])
    name = default.chosen("data")["name"]
    assert default.root.steps and default.settings == compose([f"recipe={name}"]).settings
    own = compose(["data=jsonl"])
    assert own.root.steps == 0 and not own.choices("evaluator")
    assert compose(["recipe=null"]).root.steps == 0


@pytest.mark.parametrize(
    ("typed", "recipe"),
    [
        ("steps=3", "mine"),
        ("data=mine", "mine"),
        ("data=other", None),
        ("recipe=other", "other"),
        ("recipe=null", "null"),
    ],
)
def test_the_default_recipe_is_the_one_that_is_called_as_the_default_data(typed: str, recipe: str | None) -> None:
    assert Requests.read([typed], default="mine").chosen().get("recipe") == recipe
    assert ("recipe" in Requests.read([typed], default="").chosen()) == typed.startswith("recipe=")


def test_default_data_that_cannot_be_read_are_refused_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{compose([]).chosen('data')['name']}.yaml").write_text("defaults: [nope, _self_]\n")
    (fault,) = refused(config_dirs=(tmp_path,)).faults
    assert "data/nope" in fault.what


def test_the_command_line_wins_over_a_recipe() -> None:
    plan = compose(["sharding=single", "optimizer.lr=0.25", "steps=7"])
    assert plan.chosen("sharding")["name"] == "single"
    assert plan.chosen("optimizer")["lr"] == 0.25
    assert plan.root.steps == 7


def test_every_value_says_where_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "gentle.yaml").write_text("defaults: [adamw, _self_]\neps: 1e-7\n")
    overrides = ["optimizer=gentle", "seed=0", "batch={size: 5}", "tracker=[jsonl,wandb]", "launcher.environment.A=b"]
    origin = {key: (value, source) for key, value, source in explain(overrides, [str(tmp_path)])}
    assert origin["seed"] == (0, "command line"), "typed, even as the default is"
    assert origin["batch.size"] == (5, "command line")
    assert origin["batch.micro"] == ("auto", "default")
    assert origin["steps"][1] == "recipe=sql_quiz"
    assert origin["data.train"][1] == "recipe=sql_quiz"
    assert origin["optimizer.lr"][1] == "default", "the recipe's rate is another choice's"
    assert origin["optimizer.eps"] == (1e-7, "optimizer=gentle")
    assert origin["optimizer.clip"][1] == "default"
    assert origin["optimizer.name"] == ("adamw", "command line")
    assert origin["sharding.name"] == ("ddp", "recipe=sql_quiz")
    assert origin["objective.name"] == ("sft", "config.yaml")
    assert origin["tracker.wandb.name"] == ("wandb", "command line")
    assert origin["guard.finite.name"] == ("finite", "config.yaml")
    assert origin["launcher.environment.A"] == ("b", "command line")
    assert set(origin) == {key for key, _, _ in explain(overrides, [str(tmp_path)])}


def test_composing_leaves_no_trace_in_the_process() -> None:
    from hydra.core.global_hydra import GlobalHydra

    first = compose(["tracker=[jsonl]"])
    refused("objective=nope")
    assert compose(["tracker=[jsonl]"]) == first
    assert not GlobalHydra.instance().is_initialized()
