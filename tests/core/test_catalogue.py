"""What plugins offer is found, checked and looked up; what does not fit is named, never half admitted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loomtune import catalogue as catalogues
from loomtune import hookimpl
from loomtune.catalogue import BUILT_IN, Catalogue, Source, installed
from loomtune.contracts import Schedule, Tracker
from loomtune.errors import UserError
from loomtune.offers import AXES, Offer


@dataclass
class Plain:
    """Nothing to set."""


class Half(Schedule):
    """A schedule for the offers below."""

    def __init__(self, settings: Plain) -> None:
        self.settings = settings

    def factor(self, step: int, steps: int) -> float:
        return 0.5


class Unfinished(Tracker):
    """Lacks `describe`."""


HERE = "catalogue_fixture"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module by whose name the offers' classes can be imported."""
    monkeypatch.setitem(sys.modules, HERE, SimpleNamespace(Half=Half, Unfinished=Unfinished, number=3))  # type: ignore[arg-type]


def offer(name: str = "half", **changes: Any) -> Offer[Any]:
    return Offer(**{"name": name, "build": f"{HERE}:Half", "schema": Plain, "summary": "halves", **changes})


def plugin(*offers: Any, hook: str = "schedules", **hooks: Callable[..., Any]) -> Any:
    """A plugin that offers on one axis."""

    def offering() -> Sequence[Any]:
        return offers

    offering.__name__ = hook
    own = {hook: hookimpl(offering), **{name: hookimpl(function) for name, function in hooks.items()}}
    return SimpleNamespace(**own)


def source(name: str = "acme", distribution: str = "loomtune-acme", version: str = "1.2") -> Source:
    return Source(name, distribution, version)


def test_a_chosen_offer_is_built_from_its_settings() -> None:
    catalogue = Catalogue([(source(), plugin(offer()))])
    assert catalogue.names("schedule") == ["half"]
    assert catalogue.build("schedule", "half", {}).factor(1, 2) == 0.5
    assert catalogue.versions() == {"acme": "loomtune-acme 1.2"}


def test_an_unknown_name_says_what_is_near_what_exists_and_what_is_broken() -> None:
    broken = plugin(offer("half_again", schema=int))
    catalogue = Catalogue([(source(), plugin(offer())), (source("other", "loomtune-other", "3"), broken)])
    with pytest.raises(UserError) as caught:
        catalogue.find("schedule", "halff")
    (fault,) = caught.value.faults
    assert "no schedule is called 'halff'. Did you mean 'half'?" in fault.what
    assert "other (loomtune-other 3) is left out" in fault.what
    assert fault.cure.startswith("choose one of: half")


def test_one_plugin_may_offer_on_every_axis() -> None:
    everything = SimpleNamespace(
        models=hookimpl(lambda: [offer()]),
        datas=hookimpl(lambda: [offer()]),
        objectives=hookimpl(lambda: [offer()]),
        adapters=hookimpl(lambda: [offer()]),
        shardings=hookimpl(lambda: [offer()]),
        optimizers=hookimpl(lambda: [offer()]),
        schedules=hookimpl(lambda: [offer()]),
        launchers=hookimpl(lambda: [offer()]),
        rollouts=hookimpl(lambda: [offer()]),
        kernels=hookimpl(lambda: [offer()]),
        losses=hookimpl(lambda: [offer()]),
        rewards=hookimpl(lambda: [offer()]),
        trackers=hookimpl(lambda: [offer()]),
        evaluators=hookimpl(lambda: [offer()]),
        exporters=hookimpl(lambda: [offer()]),
        guards=hookimpl(lambda: [offer()]),
        stages=hookimpl(lambda: [offer()]),
        config_sources=hookimpl(lambda: ["pkg://acme.conf"]),
    )
    catalogue = Catalogue([(source(), everything)])
    assert [entry.axis for entry in catalogue.entries()] == list(AXES)
    assert catalogue.configs == ["pkg://acme.conf"]


