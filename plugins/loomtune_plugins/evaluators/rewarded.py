"""What the run's rewards say of the answers to prompts that are not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import Answer, Data, Evaluator, Row, Sampling
from loomtune.errors import Fault, UserError
from loomtune_plugins.evaluators.generation import generated, prompt
from loomtune_plugins.evaluators.settings import RewardedSettings
from loomtune_plugins.evaluators.split import check_split, limit

if TYPE_CHECKING:
    from loomtune.run import Run


class Rewarded(Evaluator):
    """Answers held-out prompts and has every chosen reward score the answers, whatever the objective learns from.

    `reward` is the mean of the weighted sum, over the answers that have a score of every reward with a weight;
    `reward/NAME` each reward's own mean. `reward_lost` is the share of answers without, `reward_tokens` their length
    and `reward_ended` the share that came to an end. A prompt that cannot be asked is left out.
    """

    scores = True

    def __init__(self, settings: RewardedSettings) -> None:
        self._settings = settings
        if faults := list(_faults(settings)):
            raise UserError(*faults)

    def check(self, data: Data) -> None:
        """Raises UserError where the data lack the split."""
        check_split(data, "reward", self._settings.split)

    def reads(self, splits: Sequence[str]) -> Sequence[str]:
        """None: prompts are made of rows."""
        return []

    def evaluate(self, run: Run) -> Mapping[str, float]:
        """Metrics, equal on every rank."""
        self.check(run.data)
        answers = self._answers(run)
        scores = {}
        for name, reward in run.rewards.items():
            run.heed()
            scores[name] = reward.score(run, answers)
        weighted = {name: reward.weight for name, reward in run.rewards.items() if reward.weight}
        sums = [math.fsum(weight * scores[name][i] for name, weight in weighted.items()) for i in range(len(answers))]
        return {
            "reward": _mean(sums),
            **{f"reward/{name}": _mean(found) for name, found in scores.items()},
            "reward_lost": _mean([math.isnan(one) for one in sums]),
            "reward_tokens": _mean([len(answer.tokens) for answer in answers]),
            "reward_ended": _mean([answer.ended for answer in answers]),
        }

    def _answers(self, run: Run) -> list[Answer]:
        settings = self._settings
        rows = run.rows(settings.split, limit(run, settings.rows))
        asked = [(row, tokens) for row in rows if (tokens := prompt(run, row)) for _ in range(settings.samples)]
        sampling = Sampling(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            stop=run.tokenizer.stops,
        )
        completions = generated(run, [tokens for _, tokens in asked], sampling)
        return [_answer(run, *one, tokens) for one, tokens in zip(asked, completions, strict=True)]


def _faults(settings: RewardedSettings) -> Iterator[Fault]:
    for name in ("max_tokens", "samples"):
        if getattr(settings, name) < 1:
            yield Fault(f"evaluator.reward.{name} is less than 1", f"set evaluator.reward.{name} to 1 or more")
    if settings.temperature < 0:
        yield Fault("evaluator.reward.temperature is below 0", "set it to 0 for the likeliest tokens, or above")
    elif not settings.temperature and settings.samples > 1:
        what = f"evaluator.reward.samples={settings.samples}, and every one would be the same"
        yield Fault(what, "set evaluator.reward.temperature=1")


def _answer(run: Run, row: Row, asked: Sequence[int], tokens: Sequence[int]) -> Answer:
    ended = bool(tokens) and tokens[-1] in run.tokenizer.stops
    return Answer(row, asked, tokens, run.tokenizer.decode(tokens[:-1] if ended else tokens), ended)


def _mean(numbers: Sequence[float]) -> float:
    """Over those that are numbers; NaN where none is."""
    found = [number for number in numbers if not math.isnan(number)]
    return math.fsum(found) / len(found) if found else math.nan
