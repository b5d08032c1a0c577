"""What is kept and shown of completions, whatever a model wrote in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from loomtune.errors import UserError
from loomtune_plugins.measured import evaluations
from loomtune_plugins.trackers import rollouts
from loomtune_plugins.trackers.jsonl import Jsonl
from loomtune_plugins.trackers.report import Report
from loomtune_plugins.trackers.settings import JsonlSettings, ReportSettings, TensorBoardSettings
from loomtune_plugins.trackers.tensorboard import TensorBoard

HOSTILE = "<script>alert(1)</script>\x1b[2J\u202egnp.exe\x00 & <b>"


def batch(*rewards: float | None, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"asked {i // 2}",
            "completion": f"said {i}",
            "reward": reward,
            "rewards": {"exact": reward if reward is not None else math.nan},
            "advantage": None,
            "ended": i % 2 == 0,
            "visit": i // 2,
            "place": i % 2,
            **more,
        }
        for i, reward in enumerate(rewards)
    ]


def told(story: Any, **settings: int) -> Any:
    return story(jsonl=Jsonl(JsonlSettings(**settings)))


def kept(run: Any) -> dict[int, list[str]]:
    return {
        rollouts.step_of(path): [row["completion"] for row in rollouts.rows(path)]
        for path in rollouts.files(run.folder)
    }


def test_a_batch_is_a_file_of_the_step_that_learns_from_it_first(story) -> None:
    tale = told(story)
    tale.tell("rollout_finished", step=3, samples=batch(1.0, 0.0, None))
    path = tale.run.folder / "rollouts" / "step-00000003.jsonl"
    first, _, lost = map(json.loads, path.read_text().splitlines())
    assert first == {"step": 3, **batch(1.0)[0]}
    assert lost["reward"] is None and lost["rewards"] == {"exact": None}, "JSON has no NaN"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no draft is left"


@pytest.mark.parametrize(
    ("most", "there"), [(0, {}), (2, {1: ["said 0", "said 1"]}), (-1, {1: [f"said {i}" for i in range(5)]})]
)
def test_so_many_completions_of_the_first_prompts_are_kept(story, most: int, there: dict[int, list[str]]) -> None:
    tale = told(story, rollouts=most)
    tale.tell("rollout_finished", step=1, samples=batch(1.0, 2.0, 3.0, 4.0, 5.0))
    assert kept(tale.run) == there


def test_a_resumed_run_writes_the_same_file_again_and_nothing_twice(story) -> None:
    tale = told(story)
    for step in (1, 2, 3):
        tale.tell("rollout_finished", step=step, samples=batch(float(step)))
        tale.step(step)
    again = told(story)
    again.loaded(2)
    assert list(kept(again.run)) == [1, 2], "what was generated for a step that was not committed is gone"
    again.tell("rollout_finished", step=3, samples=batch(7.0, 8.0))
    again.tell("rollout_finished", step=3, samples=batch(7.0, 8.0))
    assert kept(again.run) == {1: ["said 0"], 2: ["said 0"], 3: ["said 0", "said 1"]}
    anew = told(story)
    anew.tell("rollout_finished", step=1, samples=batch(0.0, 0.0))
    assert kept(anew.run) == {1: ["said 0", "said 1"]}, "a run without a checkpoint starts anew"


def test_the_folder_does_not_grow_for_ever_and_keeps_both_ends(story) -> None:
    tale = told(story, rollout_files=4)
    for step in range(1, 51):
        tale.tell("rollout_finished", step=step, samples=batch(1.0))
        assert len(kept(tale.run)) <= 4
        assert min(kept(tale.run)) == 1 and max(kept(tale.run)) == step
    everything = told(story, rollout_files=0)
    for step in range(51, 60):
        everything.tell("rollout_finished", step=step, samples=batch(1.0))
    assert len(kept(everything.run)) == 9


def test_a_long_text_loses_its_middle_unless_everything_is_kept(story) -> None:
    long = "a" * 10_000 + "b" * 10_000
    for most, length in ((1, 16_027), (-1, 20_000)):
        tale = told(story, rollouts=most)
        tale.tell("rollout_finished", step=1, samples=batch(1.0, completion=long))
        (text,) = kept(tale.run)[1]
        assert len(text) == length and text[0] == "a" and text[-1] == "b"


@pytest.mark.parametrize("settings", [{"rollouts": -2}, {"rollout_files": 1}, {"rollout_files": -1}])
def test_numbers_that_mean_nothing_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        Jsonl(JsonlSettings(**settings))


def test_the_best_and_the_worst_are_shown_and_none_that_has_no_reward() -> None:
    samples = batch(0.0, None, 3.0, math.nan, 1.0, 2.0, -1.0)
    assert [row["reward"] for row in rollouts.telling(samples, 3)] == [3.0, 2.0, -1.0]
    assert [row["reward"] for row in rollouts.telling(samples, 1)] == [3.0]
    assert [row["reward"] for row in rollouts.telling(samples, 99)] == [3.0, 2.0, 1.0, 0.0, -1.0]


def test_nothing_that_a_model_wrote_acts_where_it_is_shown() -> None:
    shown = rollouts.plain(HOSTILE + "\nnext\tcell\r")
    assert shown == "<script>alert(1)</script>\\x1b[2J\\u202egnp.exe\\x00 & <b>\nnext\tcell\\r"


def test_the_page_shows_three_batches_with_curves_and_runs_nothing(story) -> None:
    tale = told(story)
    for step in range(1, 10):
        tale.tell("rollout_finished", step=step, samples=batch(0.5, 1.5, prompt=HOSTILE, completion=HOSTILE))
        more = {"rewards/mean": 0.1 * step, "completions/mean_length": 9.0} if step % 2 else {}
        tale.step(step, kl=0.01, entropy=2.0, **more)
    tale.end()
    html = Report(ReportSettings()).render(tale.run.folder)
    assert "<script>" not in html and "&lt;script&gt;alert(1)" in html and "\x1b" not in html and "\u202e" not in html
    assert [f"Completions before step {step}<" in html for step in (1, 5, 9, 3)] == [True, True, True, False]
    section = html[html.index("<h2>Completions</h2>") : html.index("<h2>Training</h2>")]
    for caption in ("Reward", "KL to the reference, per token", "Entropy, per token", "Length, in tokens"):
        assert f"<figcaption>{caption}</figcaption>" in section
        assert html.count(f"<figcaption>{caption}</figcaption>") == 1
    assert "Before and after" not in html, "what is noted once a batch is no evaluation"


def test_a_run_without_completions_has_no_such_section(story) -> None:
    tale = told(story)
    tale.step(1, kl=0.1)
    tale.end()
    html = Report(ReportSettings()).render(tale.run.folder)
    assert "Completions" not in html and "<figcaption>kl</figcaption>" in html


def test_numbers_of_a_batch_are_no_evaluations_and_those_of_the_evaluator_are() -> None:
    lines = [
        {"step": 1, "loss": 1.0, "rewards/mean": 1.0, "rollout_seconds": 2.0},
        {"step": 2, "loss": 1.0, "reward": 0.5},
    ]
    assert evaluations(lines) == ["reward"]


def test_tensorboard_has_a_few_texts_that_stand_as_they_are(story, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tale = story(tensorboard=TensorBoard(TensorBoardSettings(rollouts=2, rollout_every=3)))
    for step in range(1, 6):
        tale.tell("rollout_finished", step=step, samples=batch(0.0, 1.0, 2.0, completion=HOSTILE))
        tale.step(step)
    tale.end()
    found = EventAccumulator(str(tale.run.folder / "tensorboard"))
    found.Reload()
    texts = found.Tensors("rollouts/text_summary")
    assert [event.step for event in texts] == [1, 4]
    said = texts[0].tensor_proto.string_val[0].decode()
    assert "reward: 2" in said and "reward: 0" in said and "reward: 1\n" not in said
    assert "\x1b" not in said and all(line.startswith("    ") for line in said.splitlines() if "script" in line)
