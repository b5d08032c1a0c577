"""A whole run of the toy network in one process: what the tests of the loop, the keeper and the run's parts train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from loomtune.assembly import Assembly
from loomtune.contracts import (
    Adapter,
    Batch,
    Drawn,
    Guard,
    Judgement,
    LossSums,
    Objective,
    RoleSpec,
    Row,
    Sample,
    Schedule,
    Segment,
    Tokenizer,
    Verdict,
)
from loomtune.events import Events
from loomtune.keeper import Keeper
from loomtune.lease import Lease
from loomtune.loop import Loop
from loomtune.order import Order, Share
from loomtune.plan import Plan
from loomtune.run import Run
from loomtune.samplers import Counted
from loomtune.settings import BatchSettings, CheckpointSettings, EvaluateSettings, Settings
from loomtune.testing import toy
from loomtune.toolkit import log_probs
from loomtune.world import World
from loomtune_plugins.shardings.settings import SingleSettings
from loomtune_plugins.shardings.single import Single


def sample(text: str, **columns: float) -> Sample:
    """A text of which all but the first token is learned; each column holds one number for every target."""
    tokens = np.array([toy.ToyTokenizer.bos_id, *toy.ToyTokenizer().encode(text)], np.int32)
    each = {name: np.full(len(tokens) - 1, value, np.float32) for name, value in columns.items()}
    return Sample((Segment(tokens, np.arange(len(tokens)) > 0, columns=each),))


def whole(seed: int, rows: int) -> Order:
    """The order of one source, of which an epoch visits each row once."""
    return Order(seed, (Share("", rows, Fraction(rows)),))


class Rows(list[Sample]):
    """Samples in memory, as `loomtune.samples.Samples` gives them."""

    @property
    def lengths(self) -> list[int]:
        return [one.length for one in self]

    def row(self, index: int) -> dict[str, Any]:
        """None is kept."""
        return {}


TEXTS = ("warp", "a weft", "the heddle", "reed", "of a shuttle", "loom", "bobbin", "selvage", "treadle", "beam")


class Plain(Objective):
    """Cross-entropy. weight: what each target counts. seen: the samples' numbers of every micro-batch with a loss."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.seen: list[list[int]] = []

    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        raise AssertionError("toy runs have their samples")

    def fingerprint(self) -> str:
        return ""

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"loss": self.weight * len(batch.target)}

    def loss(self, roles: Any, batch: Batch, totals: Any, statistics: Any) -> LossSums:
        self.seen.append(batch.sample_numbers.tolist())
        return LossSums({"loss": -self.weight * log_probs(roles["policy"], batch).sum()})


class TwoNetworks(Plain):
    """A policy and a second trained network, each with a term of its own."""

    def roles(self) -> Mapping[str, RoleSpec]:
        return {"policy": RoleSpec(trained=True), "value": RoleSpec(trained=True)}

    def terms(self) -> Mapping[str, str]:
        return {"loss": "policy", "second": "value"}

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"loss": float(len(batch.target)), "second": float(len(batch.sample_numbers))}

    def loss(self, roles: Any, batch: Batch, totals: Any, statistics: Any) -> LossSums:
        of = {term: -log_probs(roles[role], batch).sum() for term, role in self.terms().items()}
        return LossSums(of)


class Online(Plain):
    """Makes several steps of each batch of rows, with a number for every target that no later step could make again."""

    STEPS = 3

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[int]] = []

    def steps_per_batch(self) -> int:
        return self.STEPS

    def experience(self, run: Run, drawn: Sequence[Drawn]) -> Sequence[Sequence[Sample]]:
        self.asked.append([one.row for one in drawn])
        drifted = float(next(iter(run.policy.engine.stream_weights()))[1].sum()) / 3
        return [[self._made(one.sample, inner + drifted) for one in drawn] for inner in range(self.STEPS)]

    def _made(self, given: Sample, advantage: float) -> Sample:
        (segment,) = given.segments
        columns = {"advantages": np.full(given.targets, advantage, np.float32)}
        return Sample((dataclasses.replace(segment, columns=columns),))

    def loss(self, roles: Any, batch: Batch, totals: Any, statistics: Any) -> LossSums:
        return LossSums({"loss": -(log_probs(roles["policy"], batch) * batch.columns["advantages"]).sum()})


