"""What generating in the training process takes of a rank's memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loomtune_plugins.planner.rehearse import traced
from loomtune_plugins.planner.trace import Trace
from rehearsing import BLOCKS, VOCABULARY, WIDTH, planned
from runs.allocating import measure
from runs.foretelling import foretold
from runs.worlds import Worlds
from support import ROOT

GROUP, NEW, PROMPTS = 4, 8, 8
MIXED = ["reward=[length]", "reward.length.longest=9", f"objective.group={GROUP}", f"objective.max_new_tokens={NEW}"]


def seen(*words: str, processes: int = 1, prompt: int = 20) -> Trace:
    engine = () if any(word.startswith("rollout=") for word in words) else ("rollout=huggingface",)
    plan = planned("objective=grpo", *MIXED, *engine, *words)
    return traced(plan, processes, rows=[(prompt,)])


def caches(rows: int, tokens: int) -> int:
    return rows * tokens * BLOCKS * 2 * WIDTH * 4


@pytest.fixture(scope="module")
def alone() -> Trace:
    return seen("sharding=single", "rollout.batch=16")


def test_it_comes_after_birth_and_before_the_forward_pass(alone: Trace) -> None:
    names = list(alone.moments)
    assert names[:4] == ["birth", "rollout:start", "rollout:prompts", "rollout"]
    assert names[4].startswith("forward")


def test_what_is_kept_between_steps_lies_beside_it(alone: Trace) -> None:
    causes = dict(alone.moments["rollout"].causes)
    assert {name: causes[name] for name in ("parameters", "optimizer")} == {
        name: alone.kept[name] for name in ("parameters", "optimizer")
    }
    assert "gathered" not in causes, "one rank has everything"


def test_caches_are_of_all_rows_at_once_with_all_that_they_may_become(alone: Trace) -> None:
    other = seen("sharding=single", "rollout.batch=32")
    grown = other.moments["rollout"].causes["rollout"] - alone.moments["rollout"].causes["rollout"]
    held = caches(16, 20 + NEW - 1)
    assert held + 16 * VOCABULARY * 4 < grown < 1.5 * held


def test_sharded_weights_are_whole_meanwhile_in_the_types_that_generation_has(alone: Trace) -> None:
    sharded = seen("sharding=fsdp", processes=2)
    assert sharded.moments["rollout"].causes["gathered"] == pytest.approx(4 * alone.parameters[0], rel=0.01)
    light = seen("sharding=fsdp", "precision=bf16", processes=2).moments["rollout"].causes["gathered"]
    assert light < 0.75 * sharded.moments["rollout"].causes["gathered"]


@pytest.mark.parametrize("engine", ["huggingface", "vllm"])
def test_what_is_generated_elsewhere_takes_nothing_here(engine: str) -> None:
    words = ["rollout.ranks=1"] if engine == "huggingface" else ["rollout.urls=[http://nowhere:1]"]
    trace = seen("sharding=ddp", f"rollout={engine}", *words, processes=2)
    assert not [name for name in trace.moments if name.startswith("rollout")]
    assert bool(trace.notes) is (engine == "vllm")


@pytest.mark.skipif(shutil.which("c++") is None, reason="runs/allocations.cpp needs a compiler, named c++")
@pytest.mark.parametrize("settings", ["precision=fp32"])
def test_the_peak_of_a_real_rollout_is_foretold(settings: str, worlds: Worlds, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import memory_cases as cases
    cases.write(tmp_path)
    case = cases.Case("Llama 11 M", settings, objective="grpo", length=128, rows=4)
    overrides = case.overrides(tmp_path)
    measured = worlds.train(1, overrides, tmp_path / "run", measure).result["ranks"][0]["peaks"]["rollout"]
    moments = foretold(overrides, 1)["moments"]
    assert max(peak for name, peak in moments.items() if "rollout" in name) == pytest.approx(measured, rel=0.1)