def test_a_plain_function_of_a_hooks_name_is_no_offer() -> None:
    catalogue = Catalogue([(source(), SimpleNamespace(schedules=lambda: [offer()]))])
    assert not catalogue.names("schedule")


def test_two_plugins_that_offer_the_same_are_both_named() -> None:
    with pytest.raises(UserError, match="two plugins offer schedule=half") as caught:
        Catalogue([(source(), plugin(offer())), (source("beta", "loomtune-beta", "2"), plugin(offer()))])
    assert "acme (loomtune-acme 1.2)" in str(caught.value)
    assert "beta (loomtune-beta 2)" in str(caught.value)


def test_a_third_party_cannot_replace_a_built_in() -> None:
    built_in = Source("loomtune_plugins.schedules", "loomtune", "0")
    with pytest.raises(UserError, match="two plugins offer schedule=half"):
        Catalogue([(built_in, plugin(offer())), (source(), plugin(offer()))])


def test_a_plugin_cannot_offer_the_same_twice() -> None:
    with pytest.raises(UserError, match="schedule=half"):
        Catalogue([(source(), plugin(offer(), offer()))])


def test_two_plugins_of_one_name_are_both_named_and_the_first_is_whole() -> None:
    with pytest.raises(UserError, match="two plugins are called acme") as caught:
        Catalogue([(source(), plugin(offer())), (source(distribution="loomtune-beta"), plugin(offer("other")))])
    assert "loomtune-acme" in str(caught.value) and "loomtune-beta" in str(caught.value)


def raising() -> Any:
    raise RuntimeError("no licence")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (plugin(hook="scheduless"), "unknown hook 'scheduless'"),
        (plugin(run_started=lambda run, world: None), "world"),
        (plugin("half"), "AttributeError"),
        (plugin(offer(schema=int)), "no dataclass"),
        (plugin(offer(schema=dataclass(type("Named", (), {"__annotations__": {"name": str}})))), "reserved"),
        (plugin(config_sources=raising), "no licence"),
        (plugin(commands=lambda: ["spin"]), "'spin' is no command"),
    ],
    ids=["unknown hook", "unknown argument", "no offer", "no dataclass", "reserved", "raising hook", "no command"],
)
def test_a_third_party_that_does_not_fit_is_named_and_left_out_whole(
    broken: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = Catalogue([(source(), broken), (source("beta", "loomtune-beta", "2"), plugin(offer("fine")))])
    assert catalogue.names("schedule") == ["fine"]
    assert catalogue.versions() == {"beta": "loomtune-beta 2"}
    assert catalogue.manager.get_plugin("acme") is None
    assert reason in catalogue.broken["acme (loomtune-acme 1.2)"]
    assert "plugin acme (loomtune-acme 1.2) is broken and left out" in capsys.readouterr().err


def test_a_built_in_that_does_not_fit_is_a_bug() -> None:
    with pytest.raises(TypeError, match="no dataclass"):
        Catalogue([(Source("loomtune_plugins.schedules", "loomtune", "0"), plugin(offer(schema=int)))])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"build": f"{HERE}:number"}, "is no Schedule"),
        ({"build": "collections:OrderedDict"}, "is no Schedule"),
        ({"build": f"{HERE}:Missing"}, "AttributeError"),
        ({"build": "acme_not_there:Half"}, "No module named 'acme_not_there'"),
    ],
)
def test_a_chosen_class_that_breaks_its_contract_is_refused_with_its_distribution(
    changes: dict[str, Any], said: str
) -> None:
    catalogue = Catalogue([(source(), plugin(offer(**changes)))])
    with pytest.raises(UserError, match=r"loomtune-acme 1\.2") as caught:
        catalogue.build("schedule", "half", {})
    assert said in str(caught.value)


def test_a_class_that_lacks_methods_is_refused_naming_them() -> None:
    catalogue = Catalogue([(source(), plugin(offer(build=f"{HERE}:Unfinished"), hook="trackers"))])
    with pytest.raises(UserError, match="lacks describe"):
        catalogue.build("tracker", "half", {})


