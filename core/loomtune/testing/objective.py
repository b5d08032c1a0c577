"""Checks of objectives: what promise 1, the same maths on any machine, asks of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from loomtune.contracts import Batch, Loss, Model, Objective, Role, Row, Sample, Tokenizer
from loomtune.contracts.batch import NO_PARENT

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.testing.toy import BareEngine


def check_objective(
    objective: Objective,
    rows: Sequence[Row],
    tokenizer: Tokenizer | None = None,
    model: Model | None = None,
    losses: Mapping[str, Loss] | None = None,
) -> None:
    """Checks samples, weights and loss on a few rows; the tokenizer and the model are toys unless given.

    That rows become the same samples each time, cut where asked; that weights are pure and add up; that the loss, its
    metrics and its gradients over micro-batches add up to the whole batch's, also where each answer has its prompt by
    itself; that an empty batch gives 0, never NaN.
    Of an online objective whose rows are prompts, what its `experience` makes of them is checked so.
    losses: those that such a one is to use.
    """
    from loomtune.batching import collate
    from loomtune.testing import toy

    assert len(rows) >= 2, "give two rows or more: sums over one prove nothing"
    model = model or toy.ToyModel()
    tokenizer = tokenizer or model.tokenizer()
    samples = [objective.sample(row, tokenizer, model.context()) for row in rows]
    _check_samples(objective, rows, samples, tokenizer)
    if not objective.needs_targets():
        samples = list(_experienced(objective, rows, tokenizer, model, losses or {}))
    pad = tokenizer.pad_id
    whole = collate(samples, range(len(samples)), pad)
    # Answers that share their prompt in the whole do not in the parts.
    parts = [collate([sample.unfolded()], [number], pad) for number, sample in enumerate(samples)]
    empty = replace(collate([], [], pad), columns={name: column[:0] for name, column in whole.columns.items()})
    _check_weights(objective, whole, parts, empty)
    roles = toy.roles(objective, model)
    _check_empty(objective, roles, whole, empty)
    _check_sums(objective, roles, whole, [*parts, empty])


def _check_samples(objective: Objective, rows: Sequence[Row], samples: Sequence[Sample], tokenizer: Tokenizer) -> None:
    from loomtune.samples import chain

    assert objective.fingerprint() == objective.fingerprint(), "the fingerprint changes from call to call"
    for row, sample in zip(rows, samples, strict=True):
        again = objective.sample(row, tokenizer, chain(sample))
        assert _plain(sample) == _plain(again), f"the same row gives another sample: {row}"
        assert sample.targets or not objective.needs_targets(), f"nothing of this row is to be predicted: {row}"
        for number, segment in enumerate(sample.segments):
            assert segment.parent < number, "a segment's parent comes before it"
            first = segment.parent == NO_PARENT and len(segment.is_target) and segment.is_target[0]
            assert not first, "the first token of a sample cannot be predicted: nothing comes before it"
        cut = max(2, chain(sample) - 2)
        try:
            shorter = objective.sample(row, tokenizer, cut)
        except ValueError:
            continue
        assert chain(shorter) <= cut, f"max_length={cut} gives a sample of {chain(shorter)} tokens"


def _experienced(
    objective: Objective, rows: Sequence[Row], tokenizer: Tokenizer, model: Model, losses: Mapping[str, Loss]
) -> Sequence[Sample]:
    """The samples of the first step that comes of these prompts."""
    from loomtune.testing.experience import made

    steps, again = (made(objective, rows, tokenizer, model, losses=losses) for _ in range(2))
    assert steps, "no step comes of these prompts"
    assert [[one.plain() for one in step] for step in steps] == [[one.plain() for one in step] for step in again], (
        "the same prompts and the same completions give other steps"
    )
    assert len(steps) == objective.steps_per_batch(), f"{len(steps)} steps, {objective.steps_per_batch()} were foretold"
    for step in steps:
        assert any(sample.targets for sample in step), "a step has nothing to predict"
    return steps[0]


def _plain(sample: Sample) -> list[Any]:
    segments = [(s.tokens.tolist(), s.is_target.tolist(), s.parent) for s in sample.segments]
    return [segments, dict(sample.numbers)]


def _check_weights(objective: Objective, whole: Batch, parts: Sequence[Batch], empty: Batch) -> None:
    weights = dict(objective.weights(whole))
    assert set(weights) == set(objective.terms()), f"weights of {sorted(weights)}, terms {sorted(objective.terms())}"
    assert weights == dict(objective.weights(whole)), "weights change from call to call"
    assert any(weights.values()), "no term has any weight"
    assert not any(objective.weights(empty).values()), "an empty batch has weight"
    for term, weight in weights.items():
        summed = sum(objective.weights(part)[term] for part in parts)
        assert abs(summed - weight) <= 1e-6 * abs(weight), f"{term}: micro-batches weigh {summed}, the whole {weight}"


def _check_empty(objective: Objective, roles: Mapping[str, Role], whole: Batch, empty: Batch) -> None:
    """A rank without rows takes part, with zeros that reach every trained parameter: its collectives must meet."""
    import torch

    terms, gradients, _ = _computed(objective, roles, [empty], dict(objective.weights(whole)), [whole])
    assert all(value == 0 for value in terms.values()), f"an empty batch has a loss: {terms}"
    for name, gradient in gradients.items():
        assert gradient is not None, f"an empty batch does not reach {name}: begin from the role's own output"
        assert torch.count_nonzero(gradient) == 0 and gradient.isfinite().all(), f"an empty batch moves {name}"


def _check_sums(objective: Objective, roles: Mapping[str, Role], whole: Batch, parts: Sequence[Batch]) -> None:
    import torch

    totals = dict(objective.weights(whole))
    terms, gradients, metrics = _computed(objective, roles, [whole], totals, [whole])
    in_parts, gradients_in_parts, metrics_in_parts = _computed(objective, roles, parts, totals, parts)
    for name, value in terms.items():
        _close(in_parts[name], value, f"the term {name} over micro-batches is not the whole batch's")
    for name, value in metrics.items():
        _close(metrics_in_parts[name], value, f"the metric {name} over micro-batches is not the whole batch's")
    for name, gradient in gradients.items():
        if gradient is not None:
            why = f"the gradient of {name} over micro-batches is not the whole batch's"
            torch.testing.assert_close(gradients_in_parts[name], gradient, rtol=1e-3, atol=1e-6, msg=why)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients.values()), "the loss moves no parameter"


def _close(found: float, expected: float, why: str) -> None:
    assert abs(found - expected) <= 1e-4 * max(1.0, abs(expected)), f"{why}: {found} instead of {expected}"


def _computed(
    objective: Objective,
    roles: Mapping[str, Role],
    step: Sequence[Batch],
    totals: Mapping[str, float],
    of: Sequence[Batch],
) -> tuple[dict[str, float], dict[str, Tensor | None], dict[str, float]]:
    """Sums of the terms, gradients and sums of the metrics over the micro-batches. of: what statistics are taken of."""
    import torch

    from loomtune.testing import toy

    terms: dict[str, float] = defaultdict(float)
    metrics: dict[str, float] = defaultdict(float)
    trained = [name for name, role in objective.roles().items() if role.trained]
    networks = {name: cast("BareEngine", roles[name].engine).network for name in trained}
    for network in networks.values():
        network.zero_grad()
    with torch.no_grad():
        statistics = objective.statistics(roles, of, toy.world())
    for batch in step:
        result = objective.loss(roles, batch, totals, statistics)
        assert set(result.terms) == set(objective.terms()), f"the loss gives {sorted(result.terms)}"
        parts = [value / totals[name] for name, value in result.terms.items() if totals[name]]
        torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
        for name, value in result.terms.items():
            terms[name] += float(value.detach())
        for name, (total, weight) in result.metrics.items():
            assert not (total.requires_grad or weight.requires_grad), f"the metric {name} is to be detached"
            metrics[name] += float(total)
            metrics[f"{name} (weight)"] += float(weight)
    owned = [(f"{role}.{name}", p) for role, network in networks.items() for name, p in network.named_parameters()]
    named = {name: p for name, p in owned if p.requires_grad}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}
    return dict(terms), gradients, dict(metrics)
