"""The share of distillation that is on-policy: answers that the policy writes, as the teacher would go on from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from loomtune.contracts import Batch, Drawn, Row, Sample, Tokenizer
from loomtune.errors import Fault
from loomtune_plugins.objectives.distill_settings import DistillSettings
from loomtune_plugins.objectives.encoding import prompt
from loomtune_plugins.objectives.written import Written, write

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.run import Run

OWN = {"on_policy": 0.0, "written": 0.0, "ended": 0.0}
"""Numbers of a row's own answer. Of one that the policy wrote: 1, its tokens, and whether the end token is among them.

Beside them `prompt` says how many tokens come before the answer.
"""


@dataclass(frozen=True, slots=True)
class OnPolicy:
    """Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), algorithm 1, row by row.

    The paper decides for a whole batch, with probability lambda, whether the policy writes its answers. Here each visit
    of a row decides for itself: the same share in expectation, with less variance, whatever `batch.size` is. As in the
    paper, no gradient goes through the sampling.
    """

    settings: DistillSettings

    def sample(self, sample: Sample, row: Row, tokenizer: Tokenizer) -> Sample:
        """A row's own sample, which says where its prompt ends.

        Raises ValueError, in words for the user, where there is no prompt or the answer's sample begins otherwise.
        """
        (segment,) = sample.segments
        asked = _asked(row, tokenizer, self.settings)[: len(segment.tokens)]
        if not asked:
            raise ValueError("has an empty prompt, which the policy cannot answer; objective.on_policy=0 can learn it")
        if segment.tokens[: len(asked)].tolist() != asked:
            raise ValueError("has other tokens before its last answer than when asked; objective.turns=last mends that")
        return replace(sample, numbers={"prompt": float(len(asked)), **OWN})

    def drawn(self, run: Run, drawn: Sequence[Drawn]) -> list[Drawn]:
        """A step's rows, with what the policy writes now in the place of some of the answers; the same on every rank.

        Which depends on the seed, the step and the place in it. A row whose prompt fills `max_length` keeps its answer.
        """
        chosen = [place for place, one in enumerate(drawn) if self._falls_on(run, place) and _room(one.sample, run)]
        prompts = [_prompt(drawn[place].sample) for place in chosen]
        most, temperature = self.settings.max_new_tokens, self.settings.sampling_temperature
        answers = write(run, prompts, max_tokens=most, temperature=temperature) if chosen else []
        made = list(drawn)
        for place, answer in zip(chosen, answers, strict=True):
            made[place] = replace(drawn[place], sample=_replaced(drawn[place].sample, answer))
        return made

    def _falls_on(self, run: Run, place: int) -> bool:
        from loomtune.world import derive

        draw = np.random.default_rng(derive(run.settings.seed, "on_policy", run.step, place)).random()
        return bool(draw < self.settings.on_policy)


def metrics(batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Share of samples that the policy wrote, their mean length in tokens, and the share of them that came to an end.

    Nothing where samples do not say, as recorded ones do not.
    """
    if "on_policy" not in batch.columns:
        return {}
    written, tokens, ended = (batch.columns[name] for name in OWN)
    count = written.sum()
    return {
        "on_policy": (count, written.new_tensor(float(len(written)))),
        "completions/mean_length": (tokens.sum(), count),
        "completions/ended": (ended.sum(), count),
    }


def faults(settings: DistillSettings) -> Iterator[Fault]:
    """What is wrong with the settings, and which would have no effect."""
    if not 0 <= settings.on_policy <= 1:
        yield Fault(f"objective.on_policy={settings.on_policy} is no share", "set objective.on_policy between 0 and 1")
    if settings.max_new_tokens < 1:
        what = f"objective.max_new_tokens={settings.max_new_tokens} leaves no room for an answer"
        yield Fault(what, "set objective.max_new_tokens to at least 1")
    if settings.sampling_temperature < 0:
        what = f"objective.sampling_temperature={settings.sampling_temperature} is negative"
        yield Fault(what, "set objective.sampling_temperature to 0 (greedy) or more")
    defaults = {field.name: field.default for field in fields(settings)}
    for name in ("max_new_tokens", "sampling_temperature"):
        if settings.on_policy == 0 and (value := getattr(settings, name)) != defaults[name]:
            what = f"objective.{name}={value} has no effect with objective.on_policy=0, where the policy writes nothing"
            yield Fault(what, "leave it out, or set objective.on_policy")


def _asked(row: Row, tokenizer: Tokenizer, settings: DistillSettings) -> list[int]:
    """The tokens before a row's last answer. Raises ValueError for plain text, which has none."""
    if "messages" in row:
        row = {**row, "messages": _through_the_answer(row["messages"])}
    elif "completion" not in row:
        raise ValueError("is plain text without a prompt, which the policy cannot answer; set objective.on_policy=0")
    return prompt(row, tokenizer, separator=settings.separator, bos=settings.bos, system=settings.system)


def _through_the_answer(messages: Sequence[Mapping[str, object]]) -> Sequence[Mapping[str, object]]:
    """A conversation up to the assistant's last turn: what comes after it is no part of the sample either."""
    last = max(index for index, message in enumerate(messages) if message.get("role") == "assistant")
    return messages[: last + 1]


def _room(sample: Sample, run: Run) -> bool:
    return sample.numbers["prompt"] < run.max_length


def _prompt(sample: Sample) -> list[int]:
    tokens: list[int] = sample.segments[0].tokens[: int(sample.numbers["prompt"])].tolist()
    return tokens


def _replaced(sample: Sample, answer: Written) -> Sample:
    """A sample with another answer. What is learned of the tokens before it stays so (`train_on=all`, other turns)."""
    learned = sample.segments[0].is_target[: len(answer.prompt)]
    own = {"on_policy": 1.0, "written": float(len(answer.tokens)), "ended": float(answer.ended)}
    return replace(sample, segments=(answer.segment(learned),), numbers={**sample.numbers, **own})
