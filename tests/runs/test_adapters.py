"""A sample of what `make adapters` runs, and that its page is of the adapters as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import adapters
from adapters import METHODS, SHARDINGS, Bench, Method, Row, cells, known, methods
from loomtune.catalogue import BUILT_IN_DISTRIBUTION, installed
from runs.adapting import Row as SaidRow
from runs.adapting import Said
from runs.worlds import Worlds
from support import shared

LABELLED = {method.label: method for method in METHODS}
LAID_OUT = {layout.name: layout for layout in SHARDINGS}

Benches = Callable[[int], Bench]


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory, worlds: Worlds) -> Benches:
    """Benches by their number of steps, each made once."""
    shared("models", "stories260k"), shared("data", "gsm8k")
    made: dict[int, Bench] = {}

    def of(steps: int) -> Bench:
        if steps not in made:
            made[steps] = Bench(tmp_path_factory.mktemp("adapters"), worlds, steps)
        return made[steps]

    return of


@pytest.mark.parametrize(
    ("label", "sharding"),
    [("lora", "zero 3"), pytest.param("bottleneck", "fsdp", marks=pytest.mark.slow), ("prefix", "fsdp")],
)
def test_an_adapter_learns_alike_and_leaves_what_it_learned(label: str, sharding: str, benches: Benches) -> None:
    row = benches(4).row(LABELLED[label], LAID_OUT[sharding])
    assert not row.wrong, row.told
    assert row.frozen and row.reopened is not None and row.loss is not None
    assert (row.merged is None) == row.told.startswith("not merged: ")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_every_adapter_learns_alike_under_every_sharding(method: Method, benches: Benches) -> None:
    rows = [benches(adapters.STEPS).row(method, layout) for layout in SHARDINGS]
    assert not any(row.wrong for row in rows), [row.told for row in rows]
    assert rows[0].loss == 0.0


def test_every_built_in_adapter_is_measured() -> None:
    built_in = {e.offer.name for e in installed().entries("adapter") if e.source.distribution == BUILT_IN_DISTRIBUTION}
    assert {method.name for method in METHODS} == built_in
    assert set(METHODS) <= set(methods())


def test_the_page_holds_what_was_measured_in_order_and_nothing_that_failed() -> None:
    rows = known()
    everything = [(method.label, layout.name) for method in METHODS for layout in SHARDINGS]
    assert list(rows) == [names for names in everything if names in rows]
    for row in rows.values():
        assert "EXCEEDED" not in row[-1] and "FAILED" not in row[-1]
        assert all(row[3:8]) or row[-1].startswith("refused: ")


def test_frozen_weights_that_change_are_seen(benches: Benches, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, method = benches(4), LABELLED["lora"]
    found = bench._run(method, LAID_OUT["single"])
    changed = replace(found, result={**found.result, "changed": ["model.norm.weight"]})
    row = bench._measured(method, LAID_OUT["single"], changed)
    assert row.wrong and "1 frozen tensors have changed, model.norm.weight for one" in row.told


def test_a_difference_of_logits_is_relative_to_the_largest_and_leaves_virtual_tokens_out() -> None:
    logits = torch.tensor([[0.0, 1.0], [-4.0, 2.0]])
    said = Said([SaidRow(torch.tensor([[5, 6, 7]]), torch.tensor([0, 2]), logits)], {})
    virtual, between = torch.full((2, 2), 9.0), torch.full((1, 2), 7.0)

    class Answer:
        def __init__(self, apart: float) -> None:
            self.logits = torch.cat([virtual, logits[:1], between, logits[1:] + apart])[None]

    assert said.exact and said.apart(lambda tokens: Answer(0.0)) == 0.0
    assert said.apart(lambda tokens: Answer(0.5)) == pytest.approx(0.125)


def test_a_renewed_page_keeps_the_rows_that_were_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{adapters.BEGIN}\nnothing yet\n{adapters.END}\nafter\n")
    monkeypatch.setattr(adapters, "PAGE", page)
    full, lora = (cells(Row(LABELLED[label], SHARDINGS[0], (2.0, 1.0), 1e-7)) for label in ("full", "lora"))
    gone = ("adapter that left", *full[1:])
    adapters.write({row[:2]: row for row in (lora, gone)})
    adapters.write({full[:2]: full})
    text = page.read_text()
    assert list(known().values()) == [full, lora]
    assert text.startswith("before\n") and text.endswith("after\n") and "nothing yet" not in text
