"""The events of a run: everyone hears them, in order, and nobody silences anybody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from loomtune import hookimpl
from loomtune.events import Events

ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "run_started": {},
    "model_ready": {},
    "checkpoint_loaded": {"path": Path("step-1"), "step": 1},
    "step_started": {"step": 2},
    "rollout_finished": {"step": 2, "samples": [{"completion": "x"}]},
    "step_finished": {"step": 2, "metrics": {"loss": 1.0}},
    "evaluated": {"step": 2, "metrics": {"accuracy": 0.5}},
    "checkpoint_saved": {"path": Path("step-2"), "step": 2},
    "exported": {"folder": Path("run"), "path": Path("export")},
    "run_failed": {"error": RuntimeError("no memory")},
    "run_finished": {"status": "failed"},
}
RUN: Any = object()


class Recorder:
    """Implements every event with every argument."""

    def __init__(self, heard: list[Any] | None = None, name: str = "") -> None:
        self.heard: list[Any] = [] if heard is None else heard
        self.name = name

    def _hear(self, event: str, run: Any, **arguments: Any) -> None:
        assert run is RUN
        self.heard.append((self.name, event, arguments))

    @hookimpl
    def run_started(self, run: Any) -> None:
        self._hear("run_started", run)

    @hookimpl
    def model_ready(self, run: Any) -> None:
        self._hear("model_ready", run)

    @hookimpl
    def checkpoint_loaded(self, run: Any, path: Path, step: int) -> None:
        self._hear("checkpoint_loaded", run, path=path, step=step)

    @hookimpl
    def step_started(self, run: Any, step: int) -> None:
        self._hear("step_started", run, step=step)

    @hookimpl
    def rollout_finished(self, run: Any, step: int, samples: Sequence[Any]) -> None:
        self._hear("rollout_finished", run, step=step, samples=samples)

    @hookimpl
    def step_finished(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        self._hear("step_finished", run, step=step, metrics=metrics)

    @hookimpl
    def evaluated(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        self._hear("evaluated", run, step=step, metrics=metrics)

    @hookimpl
    def checkpoint_saved(self, run: Any, path: Path, step: int) -> None:
        self._hear("checkpoint_saved", run, path=path, step=step)

    @hookimpl
    def exported(self, folder: Path, path: Path) -> None:
        self._hear("exported", RUN, folder=folder, path=path)

    @hookimpl
    def run_failed(self, run: Any, error: BaseException) -> None:
        self._hear("run_failed", run, error=error)

    @hookimpl
    def run_finished(self, run: Any, status: str) -> None:
        self._hear("run_finished", run, status=status)


class Failing:
    @hookimpl
    def step_started(self, run: Any, step: int) -> None:
        raise ValueError("broken observer")


@pytest.mark.parametrize("event", ARGUMENTS)
def test_an_event_arrives_with_its_arguments(event: str) -> None:
    recorder = Recorder()
    Events([("recorder", recorder)]).tell(event, run=RUN, **ARGUMENTS[event])
    assert recorder.heard == [("", event, ARGUMENTS[event])]


def test_the_recorder_knows_all_events() -> None:
    from loomtune import hookspecs

    hooks = {name for name, spec in vars(hookspecs).items() if hasattr(spec, "loomtune_spec")}
    told = {name for name in hooks if {"run", "folder"} & vars(hookspecs)[name].__annotations__.keys()}
    assert told == {*ARGUMENTS, "resume_point", "fault_verdict", "foresee"}, "these three are questions"


def test_observers_hear_in_the_order_of_registration() -> None:
    heard: list[Any] = []
    Events([(name, Recorder(heard, name)) for name in "cab"]).tell("run_started", run=RUN)
    assert [name for name, _, _ in heard] == ["c", "a", "b"]


def test_one_raising_observer_stops_no_other_and_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = Recorder(), Recorder()
    events = Events([("before", before), ("failing", Failing()), ("after", after)])
    events.tell("step_started", run=RUN, step=1)
    events.tell("step_started", run=RUN, step=2)
    assert [arguments["step"] for _, _, arguments in before.heard] == [1, 2]
    assert before.heard == after.heard
    said = capsys.readouterr().err
    assert said.count("failing failed in step_started") == 1
    assert "broken observer" in said
    assert events.broken == {"failing": "ValueError: broken observer"}


def test_an_observer_may_name_fewer_arguments() -> None:
    class Brief:
        steps: list[int] = []  # noqa: RUF012 - of one test

        @hookimpl
        def step_finished(self, step: int) -> None:
            self.steps.append(step)

    Events([("brief", Brief())]).tell("step_finished", run=RUN, step=3, metrics={})
    assert Brief.steps == [3]


def test_each_run_has_a_manager_of_its_own() -> None:
    one, other = Recorder(), Recorder()
    Events([("recorder", one)]).tell("model_ready", run=RUN)
    Events([("recorder", other)])
    assert len(one.heard) == 1
    assert not other.heard


class Answering:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @hookimpl
    def resume_point(self, run: Any) -> Path | None:
        return self.answer

    @hookimpl
    def fault_verdict(self, run: Any, error: BaseException) -> str | None:
        return f"{self.answer}: {error}" if self.answer else None


def test_a_question_is_answered_by_the_first_plugin_that_knows_third_parties_first() -> None:
    events = Events([("built_in", Answering("b")), ("third", Answering("t")), ("silent", Answering(None))])
    assert events.ask("resume_point", run=RUN) == "t"
    assert events.ask("fault_verdict", run=RUN, error=RuntimeError("x")) == "t: x"
    assert Events([("silent", Answering(None))]).ask("resume_point", run=RUN) is None
