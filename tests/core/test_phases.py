"""Where a step is."""

import pytest

from loomtune.phases import Phases


def told() -> tuple[Phases, list[tuple[str, bool]]]:
    phases, heard = Phases(), list[tuple[str, bool]]()
    phases.listeners.append(lambda name, begins: heard.append((name, begins)))
    return phases, heard


def test_listeners_hear_both_edges_of_phases_in_phases() -> None:
    phases, heard = told()
    with phases("rollout"), phases("data"):
        pass
    assert heard == [("rollout", True), ("data", True), ("data", False), ("rollout", False)]


def test_a_phase_that_fails_ends_all_the_same() -> None:
    phases, heard = told()
    with pytest.raises(ZeroDivisionError), phases("forward"):
        1 / 0  # noqa: B018
    assert heard == [("forward", True), ("forward", False)]


def test_a_word_that_is_no_phase_is_refused() -> None:
    with pytest.raises(AssertionError, match="forwards is no phase"), Phases()("forwards"):
        pass
