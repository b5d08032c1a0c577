"""What a rank that only generates does with what training says to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from loomtune.contracts import Completion, Sampling
from loomtune_plugins.rollouts.aside import Aside, Job
from loomtune_plugins.rollouts.links import Failed


class Line:
    """Says jobs one after the other, then that training is over. said: what it heard."""

    def __init__(self, *jobs: Job) -> None:
        self.jobs, self.said = list(jobs), list[Any]()

    @contextmanager
    def serves(self) -> Iterator[None]:
        yield

    def say(self, thing: Any, unless: Callable[[], bool]) -> bool:
        """As where training has heard it, and has said more before this rank could see that."""
        self.said.append(thing)
        return not unless()

    def hears(self, seconds: float) -> bool:
        return True

    def hear(self) -> Job | None:
        return self.jobs.pop(0) if self.jobs else None


class Engine(Aside):
    """Completes a prompt by its key; cannot where that is 0, and looks up where it is 1."""

    def __init__(self) -> None:
        super().__init__(1, 0)

    def generate(self, role: Any, prompts: Any, keys: Sequence[int], sampling: Sampling, world: Any) -> Any:
        if 0 in keys:
            raise MemoryError("no room")
        if 1 in keys:
            self.heed()
        return [Completion((key,)) for key in keys]


def job(*keys: int) -> Job:
    return Job([[1]] * len(keys), keys, Sampling(max_tokens=1), [])


def serve(line: Line) -> list[Any]:
    engine = SimpleNamespace(trained=lambda: {"weight": (2, 2)})
    world: Any = SimpleNamespace(aside=SimpleNamespace(lines=[line]))
    role: Any = SimpleNamespace(engine=engine)
    Engine().serve(role, world)
    return line.said


def test_it_serves_job_after_job_however_soon_the_next_one_comes() -> None:
    said = serve(Line(job(5, 6), job(), job(7)))
    assert said == [["weight"], [Completion((5,)), Completion((6,))], [], [Completion((7,))]]


def test_what_it_fails_of_is_told_before_it_fails() -> None:
    line = Line(job(0))
    with pytest.raises(MemoryError):
        serve(line)
    assert line.said[1:] == [Failed("MemoryError: no room")]


def test_it_leaves_in_the_middle_of_a_generation_when_training_is_over() -> None:
    assert serve(Line(job(1))) == [["weight"]]
