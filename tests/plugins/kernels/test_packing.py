"""A run that packs: what is refused before it starts, and what the probe refuses on the real network."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loomtune import api
from loomtune.contracts import Batch
from loomtune.errors import UserError
from loomtune.signals import StopRequest
from loomtune.testing import toy
from loomtune.worker import execute
from loomtune_plugins.kernels.sdpa import SDPA
from support import write_rows


@pytest.fixture
def settings(tied_model: Path, mixed_data: Path) -> list[str]:
    own = [f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}", "tracker=[jsonl]", "sharding=single"]
    return [*own, "packing=true", "steps=2", "launcher.procs=1", "checkpoint.background=false"]


def refused(settings: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        api.check(api.compose(settings))
    return str(caught.value)


def test_without_a_kernel_that_keeps_samples_apart_nothing_is_packed(settings: list[str]) -> None:
    said = refused([*settings, "kernel=[]"])
    assert "packing=true needs `isolated_segments`" in said and "set packing=false, or kernel=[sdpa]" in said


def test_an_attention_that_takes_no_mask_is_refused_where_rows_are_packed(settings: list[str]) -> None:
    said = refused([*settings, "model.attention=flash_attention_2"])
    assert "model.attention=flash_attention_2 does not take" in said
    api.check(api.compose([*settings, "model.attention=eager"]))


def run(settings: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(StopRequest, "listen", lambda self: None)
    plan = api.compose([*settings, f"run.dir='{folder}'"])
    execute(plan, api.prepare(plan), toy.world())
    return folder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_run_packs_and_learns(
    attention: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid: list[tuple[int, int]] = []
    plain = SDPA.attention

    def seen(self: SDPA, batch: Batch, dtype: Any) -> Mapping[str, Any]:
        laid.append((len(batch.tokens), len(batch.sample_numbers)))
        return plain(self, batch, dtype)

    monkeypatch.setattr(SDPA, "attention", seen)
    folder = run([*settings, f"model.attention={attention}"], tmp_path / "run", monkeypatch)
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert all(rows < samples for rows, samples in laid), "the probe, and then both steps, lay several into a row"
    assert sum(samples for _, samples in laid[-2:]) == 16


def test_a_network_whose_samples_see_each_other_does_not_start(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SDPA, "attention", lambda self, batch, dtype: {"attention_mask": batch.tokens * 0 + 1})
    with pytest.raises(UserError, match="see each other"):
        run(settings, tmp_path / "run", monkeypatch)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("cached", [False, True], ids=["without a cache", "with a cache"])
def test_position_ids_keep_samples_apart_only_where_no_cache_is_in_use(
    cached: bool, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.23 finds packed samples by their positions, unless its forward is to fill a cache, its default."""
    from transformers.models.llama.modeling_llama import LlamaModel

    plain = LlamaModel.forward

    @functools.wraps(plain)
    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        return plain(self, *arguments, **{**named, "use_cache": cached})

    monkeypatch.setattr(SDPA, "attention", lambda self, batch, dtype: {"attention_mask": None})
    monkeypatch.setattr(LlamaModel, "forward", forward)
    if not cached:
        run(settings, tmp_path / "run", monkeypatch)
        return
    with pytest.raises(UserError, match=r"see each other with this model and kernel\n    cure: set packing=false"):
        run(settings, tmp_path / "run", monkeypatch)


@pytest.fixture
def pairs(tied_model: Path, tmp_path: Path) -> list[str]:
    rows = [{"prompt": f"why {n}? " * 3, "chosen": f"so {n}", "rejected": "no"} for n in range(8)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    own = [f"model.path={tied_model}", "data=jsonl", f"data.path={path}", "objective=dpo", "sharding=single"]
    return [*own, "steps=1", "launcher.procs=1", "checkpoint.background=false"]


@pytest.mark.parametrize("mask", ["ones", "none"])
def test_answers_share_a_prompt_only_where_the_attention_knows_of_it(
    mask: str, pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain causal attention shows one answer to the other; by position ids, the second does not see the prompt."""
    made = {"ones": lambda batch: batch.tokens * 0 + 1, "none": lambda batch: None}[mask]
    monkeypatch.setattr(SDPA, "attention", lambda self, batch, dtype: {"attention_mask": made(batch)})
    with pytest.raises(UserError, match="answers that share a prompt see each other, or not their prompt"):
        run(pairs, tmp_path / "shared", monkeypatch)
    run([*pairs, "batch.share=never"], tmp_path / "apart", monkeypatch)


def test_the_attention_of_the_built_in_kernel_lets_answers_share_their_prompt(
    pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run([*pairs, "batch.share=always", "precision=bf16"], tmp_path / "run", monkeypatch)
