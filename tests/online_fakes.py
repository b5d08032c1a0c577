"""A run of the toy network whose completions and rewards are said beforehand: for tests of learning from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loomtune.batching import collate
from loomtune.contracts import Answer, Completion, Drawn, Objective, Reward, Rollout, Sample, Sampling
from loomtune.run import Run
from loomtune.testing import toy
from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.objectives.online.grpo import Grpo
from loomtune_plugins.objectives.online.grpo_settings import GrpoSettings
from loomtune_plugins.objectives.online.rloo import Rloo
from loomtune_plugins.objectives.online.rloo_settings import RlooSettings

EOS = ToyTokenizer.eos_id
A, B, C = (toy.SPECIAL + ord(letter) for letter in "abc")
ROWS = [{"prompt": "a loom ", "gold": "x"}, {"prompt": "warp ", "gold": "y"}, {"prompt": "reed ", "gold": "z"}]


class Scripted(Rollout):
    """Completes with what it is told to, in turn. asked: (prompts, keys, sampling) of each call."""

    def __init__(self, *completions: Sequence[int], log_probs: Callable[[Sequence[int]], list[float]] | None = None):
        self.completions, self.log_probs = completions or ([A, EOS], [B, EOS]), log_probs
        self.asked: list[tuple[Any, Any, Sampling]] = []

    def generate(self, role: Any, prompts: Any, keys: Any, sampling: Sampling, world: Any) -> list[Completion]:
        self.asked.append((prompts, keys, sampling))
        made = [list(self.completions[i % len(self.completions)]) for i in range(len(prompts))]
        return [Completion(tokens, self.log_probs(tokens) if self.log_probs else ()) for tokens in made]


class Worth(Reward):
    """What a function says of an answer. seen: the answers of each call."""

    def __init__(self, worth: Callable[[Answer], float], weight: float = 1.0) -> None:
        self.worth, self.weight, self.seen = worth, weight, list[Sequence[Answer]]()

    def score(self, run: Run, answers: Sequence[Answer]) -> list[float]:
        self.seen.append(answers)
        return [self.worth(one) for one in answers]


def letters(answer: Answer) -> float:
    """1 for an answer that begins with `a`."""
    return float(answer.text.startswith("a"))


class Heard:
    """Hears what runs tell."""

    def __init__(self) -> None:
        self.rollouts: list[tuple[int, Sequence[Mapping[str, Any]]]] = []

    def tell(self, event: str, **arguments: Any) -> None:
        assert event == "rollout_finished"
        self.rollouts.append((arguments["step"], arguments["samples"]))


def grpo(worth: Any = letters, *, others: Mapping[str, Reward] | None = None, **settings: Any) -> Grpo:
    made = Grpo(GrpoSettings(**{"group": 2, "max_new_tokens": 8, **settings}))
    made.use({}, {"worth": Worth(worth), **(others or {})})
    return made


def run_of(objective: Objective, rollout: Rollout | None = None, *, max_length: int = 0) -> Run:
    run = toy.run(Path(), {})
    run.settings.max_length, run.settings.seed = max_length, 5
    run.objective, run.rollout, run.roles = objective, rollout or Scripted(), toy.roles(objective)
    run.events = Heard()  # type: ignore[assignment]
    run.draw = lambda: drawn(run, ROWS, first=100)
    return run


def drawn(run: Run, rows: Sequence[Mapping[str, Any]] = ROWS[:2], first: int = 0) -> list[Drawn]:
    own = [run.objective.sample(row, ToyTokenizer(), run.max_length) for row in rows]
    return [Drawn(i, sample, row, first + i) for i, (sample, row) in enumerate(zip(own, rows, strict=True))]


def steps_of(run: Run, rows: Sequence[Mapping[str, Any]] = ROWS[:2]) -> list[list[Sample]]:
    return [list(step) for step in run.objective.experience(run, drawn(run, rows))]


def texts(sample: Sample) -> list[str]:
    return [ToyTokenizer().decode(segment.tokens.tolist()) for segment in sample.segments]


def rloo(**settings: Any) -> Rloo:
    made = Rloo(RlooSettings(**{"group": 2, "max_new_tokens": 8, **settings}))
    made.use({}, {"worth": Worth(letters)})
    return made


def learned(run: Run, step: Sequence[Sample]) -> tuple[float, dict[str, float]]:
    """The loss of a step and its metrics; gradients stay."""
    batch = collate(step, range(len(step)), 0)
    statistics = run.objective.statistics(run.roles, [batch], toy.world())
    totals = run.objective.weights(batch)
    sums = run.objective.loss(run.roles, batch, totals, statistics)
    loss = sums.terms["policy"] / totals["policy"]
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), {
        name: float(value / weight) for name, (value, weight) in sums.metrics.items() if weight
    }


def gradient(run: Run) -> float:
    network: Any = run.policy.engine
    return float(sum(p.grad.abs().sum() for p in network.network.parameters() if p.grad is not None))


def count_passes(run: Run) -> dict[str, int]:
    """Counts the passes over each role from here on."""
    passes: dict[str, int] = {}

    def counting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            passes[name] = passes.get(name, 0) + 1
            return forward(*given, **named)

        return counted

    for name, role in run.roles.items():
        role.engine.forward = counting(name, role.engine.forward)  # type: ignore[method-assign]
    return passes
