"""The tracker that owns metrics.jsonl."""

from loomtune_plugins.trackers.jsonl import Jsonl
from loomtune_plugins.trackers.metrics import read
from loomtune_plugins.trackers.settings import JsonlSettings


def jsonl() -> Jsonl:
    return Jsonl(JsonlSettings())


def steps(folder) -> list[int]:
    return [line["step"] for line in read(folder)]


def test_each_step_has_a_line_and_evaluations_join_theirs(story) -> None:
    told = story(jsonl=jsonl())
    told.evaluated(0, heldout_loss_before=3.0)
    told.step(1)
    told.step(2)
    told.evaluated(2, heldout_loss=2.0)
    told.step(3)
    told.end()
    lines = read(told.run.folder)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line.get("heldout_loss") for line in lines] == [None, None, 2.0, None]
    assert lines[0] == {"step": 0, "heldout_loss_before": 3.0}
    assert lines[2]["loss"] == 2.0


def test_a_resumed_run_goes_on_after_the_committed_step(story) -> None:
    told = story(jsonl=jsonl())
    for step in (1, 2, 3):
        told.step(step)
    told.saved(2)
    again = story(jsonl=jsonl())
    again.loaded(2)
    again.step(3, loss=0.5)
    assert steps(told.run.folder) == [1, 2, 3]
    assert read(told.run.folder)[2]["loss"] == 0.5


def test_a_run_without_a_checkpoint_starts_its_file_anew(story) -> None:
    told = story(jsonl=jsonl())
    told.step(1)
    told.step(2)
    again = story(jsonl=jsonl())
    again.step(1)
    assert steps(told.run.folder) == [1]


def test_a_line_is_there_as_soon_as_its_step_is_over(story) -> None:
    told = story(jsonl=jsonl())
    told.step(1)
    assert steps(told.run.folder) == [1]


def test_an_attempt_that_had_nothing_to_do_leaves_the_lines_alone(story) -> None:
    told = story(jsonl=jsonl())
    told.step(1)
    told.end()
    again = story(jsonl=jsonl())
    again.loaded(1)
    again.end()
    assert steps(told.run.folder) == [1]
