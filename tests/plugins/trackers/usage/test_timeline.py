"""Where the time of a step went, by a clock that a test turns."""

import itertools

from loomtune.phases import Phases
from loomtune_plugins.trackers.usage.timeline import Timeline, sums


def length(begin: float, end: float) -> float:
    return end - begin


def turning() -> tuple[Phases, Timeline[int]]:
    """A clock that is a second later at each look, and the phases that it measures."""
    timeline = Timeline(itertools.count().__next__)
    phases = Phases()
    phases.listeners.append(timeline)
    return phases, timeline


def test_a_step_is_the_sum_of_its_phases_and_of_what_lies_between_them() -> None:
    phases, timeline = turning()
    for name in ("data", "data", "forward", "backward", "forward", "backward", "optimizer"):
        with phases(name):
            pass
    began, found = timeline.began, sums(timeline.take(), length)
    assert found == {"data": 2, "forward": 2, "backward": 2, "optimizer": 1, "other": 6}
    assert began is not None and sum(found.values()) == timeline.end() - began


def test_a_phase_in_another_takes_its_time_from_it() -> None:
    phases, timeline = turning()
    with phases("rollout"), phases("data"):
        pass
    assert sums(timeline.take(), length) == {"rollout": 2, "data": 1}


def test_what_comes_between_steps_counts_for_itself_and_the_gaps_there_for_nothing() -> None:
    phases, timeline = turning()
    for name in ("data", "optimizer"):
        with phases(name):
            pass
    timeline.end()
    timeline.take()
    for name in ("evaluation", "checkpoint", "data", "optimizer"):
        with phases(name):
            pass
    found = sums(timeline.take(), length)
    assert found == {"evaluation": 1, "checkpoint": 1, "data": 1, "optimizer": 1, "other": 1}


def test_a_step_begins_with_its_rows_even_where_an_evaluation_came_before() -> None:
    phases, timeline = turning()
    with phases("evaluation"):
        assert timeline.began is None
    with phases("rollout"):
        assert timeline.began is not None


def test_marks_that_are_not_known_yet_count_the_next_time_in_their_order() -> None:
    phases, timeline = turning()
    for name in ("data", "forward", "optimizer"):
        with phases(name):
            pass
    until = timeline.spans[2].end
    first = timeline.take(lambda mark: mark <= until)
    assert [span.phase for span in first] == ["data", "other", "forward"]
    assert [span.phase for span in timeline.take()] == ["other", "optimizer"]
