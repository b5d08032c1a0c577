"""Attention back-ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loomtune import hookimpl
from loomtune.contracts import Kernel
from loomtune.offers import Offer, Trait
from loomtune.plan import Finding, Plan
from loomtune_plugins.kernels.settings import SDPASettings


@hookimpl
def kernels() -> Sequence[Offer[Kernel]]:
    """Gives the built-in back-ends."""
    return (
        Offer(
            name="sdpa",
            build="loomtune_plugins.kernels.sdpa:SDPA",
            schema=SDPASettings,
            summary="torch's scaled dot-product attention; a mask keeps segments apart where a row holds several",
            provides=frozenset({Trait.ISOLATED_SEGMENTS}),
        ),
    )


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    """Packed samples need a kernel that keeps them apart, in an attention that takes its mask."""
    if not plan.root.packing:
        return []
    if Trait.ISOLATED_SEGMENTS not in provided:
        what = f"packing=true needs `{Trait.ISOLATED_SEGMENTS}`, which no chosen kernel provides"
        return [Finding(what, "set packing=false, or kernel=[sdpa]")]
    attention = str(plan.chosen("model").get("attention", ""))
    if attention.startswith("flash_attention") and "sdpa" in plan.choices("kernel"):
        what = f"packing=true needs a mask of its own for each row, which model.attention={attention} does not take"
        return [Finding(what, "set packing=false, or model.attention=sdpa")]
    return []