def test_a_missing_library_says_which_extra_brings_it() -> None:
    catalogue = Catalogue([(source(), plugin(offer(build="acme_not_there:Half", extra="quantised")))])
    with pytest.raises(UserError, match=r"pip install 'loomtune-acme\[quantised\]'"):
        catalogue.build("schedule", "half", {})


def test_built_ins_come_first_and_each_from_loomtune() -> None:
    catalogue = Catalogue(
        [(Source(name, "loomtune", "0"), sys.modules[name]) for name in BUILT_IN if name in sys.modules]
    )
    assert all(entry.source.distribution == "loomtune" for entry in catalogue.entries())
    assert tuple(installed().sources)[: len(BUILT_IN)] == BUILT_IN


@pytest.fixture
def discovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Catalogue]:
    """Makes distributions of one module each, and the catalogue of an environment that has them."""

    def make(*names: str, text: str = "", **modules: str) -> Catalogue:
        for name in (*names, *modules):
            (tmp_path / f"{name}_plugin.py").write_text(modules.get(name, text))
            info = tmp_path / f"loomtune_{name}-4.5.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: loomtune-{name}\nVersion: 4.5\n")
            (info / "entry_points.txt").write_text(f"[loomtune]\n{name} = {name}_plugin\n")
        monkeypatch.syspath_prepend(tmp_path)
        return installed.__wrapped__()

    return make


def test_third_parties_are_loaded_in_the_order_of_their_names(discovered: Callable[..., Catalogue]) -> None:
    catalogue = discovered("zeta", "alpha", "mid")
    assert list(catalogue.sources) == [*BUILT_IN, "alpha", "mid", "zeta"]
    assert catalogue.versions()["mid"] == "loomtune-mid 4.5"


def test_the_directorys_order_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [EntryPoint(name, f"m.{name}", "loomtune") for name in "bca"]
    monkeypatch.setattr(catalogues, "entry_points", lambda group: found)
    assert [entry.name for entry in catalogues._third_parties()] == ["a", "b", "c"]


def test_the_environment_lets_in_some_or_none(
    discovered: Callable[..., Catalogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOMTUNE_PLUGINS", "mid,nobody")
    assert set(discovered("alpha", "mid").sources) - set(BUILT_IN) == {"mid"}
    monkeypatch.setenv("LOOMTUNE_DISABLE_PLUGINS", "1")
    assert set(installed.__wrapped__().sources) == set(BUILT_IN)


@pytest.mark.parametrize("text", ["import acme_not_there", "raise SystemExit(3)", "1 +"])
def test_a_third_party_that_cannot_be_imported_is_named_and_skipped(
    discovered: Callable[..., Catalogue], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = discovered(bad=text, good="")
    assert set(catalogue.sources) - set(BUILT_IN) == {"good"}
    assert "bad (loomtune-bad 4.5)" in catalogue.broken
    assert "plugin bad (loomtune-bad 4.5) is broken and left out" in capsys.readouterr().err


SCHEMA_OF_NO_CONFIG = """
from dataclasses import dataclass
from loomtune import hookimpl
from loomtune.offers import Offer

@dataclass
class Odd:
    values: tuple[set, ...] = ()

@hookimpl
def schedules():
    return [Offer(name="odd", build="x:Y", schema=Odd, summary="odd")]
"""


def test_settings_that_no_config_can_hold_harm_nobody_but_who_chooses_them(tmp_path: Path) -> None:
    (tmp_path / "odd_plugin.py").write_text(SCHEMA_OF_NO_CONFIG)
    info = tmp_path / "loomtune_odd-4.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loomtune-odd\nVersion: 4.5\n")
    (info / "entry_points.txt").write_text("[loomtune]\nodd = odd_plugin\n")
    program = "from loomtune.compose import compose; compose([]); compose(['schedule=odd'])"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert "UserError: no schedule is called 'odd'" in ran.stderr
    assert "odd (loomtune-odd 4.5) is left out: schedule=odd: its settings are none that OmegaConf knows" in ran.stderr
