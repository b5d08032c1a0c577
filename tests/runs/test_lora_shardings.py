"""Variants of LoRA give one curve under every strategy, and what they leave computes as the run did."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from runs.curves import largest
from runs.worlds import Outcome

Train = Callable[..., Outcome]

VARIANTS = {
    "dora": ["adapter.dora=true"],
    "tied tokens": ["adapter.tokens=[65,66,67]"],
    "tokens by name": ["adapter.tokens=[e,t,66]"],
    "norms": ["adapter.modules=['*norm']"],
    "pissa": ["adapter.init=pissa"],
    "pissa, dora": ["adapter.init=pissa", "adapter.dora=true"],
    "olora": ["adapter.init=olora"],
    "orthogonal": ["adapter.init=orthogonal"],
    "dropout": ["adapter.dropout=0.1", "adapter.rslora=true"],
}
LAYOUTS = {
    "ddp": ["sharding=ddp"],
    "fsdp": ["sharding=fsdp"],
    "zero-2": ["sharding=zero", "sharding.stage=2"],
    "zero-3": ["sharding=zero", "sharding.stage=3", "sharding.persist=0"],
    "zero-3, recomputed": [
        "sharding=zero", "sharding.stage=3", "sharding.persist=0", "sharding.activation_checkpointing=true",
    ],
}  # fmt: skip
QUICK = [("dora", "zero-3")]


@pytest.mark.parametrize(
    "variant,layout",
    [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in product(VARIANTS, LAYOUTS) if one not in QUICK)],
)
def test_one_curve(variant: str, layout: str, train: Train, alone: Train, tiny: list[str]) -> None:
    settings = [*tiny, "adapter=lora", "adapter.rank=4", *VARIANTS[variant], "steps=10"]
    found, exact = train(2, settings, *LAYOUTS[layout], "batch.micro=2"), alone(*settings)
    assert largest(found.series("loss"), exact.series("loss")) < 5e-6
    assert largest(found.series("grad_norm"), exact.series("grad_norm")) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["under", "path"])
def test_one_curve_with_the_adapter_of_an_earlier_run(
    how: str, layout: str, train: Train, alone: Train, tiny: list[str]
) -> None:
    lora = [*tiny, "adapter=lora", "steps=10"]
    earlier = alone(*lora, "adapter.rank=4").folder / "checkpoints" / "step-00000010" / "adapter"
    given = f"adapter.under=['{earlier}']" if how == "under" else f"adapter.path='{earlier}'"
    settings = [*lora, given]
    found, exact = train(2, settings, *LAYOUTS[layout], "batch.micro=2"), alone(*settings)
    assert largest(found.series("loss"), exact.series("loss")) < 5e-6
    assert exact.series("loss")[0] < alone(*lora, "adapter.rank=4").series("loss")[0]
