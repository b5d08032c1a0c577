"""Hooks, axes, folders of plugins, groups of configs and documentation correspond one to one."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from loomtune import hookspecs
from loomtune.catalogue import BUILT_IN, installed
from loomtune.offers import AXES, Trait
from support import ROOT

GROUPS_WITHOUT_HOOK = {"recipe", "hardware"}
OF_NO_AXIS = {"config_sources", "commands"}
"""Hooks that take nothing and give what no run chooses."""

WITHOUT_HOOK = {"endpoint", "planner"}
"""Folders that offer nothing: what several axes share, and the linter sees that it imports none of them."""

SINGULAR = {"datas": "data"}
"""The one folder that is not called as its hook: data has no plural."""


def hooks() -> dict[str, Callable[..., Any]]:
    return {name: spec for name, spec in vars(hookspecs).items() if hasattr(spec, "loomtune_spec")}


def arguments(name: str) -> list[str]:
    return list(inspect.signature(hooks()[name]).parameters)


OFFERING = [axis.hook for axis in AXES]
DOCUMENTATION = (ROOT / "docs" / "plugins.md").read_text()


def test_every_axis_has_a_hook_and_every_other_hook_is_about_runs_or_configs() -> None:
    assert len(set(OFFERING)) == len(OFFERING) == len({axis.name for axis in AXES})
    others = set(hooks()) - set(OFFERING)
    assert set(OFFERING) < set(hooks())
    assert others - OF_NO_AXIS == {name for name in others if set(arguments(name)) & {"run", "plan", "folder"}}


@pytest.mark.parametrize("name", sorted(hooks()))
def test_a_hook_says_in_its_docstring_and_annotations_what_it_is(name: str) -> None:
    spec = hooks()[name]
    assert spec.__doc__ and spec.__doc__.strip().endswith((".", "`"))
    assert set(inspect.get_annotations(spec)) == {*arguments(name), "return"}


@pytest.mark.parametrize("name", sorted(hooks()))
def test_a_hook_and_each_of_its_arguments_are_documented(name: str) -> None:
    shown = ", ".join(arguments(name))
    written = f"`{name}({shown})`" if shown or name in OF_NO_AXIS else f"`{name}`"
    assert written in DOCUMENTATION, f"docs/plugins.md does not explain {written}"
    section = DOCUMENTATION[DOCUMENTATION.index(written) + len(written) :]
    in_table = DOCUMENTATION[: DOCUMENTATION.index(written)].endswith("| ")
    explained = section[: section.index("\n" if in_table else "\n\n#")]
    for argument in set(arguments(name)) - {"run"}:
        assert re.search(rf"\b{argument}\b", explained), f"{name} leaves {argument} unexplained"


@pytest.mark.parametrize("name", sorted(hooks()))
def test_a_hook_occurs_in_a_test_beside_this_one(name: str) -> None:
    mentions = re.compile(rf"\b{name}\b")
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "test_hookspecs.py"]
    assert any(mentions.search(path.read_text()) for path in tests), f"no test mentions the hook {name}"


def test_the_table_of_axes_in_the_documentation_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| ([\w ]+) \| `(\w+)`", DOCUMENTATION, re.MULTILINE)
    counts = {"exactly one": "one", "none or one": "none or one", "any number": "any number"}
    expected = [(axis.name, axis.hook, counts[axis.arity], axis.contract.partition(":")[2]) for axis in AXES]
    assert rows == expected


def test_the_checks_of_the_kit_are_documented() -> None:
    from loomtune import testing

    for check in testing.__all__:
        assert f"`{check}(" in DOCUMENTATION, f"docs/plugins.md does not explain {check}"


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.name)
def test_an_axis_names_a_contract_that_exists(axis: Any) -> None:
    module, _, name = axis.contract.partition(":")
    contract = getattr(import_module(module), name)
    assert inspect.isabstract(contract) or all(map(inspect.isabstract, contract.__subclasses__())), "its kinds are"
    assert name in import_module("loomtune.contracts").__all__


def folders() -> set[str]:
    plugins = ROOT / "plugins" / "loomtune_plugins"
    found = {path.name for path in plugins.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    found -= WITHOUT_HOOK
    return found | {"launchers"} if (ROOT / "launchers" / "loomtune_launchers").is_dir() else found


def test_folders_of_plugins_are_called_as_hooks() -> None:
    called = {SINGULAR.get(hook, hook) for hook in OFFERING} | {"commands"}
    assert folders() <= called, f"no hook for {folders() - called}"
    built_in = {name.rpartition(".")[2].replace("loomtune_launchers", "launchers") for name in BUILT_IN}
    assert built_in == folders(), "every folder is a plugin, and every built-in plugin a folder"


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_plugin_offers_on_its_own_axis_only(name: str) -> None:
    plugin = import_module(name)
    implemented = {hook for hook in hooks() if getattr(getattr(plugin, hook, None), "loomtune_impl", None)}
    folder = name.rpartition(".")[2].replace("loomtune_launchers", "launchers")
    assert {SINGULAR.get(hook, hook) for hook in implemented & {*OFFERING, "commands"}} == {folder}


def test_axes_with_offers_have_a_folder_and_the_others_have_none() -> None:
    with_offers = {entry.axis.hook for entry in installed().entries() if entry.source.distribution == "loomtune"}
    assert {SINGULAR.get(hook, hook) for hook in with_offers} | {"commands"} == folders()


def test_groups_of_configs_are_called_as_axes() -> None:
    conf = ROOT / "conf" / "loomtune_conf"
    groups = {path.name for path in conf.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert groups <= {axis.name for axis in AXES} | GROUPS_WITHOUT_HOOK
    defaults = (conf / "config.yaml").read_text()
    for axis in AXES:
        assert re.search(rf"^  - {axis.name}: ", defaults, re.MULTILINE), f"config.yaml does not choose a {axis.name}"


def test_a_named_choice_does_not_bear_the_name_of_an_offer() -> None:
    conf = ROOT / "conf" / "loomtune_conf"
    for axis in AXES:
        named = {path.stem for path in (conf / axis.name).glob("*.yaml")}
        assert not named & set(installed().names(axis.name)), "a config of an offer's name would hide its schema"


def test_every_trait_that_is_needed_is_provided_by_some_offer() -> None:
    entries = list(installed().entries())
    provided = {trait for entry in entries for trait in entry.offer.provides}
    for entry in entries:
        assert entry.offer.needs <= provided, f"{entry.offer.name} can never be chosen"
    assert provided <= set(Trait), "built-ins use the vocabulary"


def test_hookspecs_imports_nothing_at_run_time_but_pluggy() -> None:
    tree = ast.parse((ROOT / "core" / "loomtune" / "hookspecs.py").read_text())
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "collections.abc", "pathlib", "typing", "pluggy"}