class Steady(Schedule):
    """Half of the peak rate in odd steps, all of it in even ones."""

    def factor(self, step: int, steps: int) -> float:
        return 1.0 - step % 2 / 2


class Scripted(Guard):
    """Gives the verdicts written down for steps, each once. asked: (step, loss, norm) of every question."""

    def __init__(self, **verdicts: Verdict) -> None:
        self.verdicts = {int(step.removeprefix("step")): verdict for step, verdict in verdicts.items()}
        self.asked: list[tuple[int, float, float]] = []

    def judge(self, step: int, loss: float, gradient_norm: float) -> Judgement:
        self.asked.append((step, loss, gradient_norm))
        return Judgement(self.verdicts.pop(step, Verdict.CONTINUE), "as it was written")


class Diary:
    """Hears every step. steps: the metrics of each, without what a clock measured."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def hear(self, run: Run) -> None:
        tell = run.events.tell

        def told(event: str, **arguments: Any) -> None:
            if event == "step_finished":
                clocked = ("seconds", "tokens_per_second", "memory_bytes")
                self.steps.append({key: v for key, v in arguments["metrics"].items() if key not in clocked})
            tell(event, **arguments)

        run.events.tell = told  # type: ignore[method-assign]


@dataclasses.dataclass
class Toy:
    """A run of the toy network, and what it did."""

    assembly: Assembly
    diary: Diary

    @property
    def run(self) -> Run:
        return self.assembly.run

    def train(self) -> str:
        """From where the folder stands to the end; gives the status."""
        self.assembly.build_roles()
        self.assembly.keeper.restore()
        return Loop(self.run, self.assembly.keeper).train()

    def weights(self, role: str = "policy") -> dict[str, Any]:
        """Copies of a role's parameters."""
        return {name: tensor.clone() for name, tensor in self.run.roles[role].engine.stream_weights()}


def made(
    folder: Path,
    objective: Objective | None = None,
    *,
    texts: Sequence[str] = TEXTS,
    steps: int = 4,
    size: int = 2,
    micro: int = 1,
    every: int = 0,
    stop_after: int = 0,
    guards: Sequence[Guard] = (),
    adapter: Adapter | None = None,
    world: World | None = None,
    evaluate: EvaluateSettings | None = None,
    **parts: Any,
) -> Toy:
    """A run in a folder, ready to train. parts: other fields of `Run`."""
    settings = Settings(
        steps=steps,
        stop_after=stop_after,
        batch=BatchSettings(size=size, micro=micro),
        checkpoint=CheckpointSettings(every=every, background=False),
        evaluate=evaluate or EvaluateSettings(),
    )
    objective = objective or Plain()
    fields: dict[str, Any] = {
        "plan": Plan({**dataclasses.asdict(settings), "model": {"name": "toy"}}, {"toy": "toy 1.0"}),
        "settings": settings,
        "folder": folder,
        "world": world or toy.world(),
        "events": Events([]),
        "model": toy.ToyModel(),
        "tokenizer": toy.ToyTokenizer(),
        "data": SimpleNamespace(window=0),
        "objective": objective,
        "optimizer": toy.ToyOptimizer(),
        "schedule": Steady(),
        "kernel": toy.ToyKernel(),
        "rollout": None,
        "evaluators": {},
        "guards": list(guards),
        "trackers": {},
        "splits": {"train": Rows(sample(text) for text in texts)},
        "steps": steps,
        "sampler": Counted(whole(0, len(texts)), size, steps * size),
    }
    run, adapter = Run(**{**fields, **parts}), adapter or toy.ToyAdapter()
    keeper = Keeper(run, adapter, Lease.take(folder))
    diary = Diary()
    diary.hear(run)
    assembly = Assembly(run=run, keeper=keeper, adapter=adapter, sharding=Single(SingleSettings()))
    return Toy(assembly, diary)
