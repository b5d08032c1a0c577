"""Whether a model's rows can be cut over ranks, as its config says. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loomtune.errors import UserError

ATTENTIONS = ("sdpa", "eager")
"""Attention that works on the rows of some heads as on those of all."""
GROWING = ("dynamic", "longrope")
"""Rotary tables that follow the highest position they are shown, which differs from stretch to stretch."""
SINKS = (
    *("deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash"),
    "openai_privacy_filter",
)
"""Families (transformers 5.23) whose attention has a learned sink for each head (`s_aux`), which is not exchanged."""
WHOLE = "set sharding.sequence=1"


def check(described: Mapping[str, Any], attention: str, heads: int, ranks: int, tensor: int) -> None:
    """Raises UserError where they cannot.

    described: the model's config. attention: as chosen, or empty. tensor: ranks over which the heads are cut already.
    """
    if attention not in ("", *ATTENTIONS):
        what = f"model.attention={attention} cannot work on rows that are cut over {ranks} ranks"
        raise UserError.of(what, f"set model.attention to {' or '.join(ATTENTIONS)}, or sharding.sequence=1")
    if (family := (described.get("text_config") or described).get("model_type")) in SINKS:
        raise UserError.of(f"{family} models attend by sinks, which cannot be dealt out to {ranks} ranks", WHOLE)
    if grows := next((kind for kind in _rotary(described) if kind in GROWING), None):
        what = (
            f"the model's rotary positions of type '{grows}' depend on the longest row, of which a rank has a stretch"
        )
        raise UserError.of(what, WHOLE)
    if heads % (ranks * tensor):
        fits = [str(n) for n in range(1, heads + 1) if heads % (n * tensor) == 0]
        each = f"{heads} attention heads" + (f", cut over {tensor} ranks," if tensor > 1 else "")
        what = f"{each} cannot be dealt out to the {ranks} ranks that share a row"
        raise UserError.of(what, f"set sharding.sequence to {' or '.join(fits)}" if fits else WHOLE)


def _rotary(described: Mapping[str, Any]) -> Iterator[Any]:
    """The types of rotary positions that a config names; some name one for each kind of layer."""
    text = described.get("text_config") or described
    for name in ("rope_parameters", "rope_scaling"):
        given = text.get(name) or {}
        for one in (given, *given.values()):
            if isinstance(one, Mapping):
                yield one.get("rope_type", one.get("type"))
