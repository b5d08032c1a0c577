"""Packed and unpacked, the same rows have the same loss and the same gradients: conversations, and pairs of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loomtune import api
from loomtune.assembly import assemble
from loomtune.batching import micro_limit, step_batches
from loomtune.catalogue import installed
from loomtune.contracts import Batch
from loomtune.feed import Feed
from loomtune.lease import Lease
from loomtune.testing import toy
from loomtune_plugins.kernels.sdpa import SDPA
from support import write_rows

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Conversations of one to three rounds."""
    rounds = [
        [{"role": "user", "content": "ab" * (1 + n % 5)}, {"role": "assistant", "content": f"c{n}" * (1 + n % 3)}]
        for n in range(24)
    ]
    rows = [{"messages": [turn for one in rounds[n : n + 1 + n % 3] for turn in one]} for n in range(20)]
    path = write_rows(tmp_path_factory.mktemp("talks") / "talks.jsonl", rows)
    return ["data=jsonl", f"data.path={path}", "model.chat_template=plain"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Prompts with a better and a worse answer, of very different lengths."""
    rows = [
        {"prompt": "why? " * (1 + n % 4), "chosen": f"so{n}" * (1 + n % 3), "rejected": "no" * (1 + n % 7)}
        for n in range(20)
    ]
    path = write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)
    return ["data=jsonl", f"data.path={path}", "objective=dpo"]


def learned(model: Path, settings: list[str], folder: Path) -> tuple[float, Gradients, list[Batch]]:
    """Loss and gradients of the first step, and the micro-batches that they are of."""
    given = [f"model.path={model}", "sharding=single", "batch.size=12", "batch.micro=2", "max_length=120"]
    plan = api.compose([*given, *settings, f"run.dir={folder}"])
    api.check(plan)
    assembly = assemble(plan, api.prepare(plan), installed(), toy.world(), Lease(folder, "here"), observed=False)
    assembly.build_roles()
    run = assembly.run
    batches = step_batches(run, *Feed(run).next(), micro_limit(run))
    totals = {term: sum(run.objective.weights(batch)[term] for batch in batches) for term in run.objective.terms()}
    statistics = run.objective.statistics(run.roles, batches, run.world)
    loss = 0.0
    for index, batch in enumerate(batches):
        with run.accumulating(last=index == len(batches) - 1):
            for engine, part in run.losses(run.objective.loss(run.roles, batch, totals, statistics), totals):
                engine.backward(part)
                loss += part.item()
    network: Any = run.policy.engine
    return loss, {name: weight.grad for name, weight in network.network.named_parameters()}, batches


def furthest(one: Gradients, other: Gradients) -> float:
    """The largest difference of any element, beside its tensor's largest."""
    assert one.keys() == other.keys() and one
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in one)


def rows_of(batches: list[Batch]) -> int:
    return sum(len(batch.tokens) for batch in batches)


def test_packed_conversations_teach_what_they_teach_one_by_one(
    talks: list[str], tied_model: Path, tmp_path: Path
) -> None:
    loss, expected, plain = learned(tied_model, talks, tmp_path / "plain")
    packed, found, batches = learned(tied_model, [*talks, "packing=true"], tmp_path / "packed")
    assert rows_of(plain) == 12 > rows_of(batches)
    assert packed == pytest.approx(loss, rel=1e-5)
    assert furthest(found, expected) < 1e-5


def test_packed_samples_count_their_positions_each_from_its_own_start(
    talks: list[str], tied_model: Path, tmp_path: Path
) -> None:
    _, _, batches = learned(tied_model, [*talks, "packing=true"], tmp_path / "packed")
    for batch in batches:
        for segment in range(len(batch.parents)):
            places = batch.positions[batch.segments == segment]
            assert places.tolist() == list(range(len(places)))


@pytest.mark.parametrize(("share", "packing"), [("always", "true"), ("always", "false"), ("never", "true")])
def test_packed_pairs_teach_what_they_teach_one_by_one(
    share: str, packing: str, pairs: list[str], tied_model: Path, tmp_path: Path
) -> None:
    loss, expected, plain = learned(tied_model, [*pairs, "batch.share=never"], tmp_path / "plain")
    how = [f"batch.share={share}", f"packing={packing}"]
    other, found, batches = learned(tied_model, [*pairs, *how], tmp_path / "other")
    assert rows_of(plain) == 24, "an answer a row"
    assert (rows_of(batches) < 12) is (packing == "true")
    assert other == pytest.approx(loss, rel=1e-5)
    assert furthest(found, expected) < 1e-5


def test_a_leak_would_be_seen_in_the_gradients(
    talks: list[str], tied_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected, _ = learned(tied_model, talks, tmp_path / "plain")
    monkeypatch.setattr(SDPA, "attention", lambda self, batch, dtype: {"attention_mask": batch.tokens * 0 + 1})
    _, found, _ = learned(tied_model, [*talks, "packing=true"], tmp_path / "packed")
    assert furthest(found, expected) > 1e-2
