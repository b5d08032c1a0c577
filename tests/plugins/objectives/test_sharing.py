"""Conversations whose prompt is longer than its answers: computed once or twice, alone or packed, it is one number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import pytest
import torch
from torch import Tensor

import oasst
from loomtune.batching import collate
from loomtune.contracts import Batch, Engine, Role, Sample
from loomtune.contracts.batch import NO_SEGMENT
from loomtune.placement import MicroLimit, laid_out, place, tokens
from loomtune.testing import toy
from loomtune.testing.recorded import built
from loomtune.toolkit import log_probs, row_sums
from loomtune_plugins.kernels.sdpa import SDPA
from loomtune_plugins.kernels.settings import SDPASettings
from loomtune_plugins.models.huggingface import HuggingFace
from loomtune_plugins.models.settings import HuggingFaceSettings
from loomtune_plugins.objectives.answers import CHOSEN, REJECTED
from support import shared

BOUND = 1e-5
WIDTH = 500
"""Tokens of a packed row: a few pairs."""


@dataclass
class Policy:
    """A network that counts the tokens that it is given."""

    role: Role
    engine: toy.BareEngine
    samples: Sequence[Sample]
    given: int = 0

    def count(self, module: object, ids: tuple[Tensor, ...], made: Tensor) -> None:
        """A hook of the embeddings."""
        self.given += ids[0].numel()


@pytest.fixture(scope="module")
def policy() -> Policy:
    """stories260k, and pairs of which half are conversations of several turns."""
    model = HuggingFace(HuggingFaceSettings(path=str(shared("models", "stories260k"))))
    spec = dataclasses.replace(toy.spec(model), kernel=SDPA(SDPASettings()))
    engine = toy.BareEngine(spec)
    rows = oasst.pairs((150, 420), (10, 80))
    several = [row for row in rows if row["prompt"].count("User:") > 1]
    objective, chosen = built("dpo", {}), several[::20] + rows[::45]
    samples = [objective.sample(row, model.tokenizer(), model.context()) for row in chosen]
    made = Policy(Role("policy", cast(Engine, engine)), engine, samples)
    engine.network.base.get_input_embeddings().register_forward_hook(made.count)  # type: ignore[operator]
    return made


def batches(samples: Sequence[Sample], limit: MicroLimit) -> Iterator[Batch]:
    """The micro-batches of a step on one process."""
    laid = laid_out(samples, limit)
    (mine,) = place(range(len(laid)), [tokens(sample, limit) for sample in laid], 1, limit)
    for one in mine:
        yield collate([laid[i] for i in one.numbers], one.numbers, 0, rows=[len(row) for row in one.rows])


@dataclass
class Computed:
    """chosen, rejected: `(samples,)` sums of log-probabilities. gradients: by parameter, of DPO's loss. real, given:
    tokens that belong to a sample, and all of which the network was given."""

    chosen: Tensor
    rejected: Tensor
    gradients: dict[str, Tensor]
    real: int
    given: int

    @property
    def whole(self) -> Tensor:
        """All gradients in one row."""
        return torch.cat([gradient.double().flatten() for gradient in self.gradients.values()])


def computed(policy: Policy, limit: MicroLimit) -> Computed:
    """A step of DPO, against a reference that gives every answer the same."""
    network, real, sums = policy.engine.network, 0, torch.zeros(2, len(policy.samples), dtype=torch.float64)
    network.zero_grad()
    policy.given = 0
    for batch in batches(policy.samples, limit):
        of_answers = row_sums(log_probs(policy.role, batch), batch)
        answers = [of_answers[batch.part == part] for part in (CHOSEN, REJECTED)]
        (-torch.nn.functional.logsigmoid(0.1 * (answers[0] - answers[1])).sum() / len(policy.samples)).backward()
        sums[:, batch.sample_numbers] = torch.stack(answers).detach()
        real += int((batch.segments != NO_SEGMENT).sum())
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return Computed(*sums, gradients, real, policy.given)


LAYOUTS = {
    "apart": MicroLimit(1, share=False),
    "shared": MicroLimit(1, share=True),
    "shared, several rows": MicroLimit(4, share=True),
    "unfolded, several rows": MicroLimit(4, share=False),
    "shared, packed": MicroLimit(2, packed=WIDTH, share=True),
    "unfolded, packed": MicroLimit(2, packed=WIDTH, share=False),
    "as it pays": MicroLimit(8, tokens=1024),
    "as it pays, packed": MicroLimit(8, tokens=1024, packed=WIDTH),
}


@pytest.fixture(scope="module")
def found(policy: Policy) -> Callable[[str], Computed]:
    """What comes of a layout, computed once."""
    return cache(lambda layout: computed(policy, LAYOUTS[layout]))


Found = Callable[[str], Computed]


@pytest.fixture(scope="module")
def exact(policy: Policy) -> Computed:
    """Answers apart in double precision: what rounding leaves none of."""
    policy.engine.network.double()
    made = computed(policy, LAYOUTS["apart"])
    policy.engine.network.float()
    return made


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "apart"])
def test_log_probabilities_and_gradients_are_those_of_answers_apart(layout: str, found: Found) -> None:
    made, apart = found(layout), found("apart")
    for ours, theirs in ((made.chosen, apart.chosen), (made.rejected, apart.rejected)):
        assert float(((ours - theirs) / theirs).abs().max()) < BOUND
    assert made.gradients.keys() == apart.gradients.keys()
    assert float((made.whole - apart.whole).norm() / apart.whole.norm()) < BOUND


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_each_parameter_is_exact_but_for_rounding(layout: str, found: Found, exact: Computed) -> None:
    """What two answers say of their prompt nearly cancels, so that single parameters of two layouts are twice so far
    apart as each is from what double precision gives."""
    for name, gradient in exact.gradients.items():
        assert float((found(layout).gradients[name] - gradient).norm() / gradient.norm()) < BOUND, name


@pytest.mark.parametrize("layout", ["shared", "shared, several rows", "shared, packed"])
def test_a_shared_prompt_is_computed_once(layout: str, policy: Policy, found: Found) -> None:
    assert found(layout).real == sum(sum(parts) for parts in lengths(policy))


@pytest.mark.parametrize("layout", ["apart", "unfolded, several rows", "unfolded, packed"])
def test_an_unfolded_one_is_computed_for_each_answer(layout: str, policy: Policy, found: Found) -> None:
    assert found(layout).real == sum(2 * prompt + sum(answers) for prompt, *answers in lengths(policy))


def test_the_network_is_given_these_tokens_and_what_fills_rows_up(policy: Policy, found: Found) -> None:
    shared_, apart, packed = (found(layout) for layout in ("shared", "apart", "shared, packed"))
    assert shared_.given == shared_.real
    assert apart.given == sum(2 * (prompt + max(answers)) for prompt, *answers in lengths(policy))
    assert packed.given < 1.1 * packed.real


def test_prompts_are_longer_than_answers_and_shared_for_it(policy: Policy, found: Found) -> None:
    assert all(prompt >= max(answers) for prompt, *answers in lengths(policy))
    assert found("apart").real > 1.35 * found("as it pays").real == 1.35 * found("shared").real
    assert len(policy.samples) >= 6 and max(sample.length for sample in policy.samples) > 300


def lengths(policy: Policy) -> list[list[int]]:
    """Tokens of each pair's prompt and answers."""
    return [[len(segment.tokens) for segment in sample.segments] for sample in policy.samples]
