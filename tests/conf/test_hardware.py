"""The shipped figures of hardware: each has a source, and they go together."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from loomtune import api
from loomtune.settings import Hardware, Link
from support import ROOT

FOLDER = ROOT / "conf" / "loomtune_conf" / "hardware"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
EVERY = pytest.mark.parametrize("name", NAMES)
NO_FIGURES = {"kind", "title", "refuse", "sources"}
ACCELERATORS = [name for name in NAMES if not name.startswith("cpu")]
VARIANTS = [name for name in NAMES if "defaults" in yaml.safe_load((FOLDER / f"{name}.yaml").read_text())]


def values(name: str) -> dict[str, Any]:
    """What a file says, over what it builds on."""
    said = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    bases = [values(base) for base in said.pop("defaults", []) if base != "_self_"]
    merged: dict[str, Any] = OmegaConf.to_container(OmegaConf.merge(*bases, said))  # type: ignore[assignment]
    return merged


@cache
def hardware(name: str) -> Hardware:
    """As Hydra composes it; by hand, since that takes a second each."""
    one: Hardware = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Hardware), values(name)))  # type: ignore[assignment]
    return one


def figures(one: Hardware) -> set[str]:
    """Names of what is known."""
    known = {name: value for name, value in vars(one).items() if name not in NO_FIGURES}
    return {name for name, value in known.items() if (value.gb_per_second if isinstance(value, Link) else value)}


@EVERY
def test_every_figure_that_is_known_says_where_it_is_from(name: str) -> None:
    one = hardware(name)
    assert one.known and one.title
    assert figures(one) == set(one.sources)
    assert all(len(source) >= len("sockets") for source in one.sources.values())


@EVERY
def test_a_price_names_who_asks_it_and_when(name: str) -> None:
    if hardware(name).price:
        assert re.search(r"\b20\d\d-\d\d-\d\d\b|price-index", hardware(name).sources["price"])


@pytest.mark.parametrize("name", ACCELERATORS)
def test_less_memory_can_be_allocated_than_is_printed_on_it(name: str) -> None:
    one = hardware(name)
    printed = re.search(r"(\d+) GB", one.title)
    assert printed is not None
    assert 0.9 * int(printed[1]) < one.memory_gib < int(printed[1])


@pytest.mark.parametrize("name", ACCELERATORS)
def test_peaks_are_dense_and_halve_with_each_step_of_precision(name: str) -> None:
    """A sparse peak among dense ones would be twice as high, beside the others or beside what memory feeds."""
    one = hardware(name)
    assert one.tflops["bf16"] == one.tflops["fp16"]
    assert one.tflops["tf32"] == pytest.approx(one.tflops["bf16"] / 2, rel=0.03)
    assert one.tflops["fp32"] <= one.tflops["tf32"]
    assert 100 < one.tflops["bf16"] * 1e3 / one.memory_gb_per_second < 450, "operations a byte"
    assert re.search("dense|halved", one.sources["tflops"])


@EVERY
def test_what_is_further_away_is_slower(name: str) -> None:
    one = hardware(name)
    assert one.memory_gb_per_second > one.inside.gb_per_second >= one.between.gb_per_second
    assert one.memory_gb_per_second > one.host.gb_per_second


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_same_accelerator_elsewhere(name: str) -> None:
    base = next(other for other in sorted(NAMES, key=len, reverse=True) if name.startswith(f"{other}_"))
    for figure in ("kind", "memory_gib", "memory_gb_per_second", "tflops", "per_node", "inside"):
        assert getattr(hardware(name), figure) == getattr(hardware(base), figure)
    assert hardware(name).title.startswith(hardware(base).title)


@pytest.mark.parametrize("figure", ["memory_gib", "memory_gb_per_second", "watts", "price"])
def test_each_generation_has_more_and_costs_more(figure: str) -> None:
    values = [getattr(hardware(name), figure) for name in ("a100_80gb", "h100_80gb", "b200_180gb")]
    assert values == sorted(values)


@pytest.mark.parametrize("name", ACCELERATORS)
def test_prices_and_watts_are_of_one_accelerator(name: str) -> None:
    """Those of a node would be eight times as high."""
    one = hardware(name)
    assert 0.001 < one.price / one.tflops["bf16"] < 0.012, "USD an hour for a TFLOP/s"
    assert 250 < one.watts < 2000


@pytest.mark.parametrize("name", ["h100_80gb", "a100_40gb_efa"])
def test_hydra_composes_the_same(name: str) -> None:
    assert api.compose([f"hardware={name}"], processes=1).root.hardware == hardware(name)


def test_any_figure_can_be_overridden() -> None:
    one = api.compose(["hardware=h100_80gb", "hardware.price=1.9", "hardware.between.gb_per_second=25"], processes=1)
    assert (one.root.hardware.price, one.root.hardware.between.gb_per_second) == (1.9, 25)
    assert one.root.hardware.inside.gb_per_second == 450
