"""Settings of AdaLoRA, and the steps that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Optional

from loomtune.settings import option


@dataclass
class AdaLoraSettings:
    """Low-rank adaptation whose ranks are shared out among the layers by importance.

    The penalty of `orth_reg_weight` is a part of the update, like decoupled weight decay: it is added to the gradient
    after clipping, and neither the logged loss nor the logged norm has it.
    """

    init_rank: int = option(12, "rank of every layer at first")
    target_rank: int = option(8, "rank of a layer in the end, on average; layers may have more and less")
    alpha: int = option(32, "the addition is scaled by alpha / init_rank")
    dropout: float = option(0.0, "dropout of the addition's input")
    targets: list[str] = option(
        ["all-linear"],
        "linear layers: `all-linear` (all but the output head), names such as `q_proj`, or patterns such as `*.mlp.*`",
    )
    tinit: Optional[int] = option(None, "optimizer steps before ranks begin to fall; null: a tenth of the run")  # noqa: UP045
    tfinal: Optional[int] = option(  # noqa: UP045
        None, "last optimizer steps, in which ranks stay as they are; null: three tenths of the run"
    )
    delta_t: int = option(10, "optimizer steps from one sharing-out to the next")
    beta1: float = option(0.85, "decay of the mean of sensitivities")
    beta2: float = option(0.85, "decay of the mean of their uncertainties")
    orth_reg_weight: float = option(0.5, "weight of the penalty that keeps A and B orthogonal; 0: none")


def resolved(settings: AdaLoraSettings, steps: int) -> AdaLoraSettings:
    """With `tinit` and `tfinal` as numbers. steps: of the whole run."""
    tinit = steps // 10 if settings.tinit is None else settings.tinit
    return replace(settings, tinit=tinit, tfinal=3 * steps // 10 if settings.tfinal is None else settings.tfinal)


def too_short(settings: AdaLoraSettings, steps: int) -> tuple[str, str] | None:
    """What is wrong, and its cure, where the run leaves no step in which ranks could fall."""
    whole = resolved(settings, steps)
    assert whole.tinit is not None and whole.tfinal is not None
    if whole.tinit + whole.tfinal < steps:
        return None
    what = (
        f"adapter.tinit={whole.tinit} and adapter.tfinal={whole.tfinal} leave none of {steps} steps for ranks to fall"
    )
    return what, f"set adapter.tinit and adapter.tfinal to at most {steps - 1} together, or to null"
