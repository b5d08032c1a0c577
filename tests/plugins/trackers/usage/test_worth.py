"""What a step's samples are worth in operations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loomtune.contracts import Sample, Segment
from loomtune_plugins.planner.flops import Shape, mean_length, model_flops_per_token
from loomtune_plugins.trackers.usage.worth import Amount, Passes, operations, passes

BODY = {"model.embed_tokens.weight": (100, 8), "model.layers.0.mlp.up_proj.weight": (32, 8), "lm_head.weight": (100, 8)}
LORA = {
    "base.model.layers.0.mlp.up_proj.lora_A.weight": (2, 8),
    "base.model.layers.0.mlp.up_proj.lora_B.weight": (32, 2),
}


def segment(tokens: int, targets: int, parent: int = -1) -> Segment:
    return Segment(np.zeros(tokens, np.int32), np.arange(tokens) >= tokens - targets, parent)


def chain(tokens: int, targets: int) -> Sample:
    return Sample((segment(tokens, targets),))


def test_tokens_and_targets_of_all_samples_count_and_rows_see_themselves() -> None:
    samples = [chain(10, 4), chain(6, 1)]
    amount = Amount.of(samples)
    assert amount == Amount(tokens=16, targets=5, squares=10**2 + 6**2)
    assert amount.squares / amount.tokens == mean_length([10, 6])


def test_answers_see_their_prompt_which_counts_once() -> None:
    pair = Sample((segment(5, 0), segment(3, 3, parent=0), segment(2, 2, parent=0)))
    assert Amount.of([pair]) == Amount(tokens=10, targets=5, squares=5**2 + (8**2 - 5**2) + (7**2 - 5**2))


def test_a_chain_in_two_segments_is_worth_what_it_is_in_one() -> None:
    assert Amount.of([Sample((segment(5, 0), segment(4, 4, parent=0)))]) == Amount.of([chain(9, 4)])


class Engine:
    """What is read of an engine."""

    def __init__(self, spec: Any, trained: dict[str, Any]) -> None:
        self.spec, self.trained = spec, lambda: trained


def engine(trained: dict[str, Any], *, heads: tuple[str, ...] = ("lm",), config: bool = True) -> Any:
    known = SimpleNamespace(num_hidden_layers=1, num_attention_heads=2, hidden_size=8)
    model = SimpleNamespace(weights=lambda seed: SimpleNamespace(shapes=lambda: BODY))
    if config:
        model.config = lambda: SimpleNamespace(get_text_config=lambda: known)
    adapter = SimpleNamespace(base_name=lambda name: name if name in BODY else None)
    spec = SimpleNamespace(model=model, adapter=adapter, seed=0, heads=heads)
    return Engine(spec, trained)


class Fake:
    """What is read of a run. roles: name to (engine, trained)."""

    def __init__(self, online: bool = False, **roles: tuple[Any, bool]) -> None:
        self.roles = {
            name: SimpleNamespace(engine=engine, trained=trained) for name, (engine, trained) in roles.items()
        }
        self.objective = SimpleNamespace(online=lambda: online)

    def trained_engines(self) -> list[Any]:
        return [role.engine for role in self.roles.values() if role.trained]


def of(**roles: Any) -> list[Passes]:
    return passes(Fake(**roles))  # type: ignore[arg-type]


AMOUNT = Amount(tokens=100, targets=25, squares=100 * 10)


@pytest.mark.parametrize("convention", ["mfu", "mfu_palm"])
def test_a_full_fine_tune_is_counted_by_the_planners_formula(convention: str) -> None:
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    each = model_flops_per_token(Shape.of(BODY, None, config), 10, targets=0.25, convention=convention)
    assert operations(of(policy=(engine(BODY), True)), AMOUNT, convention) == pytest.approx(100 * each)


def test_a_frozen_base_has_no_gradient_of_its_own() -> None:
    full, lora = (operations(of(policy=(engine(trained), True)), AMOUNT, "mfu") for trained in (BODY, LORA))
    weights, added = 32 * 8 + 0.25 * 800, 2 * 8 + 32 * 2
    assert full - lora == pytest.approx(100 * (2 * weights - 6 * added))


def test_a_reference_goes_forward_in_a_step_that_learns_from_rows_and_not_where_completions_were_read_before() -> None:
    policy = engine(BODY)
    alone, both = (
        operations(of(policy=(policy, True), **more), AMOUNT, "mfu") for more in ({}, {"reference": (policy, False)})
    )
    online = operations(of(online=True, policy=(policy, True), reference=(policy, False)), AMOUNT, "mfu")
    assert both == pytest.approx(alone * 4 / 3) and online == alone


def test_a_head_that_nobody_reads_is_worth_nothing() -> None:
    read, unread = (
        operations(of(policy=(engine(BODY, heads=heads), True)), AMOUNT, "mfu") for heads in (("lm",), ("value",))
    )
    assert read - unread == pytest.approx(6 * 25 * 800)


def test_a_model_that_does_not_say_what_it_is_made_of_is_worth_an_unknown_amount() -> None:
    assert of(policy=(engine(BODY, config=False), True)) == []
