"""Settings of preference objectives that would do nothing, or something else than what was typed."""

from __future__ import annotations

import pytest

from loomtune.catalogue import installed
from loomtune.errors import UserError


def made(objective: str, losses: tuple[str, ...] = (), **settings: object) -> object:
    catalogue = installed()
    built = catalogue.build("objective", objective, settings)
    if losses:
        built.use({name: catalogue.build("loss", name, {}) for name in losses}, {})
    return built


@pytest.mark.parametrize("objective", ["sft", "pretrain", "reward", "dpo", "cpo", "simpo", "orpo", "kto"])
def test_a_misspelt_bos_is_refused(objective: str) -> None:
    with pytest.raises(UserError, match=r"objective\.bos=alwyas is not known.*'always'"):
        made(objective, bos="alwyas")


@pytest.mark.parametrize("objective", ["dpo", "cpo", "simpo", "orpo", "kto"])
@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_a_beta_that_prefers_nothing_is_refused(objective: str, beta: float) -> None:
    with pytest.raises(UserError, match=r"objective\.beta=.* prefers nothing"):
        made(objective, beta=beta)


def test_a_divergence_that_no_loss_looks_at_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"objective\.divergence=js_divergence has no effect with loss=\[apo_zero,sft\]"
    ):
        made("dpo", ("apo_zero", "sft"), divergence="js_divergence")
    made("dpo", ("apo_zero", "ipo"), divergence="js_divergence")
