"""Losses of recorded batches and log-probabilities: how an author of a plugin checks numbers from elsewhere.

Batches are taken in the layouts of TRL's collators, and settings under its names or ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from loomtune.batching import collate
from loomtune.catalogue import Catalogue, installed
from loomtune.contracts import Batch, Engine, Objective, Pairs, Reader, Role, Sample, Segment, View
from loomtune.contracts.batch import NO_PARENT
from loomtune.errors import UserError, near
from loomtune.offers import Offer
from loomtune.testing import toy
from loomtune.testing.completions import Scores, is_completions, plainly, samples_of_completions

IGNORED = -100
"""The label of what is not learned."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What an objective made of a batch. loss: as it is logged. terms: each divided by its weight. metrics: means."""

    loss: float
    terms: Mapping[str, float]
    metrics: Mapping[str, float] = field(default_factory=dict)


def loss_of(
    objective: str,
    settings: Mapping[str, Any],
    batch: Mapping[str, Any],
    policy: nn.Module,
    reference: nn.Module | None = None,
    roles: Mapping[str, nn.Module] | None = None,
) -> Recorded:
    """The loss of a recorded batch as one whole step of a run on one process.

    objective: its name, such as `dpo`. settings: of it and of its losses, by TRL's names (`loss_type`, `beta`) or ours.
    policy, reference, roles: causal language models of transformers, or, for scalar heads, their models for sequence
    classification. Gradients are left in the parameters of those that are trained. Raises UserError for a setting that
    nobody knows, and ValueError for a layout that nobody knows.
    """
    made = built(objective, settings)
    given = {"policy": policy, **({"reference": reference} if reference is not None else {}), **(roles or {})}
    wanted = made.roles()
    views = {
        name: Role(name, cast(Engine, ModuleEngine(given[name], role.head)), head=role.head, trained=role.trained)
        for name, role in wanted.items()
    }
    asked = {name: getattr(made, name, False) for name in ("learns_prompts", "mismatches")}
    if is_completions(batch):
        samples = samples_of_completions(batch, made)
    else:
        samples = samples_of(batch, prompts=asked["learns_prompts"], mismatched=asked["mismatches"])
    collated = collate(samples, range(len(samples)), 0)
    with torch.no_grad():
        statistics = made.statistics(views, [collated], toy.world())
    totals = made.weights(collated)
    sums = made.loss(views, collated, totals, statistics)
    terms = {name: value / totals[name] for name, value in sums.terms.items()}
    total = torch.stack(list(terms.values())).sum()
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
    metrics = {name: float(value.detach() / weight) for name, (value, weight) in sums.metrics.items()}
    return Recorded(float(total.detach()), {name: float(value.detach()) for name, value in terms.items()}, metrics)


def loss_from_log_probs(
    objective: str,
    settings: Mapping[str, Any],
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_tokens: Sequence[int],
    rejected_tokens: Sequence[int],
    reference_chosen: Sequence[float] | None = None,
    reference_rejected: Sequence[float] | None = None,
) -> Recorded:
    """The loss of pairs of answers of which only the summed log-probabilities are known, one entry a pair."""
    made: Any = built(objective, settings)
    numbers = [torch.tensor(list(map(float, values))) for values in (chosen, rejected, chosen_tokens, rejected_tokens)]
    zeros = torch.zeros_like(numbers[0])
    references = [
        zeros if values is None else torch.tensor(list(map(float, values)))
        for values in (reference_chosen, reference_rejected)
    ]
    pairs = Pairs(
        beta=made.settings.beta,
        chosen=numbers[0],
        rejected=numbers[1],
        reference_chosen=references[0],
        reference_rejected=references[1],
        chosen_tokens=numbers[2],
        rejected_tokens=numbers[3],
        prompt=zeros,
        prompt_tokens=zeros,
        chosen_logits=made.preference(numbers[0] - references[0]),
        rejected_logits=made.preference(numbers[1] - references[1]),
        importance=torch.ones_like(zeros),
    )
    terms = {}
    for name, loss in made.losses.items():
        statistics = loss.statistics([pairs], toy.world()) if loss.looks_around else None
        weight = numbers[2].sum() if loss.by_tokens else len(zeros)
        terms[name] = float(loss.weight * loss.of(pairs, statistics).sum() / weight)
    return Recorded(sum(terms.values()), terms)


