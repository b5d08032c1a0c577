"""The score that a trained reward model gives."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from loomtune.contracts import Answer, Batch, Reward, RoleSpec, Sample, Segment, View
from loomtune.contracts.saved import HEADS
from loomtune.errors import UserError
from loomtune_plugins.rewards import model_files
from loomtune_plugins.rewards.model_settings import ModelSettings
from loomtune_plugins.scalar_scores import HEAD, after_the_stop, scored_at_the_end, scores

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.contracts.role import Role
    from loomtune.contracts.sharding import Region, StateReader
    from loomtune.run import Run

NAME = f"{HEADS}{HEAD}.weight"
TOGETHER = 8
"""Answers to one prompt that are read beside each other at most, so that its computation may be shared."""


class RewardByModel(Reward):
    """Reads an answer as objective=reward does: by a scalar head at its last token.

    The network is the frozen role `reward`; or the policy's own, within which the adapter of the reward run is put in
    the place of the one that is trained: what computes is then the reward model, whose base is the policy's.
    """

    def __init__(self, settings: ModelSettings) -> None:
        self.settings, self.weight = settings, settings.weight
        self._worn: tuple[StateReader, Tensor] | None = None
        self._tails: dict[int, list[int]] = {}

    def roles(self) -> Mapping[str, RoleSpec]:
        """A frozen network of its own, unless the policy's is lent."""
        return {} if self.settings.adapter else {HEAD: RoleSpec(trained=False, head=HEAD)}

    def fingerprint(self) -> str:
        """Of the adapter's checkpoint, whose manifest has the digest of each of its files."""
        if not self.settings.adapter:
            return ""
        checkpoint = model_files.worn(self.settings.adapter).checkpoint
        assert checkpoint is not None, "`worn` refuses what is no checkpoint"
        return hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()

    def score(self, run: Run, answers: Sequence[Answer]) -> list[float]:
        """NaN for one that has no room for the token behind it, by which it is scored."""
        room = run.model.context() - run.virtual_tokens
        texts = [self._tokens(run, answer) for answer in answers]
        fits = [len(answer.prompt) + len(text) < room for answer, text in zip(answers, texts, strict=True)]
        found = iter(self._read(run, [(a.prompt, t) for a, t, fit in zip(answers, texts, fits, strict=True) if fit]))
        return [self._scaled(next(found)) if fit else math.nan for fit in fits]

    def _tokens(self, run: Run, answer: Answer) -> list[int]:
        """An answer as rows with such a prompt had it, where it came to an end: with what they have behind that."""
        tokens = [int(token) for token in answer.tokens]
        plain = isinstance(answer.row.get("prompt", answer.row.get("messages")), str)
        if plain or not answer.ended or not tokens:
            return tokens
        if (stop := tokens[-1]) not in self._tails:
            self._tails[stop] = after_the_stop(run.tokenizer, stop)
        return [*tokens, *self._tails[stop]]

    def _scaled(self, score: float) -> float:
        settings = self.settings
        found = (score - settings.shift) * settings.scale
        return max(-settings.clip, min(settings.clip, found)) if settings.clip else found

    def _read(self, run: Run, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """A number for each prompt and answer, in order. Every rank has the same ones; they share them out."""
        samples = list(laid(texts, run.tokenizer.eos_id))
        worn = self._open(run) if self.settings.adapter else None
        with run.policy.engine.wearing(worn[0]) if worn else nullcontext():
            found = run.read(samples, lambda roles, batch: self._scores(roles, batch, worn[1] if worn else None))
        return [float(number) for each in found for number in each]

    def _scores(self, roles: Mapping[str, Role], batch: Batch, head: Tensor | None) -> Tensor:
        from torch.nn import functional as F

        def by_head(view: View) -> Tensor:
            assert head is not None
            return F.linear(view.states, head.to(view.states))

        return scores(roles[HEAD], batch) if head is None else scores(roles["policy"], batch, by_head)

    def _open(self, run: Run) -> tuple[StateReader, Tensor]:
        """What the reward run has learned, by name, and its head. Raises UserError where it has no such parameters."""
        if self._worn is None:
            place = model_files.worn(self.settings.adapter).checkpoint if run.world.leads else None
            read, shapes = run.trained_by(run.world.broadcast(place))
            check_same(dict(run.policy.engine.trained()), shapes, f"{model_files.KEY}={self.settings.adapter}")

            def adapter(name: str, tensor: str, region: Region | None) -> Tensor:
                if name.startswith(HEADS):
                    raise KeyError(name)  # heads of the policy's own, a value's say, are not read meanwhile
                return read(name, tensor, region)

            self._worn = adapter, read(NAME, "weight", None).to(run.world.device)
        return self._worn


def laid(texts: Sequence[tuple[Sequence[int], Sequence[int]]], after: int) -> Sequence[Sample]:
    """Answers behind their prompt, some of those that follow each other and have the same one in one sample."""
    samples = []
    for prompt, group in groupby(texts, lambda text: list(text[0])):
        before = Segment(np.array(prompt, np.int32), np.zeros(len(prompt), np.bool_))
        answers = [_scored(tokens, after) for _, tokens in group]
        parts = (answers[at : at + TOGETHER] for at in range(0, len(answers), TOGETHER))
        samples += [Sample((before, *part)) for part in parts]
    return samples


def _scored(tokens: Sequence[int], after: int) -> Segment:
    """One without tokens is scored where the prompt ends."""
    ids = np.array(tokens, np.int32)
    if not len(ids):
        return Segment(np.array([after], np.int32), np.ones(1, np.bool_), 0)
    return scored_at_the_end(Segment(ids, np.ones(len(ids), np.bool_), 0), after)


def check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], said: str) -> None:
    """Raises UserError where two adapters differ in a name or a shape. Heads are no part of them."""
    one, other = ({n: tuple(s) for n, s in shapes.items() if not n.startswith(HEADS)} for shapes in (ours, theirs))
    if one == other:
        return
    name = min(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
    there, here = (f"{shape}" if shape else "not there" for shape in (other.get(name), one.get(name)))
    what = f"{said} is no adapter of the policy's form: '{name}' is {there} in it and {here} in the policy"
    cure = (
        f"give both runs the same adapter settings, or merge it with `loomtune export` and set {model_files.ROLE}.path"
    )
    raise UserError.of(what, cure)
