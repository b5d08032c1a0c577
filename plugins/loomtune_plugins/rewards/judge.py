"""What a language model says of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING

from loomtune.contracts import Answer, Data
from loomtune.errors import RunFailed, UserError
from loomtune_plugins.endpoint import Ask, Client, Reply, opened
from loomtune_plugins.endpoint.turns import told
from loomtune_plugins.rewards import judge_words as words
from loomtune_plugins.rewards.judge_settings import QUESTION, TEMPLATES, JudgeSettings
from loomtune_plugins.rewards.scored import Failure, Scored, Scores

if TYPE_CHECKING:
    from loomtune.run import Run


class Judge(Scores):
    """A score between 0 and 1. What the model does not answer, or answers without a score, is left out."""

    name = "judge"

    def __init__(self, settings: JudgeSettings) -> None:
        if settings.read not in TEMPLATES:
            what = f"reward.judge.read={settings.read} is no way to read a score"
            raise UserError.of(what, f"set it to one of: {', '.join(TEMPLATES)}")
        if not settings.lowest < settings.highest or settings.max_tokens < 1 or settings.temperature < 0:
            what = "reward.judge: lowest is less than highest, max_tokens 1 or more, temperature 0 or more"
            raise UserError.of(what, "mend them")
        self.weight = settings.weight
        self._settings = settings
        self._template = words.template(settings)
        _heeded(settings, self._template)
        opened(settings, "reward.judge")  # says all that is wrong with them

    def check(self, data: Data) -> None:
        """Raises UserError where the model cannot be there, or rows lack what the template shows; nobody is asked."""
        first = next(iter(data.rows("train")), {})
        if lacking := words.lacking(self._template, first):
            what = f"reward.judge.template shows {{row.{lacking[0]}}}, which the first row of `train` has not"
            raise UserError.of(what, f"show one of: {', '.join(map(str, first))}")
        self._client.check()

    def found(self, run: Run, answers: Sequence[Answer]) -> Sequence[Scored]:
        """What fails on one rank must not leave the others waiting for it."""
        criteria = self._settings.criteria or [QUESTION]
        try:
            asks = [self._ask(run, answer, criterion) for answer in answers for criterion in criteria]
        except KeyError as error:
            return [Failure("a row lacks what reward.judge.template shows", str(error))] * len(answers)
        try:
            replies = self._client.answer(asks, lambda: run.stop.requested)
        except (UserError, RunFailed) as error:
            return [Failure("the judge cannot be asked", str(error))] * len(answers)
        scores = [self._score(reply) for reply in replies]
        return [_mean(scores[at : at + len(criteria)]) for at in range(0, len(scores), len(criteria))]

    @cached_property
    def _client(self) -> Client:
        return opened(self._settings, "reward.judge")

    def __getstate__(self) -> dict[str, object]:
        """Its connections, or its model, stay where they are."""
        return {key: value for key, value in self.__dict__.items() if key != "_client"}

    def _ask(self, run: Run, answer: Answer, criterion: str) -> Ask:
        settings = self._settings
        known = {
            "prompt": _asked(run, answer),
            "completion": answer.text,
            "criterion": criterion,
            "lowest": f"{settings.lowest:g}",
            "highest": f"{settings.highest:g}",
        }
        messages = [{"role": "user", "content": words.filled(self._template, known, answer)}]
        if settings.system:
            messages.insert(0, {"role": "system", "content": settings.system})
        options = (words.YES, words.NO) if settings.read == "choice" else ()
        return Ask(messages=messages, max_tokens=settings.max_tokens, temperature=settings.temperature, options=options)

    def _score(self, reply: Reply) -> Scored:
        settings = self._settings
        if reply.failed:
            return Failure("the judge gives no answer", reply.failed)
        if settings.read == "choice":
            return words.preferred(reply.log_probs)
        found = (words.from_json if settings.read == "json" else words.number)(reply.text)
        if found is None:
            return Failure("the judge's answer has no score", repr(reply.text[-200:]))
        if not settings.lowest <= found <= settings.highest:
            return Failure("the judge's score is out of bounds", f"{found:g}")
        return (found - settings.lowest) / (settings.highest - settings.lowest)


def _heeded(settings: JudgeSettings, template: str) -> None:
    """Raises UserError where a letter is wanted and settings are of numbers, or of texts."""
    if settings.read != "choice":
        return
    plain, shown = JudgeSettings(), [key for key in ("lowest", "highest") if f"{{{key}}}" in template]
    for key in ("lowest", "highest", "max_tokens", "temperature"):
        if key not in shown and getattr(settings, key) != getattr(plain, key):
            what = f"reward.judge.{key} would be without effect: with read=choice a letter's probability is the score"
            raise UserError.of(what, "leave it out")


def _asked(run: Run, answer: Answer) -> str:
    """The prompt as people wrote it; else as the model was asked."""
    prompt = answer.row.get("prompt")
    if isinstance(prompt, str):
        return prompt
    return told(prompt) if isinstance(prompt, list) else run.tokenizer.decode(answer.prompt)


def _mean(scores: Sequence[Scored]) -> Scored:
    failed = next((one for one in scores if isinstance(one, Failure)), None)
    return failed or fmean(one for one in scores if not isinstance(one, Failure))