def loss_from_token_log_probs(
    objective: str,
    settings: Mapping[str, Any],
    log_probs: Sequence[Sequence[float]],
    advantages: Sequence[Any],
    old: Sequence[Sequence[float]] | None = None,
    reference: Sequence[Sequence[float]] | None = None,
    mask: Sequence[Sequence[float]] | None = None,
) -> Recorded:
    """The policy's loss on scored completions of which only the tokens' log-probabilities are known.

    log_probs, old, reference: `(rows, longest)`; old: of the policy that drew them, by default this one. advantages:
    `(rows,)` or `(rows, longest)`. mask: which tokens there are; None: each row is as long as its log-probabilities.
    """
    made: Any = built(objective, settings)
    lengths = mask if mask is not None else [[1.0] * len(row) for row in log_probs]
    given: dict[str, Any] = {"advantages": advantages, "completion_mask": lengths, "completion_ids": lengths}
    given |= {"old": old, "reference": reference}
    given |= {"prompt_ids": [[0]] * len(log_probs), "prompt_mask": [[1]] * len(log_probs)}
    batch = collate(samples := samples_of_completions(given, made), range(len(samples)), 0)
    here = [value for row, kept in zip(log_probs, lengths, strict=True) for value, k in zip(row, kept) if k]  # noqa: B905
    value, _, metrics = made.learned(torch.tensor(here), batch)
    loss = float(value / made.weights(batch)["policy"])
    means = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    return Recorded(loss, {"policy": loss}, means)


def built(objective: str, settings: Mapping[str, Any]) -> Objective:
    """An objective with its losses. Raises UserError for settings that are not known."""
    catalogue = installed()
    entry = catalogue.find("objective", objective)
    own, losses = _translated(catalogue, entry.offer, settings)
    known = [each.name for each in fields(entry.offer.schema)]
    if strange := [key for key in own if key not in known]:
        what = f"objective={objective} has no setting '{strange[0]}'.{near(strange[0], known)}"
        raise UserError.of(what, f"there are: {', '.join(known)}")
    made: Objective = catalogue.build("objective", objective, own)
    rewards = {"recorded": Scores()} if made.takes_rewards() else {}
    made.use({name: catalogue.build("loss", name, given) for name, given in losses.items()}, rewards)
    return made


def _translated(
    catalogue: Catalogue, offer: Offer[Objective], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings of the objective, and of each loss by its name.

    A loss that is named takes the place of the first that the objective brings along; several may be, with weights.
    """
    left, brought = plainly(settings), offer.brings.get("loss", ())
    named = None if "loss_type" in offer.aliases else left.pop("loss_type", None)
    first = list(brought[:1]) if named is None else [named] if isinstance(named, str) else list(named)
    losses: dict[str, dict[str, Any]] = {name: {} for name in (*first, *brought[1:])}
    for name, weight in zip(first, left.pop("loss_weights", None) or (), strict=False):
        losses[name]["weight"] = float(weight)
    own = {}
    for key, value in left.items():
        axis, _, rest = (ours := offer.aliases.get(key, key)).partition(".")
        takers = [] if rest else [name for name in losses if _taken(catalogue, name, ours)]
        if rest:
            name, _, setting = rest.partition(".")
            losses.setdefault(name, {})[setting] = value
        elif takers:
            for name in takers:
                losses[name][_taken(catalogue, name, ours)] = value
        elif axis:
            own[axis] = value
    return own, losses


def _taken(catalogue: Catalogue, loss: str, key: str) -> str:
    """A loss' own name of a setting; empty where it has none."""
    offer = catalogue.find("loss", loss).offer
    ours = offer.aliases.get(key, key)
    return ours if ours in {field.name for field in fields(offer.schema)} else ""


class ModuleEngine:
    """The forward of an engine around a model of transformers; every segment sees itself and its ancestors."""

    def __init__(self, module: Any, head: str) -> None:
        self.module = module
        found: Any = self.module.get_output_embeddings() if head == "lm" else self.module.score
        self.head: nn.Module = found
        self.name = head

    def forward(self, batch: Batch, reader: Reader, *, adapter: bool = True) -> Any:
        visible = toy.ToyKernel().attention(batch, None)["visible"].unsqueeze(1)
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        decoder = self.module.get_decoder() if hasattr(self.module, "get_decoder") else self.module.base_model
        found = decoder(input_ids=batch.tokens, position_ids=batch.positions, attention_mask=mask, use_cache=False)
        states = found.last_hidden_state.flatten(0, 1).index_select(0, batch.predict_from)
        return reader(View(states, slice(None), {self.name: self.head}, {}))

    def evaluating(self) -> Any:
        return torch.no_grad()


def samples_of(batch: Mapping[str, Any], *, prompts: bool = False, mismatched: bool = False) -> list[Sample]:
    """A recorded batch as samples. prompts: whether prompts of pairs are targets too. mismatched: whether answers that
    were recorded behind the prompts of others are wanted.

    Raises ValueError for a layout that is not known.
    """
    arrays = {key: np.asarray(value) for key, value in batch.items()}
    if "chosen_input_ids" in arrays:
        rows = {}
        for answer in ("chosen", "rejected"):
            parts = [arrays[f"{answer}_{key}"] for key in ("input_ids", "labels", "attention_mask")]
            rows[answer] = [_row(*each) for each in zip(*parts, strict=True)]
        return [_answers(both, prompts=prompts) for both in zip(rows["chosen"], rows["rejected"], strict=True)]
    if "completion_mask" in arrays and "label" not in arrays:
        ids, mask, learned = (arrays[key] for key in ("input_ids", "attention_mask", "completion_mask"))
        found = [_row(ids[i], np.where(learned[i] > 0, ids[i], IGNORED), mask[i]) for i in range(len(ids))]
        half = len(found) // 2
        return [_answers(both, prompts=prompts) for both in zip(found[:half], found[half:], strict=True)]
    if {"completion_mask", "label"} <= arrays.keys():
        return [_labelled(arrays, i, mismatched) for i in range(len(arrays["label"]))]
    if arrays.keys() - {"margin"} == {"input_ids", "attention_mask"}:
        found = [_row(ids, ids, mask) for ids, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True)]
        half = len(found) // 2
        margins = arrays.get("margin", np.zeros(half))
        return [_scored(*each) for each in zip(found[:half], found[half:], margins, strict=True)]
    if "labels" in arrays:
        keys = ("input_ids", "labels", "attention_mask")
        return [_single(*_row(*(arrays[key][i] for key in keys))) for i in range(len(arrays["labels"]))]
    raise ValueError(f"no layout is known of {', '.join(sorted(arrays))}")


