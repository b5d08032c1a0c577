"""A run as trackers see it, and a short story of one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from loomtune.events import Events
from loomtune.settings import Settings


@dataclass
class FakePlan:
    settings: dict[str, Any] = field(default_factory=lambda: {"steps": 4, "model": {"name": "random"}})
    versions: dict[str, str] = field(default_factory=lambda: {"loomtune_plugins.models": "loomtune 0.1.0"})
    hash: str = "abcdef"


@dataclass
class FakeRun:
    """What trackers read of `loomtune.run.Run`."""

    folder: Path
    plan: FakePlan = field(default_factory=FakePlan)
    settings: Settings = field(default_factory=Settings)
    steps: int = 4
    step: int = 0
    trackers: dict[str, Any] = field(default_factory=dict)


class Story:
    """Tells events as the loop does, through the run's own event manager."""

    def __init__(self, run: FakeRun, **trackers: Any) -> None:
        self.run = run
        run.trackers = trackers
        self.events = Events(trackers.items())
        self.tell("run_started")

    def tell(self, event: str, **arguments: Any) -> None:
        self.events.tell(event, run=self.run, **arguments)
        assert not self.events.broken, self.events.broken

    def step(self, step: int, **more: float) -> None:
        self.run.step = step
        metrics = {
            "loss": 4.0 / step,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "tokens_per_second": 1234.0,
            "seconds": 0.5,
            **more,
        }
        self.tell("step_started", step=step)
        self.tell("step_finished", step=step, metrics=metrics)

    def evaluated(self, step: int, **metrics: float) -> None:
        self.tell("evaluated", step=step, metrics=metrics)

    def saved(self, step: int) -> None:
        self.tell("checkpoint_saved", path=self.run.folder / f"step-{step}", step=step)

    def loaded(self, step: int) -> None:
        self.tell("checkpoint_loaded", path=self.run.folder / f"step-{step}", step=step)

    def end(self, status: str = "completed") -> None:
        self.tell("run_finished", status=status)


@pytest.fixture
def story(tmp_path: Path) -> Callable[..., Story]:
    folder = tmp_path / "a-run"
    folder.mkdir()
    return lambda **trackers: Story(FakeRun(folder), **trackers)