Row = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _row(ids: Any, labels: Any, mask: Any) -> Row:
    """Tokens without padding, and which are targets."""
    real = np.asarray(mask) > 0
    return np.asarray(ids)[real].astype(np.int32), (np.asarray(labels) != IGNORED)[real]


def _single(ids: Any, learned: Any) -> Sample:
    learned = learned.copy()
    learned[:1] = False
    return Sample((Segment(ids, learned, NO_PARENT),))


def _labelled(arrays: Mapping[str, Any], i: int, mismatched: bool) -> Sample:
    """One answer, and behind the same prompt perhaps one that was given to another."""
    answers = []
    for prefix in ("", "KL_") if mismatched else ("",):
        ids, mask, learned = (arrays[f"{prefix}{key}"][i] for key in ("input_ids", "attention_mask", "completion_mask"))
        answers.append(_row(ids, np.where(learned > 0, ids, IGNORED), mask))
    return replace(_answers(answers), numbers={"label": float(arrays["label"][i])})


def _scored(chosen: Row, rejected: Row, margin: float) -> Sample:
    """Both answers behind their common beginning, each with its place after the last token as the one target."""
    length = min(len(chosen[0]), len(rejected[0])) - 1
    common = int(np.argmin(np.append(chosen[0][:length] == rejected[0][:length], False)))
    segments = [Segment(chosen[0][:common], np.zeros(common, np.bool_))]
    for ids, _ in (chosen, rejected):
        rest = np.append(ids[common:], ids[-1])
        segments.append(Segment(rest, np.arange(len(rest)) == len(rest) - 1, 0))
    return Sample(tuple(segments), {"margin": float(margin)})


def _answers(answers: Sequence[Row], *, prompts: bool = False) -> Sample:
    """Answers behind what they have in common before the first target."""
    common = min(int(learned.argmax()) for _, learned in answers)
    before = answers[0][0][:common]
    assert all(np.array_equal(ids[:common], before) for ids, _ in answers), "all answers follow the same prompt"
    prompt = Segment(before, (np.arange(common) > 0) & prompts)
    return Sample((prompt, *(Segment(ids[common:], learned[common:], 0) for ids, learned in answers)))


__all__ = ["Recorded", "loss_from_log_probs", "loss_from_token_log_probs", "loss_of"]
