"""What the set values of a strategy make impossible, said before any process exists. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loomtune import hookimpl
from loomtune.offers import Trait
from loomtune.plan import Finding, Plan


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    chosen = next(iter(plan.choices("sharding").values()), {})
    return list(_cuts(chosen, provided))


def _cuts(settings: Mapping[str, Any], provided: Mapping[str, str]) -> Iterator[Finding]:
    """What an adapter adds has no place in a layer, or a row, that several ranks share."""
    forbidden = {
        "tensor": {
            Trait.WRAPPED_LINEARS: "cuts linear layers, which {} puts modules of its own around or behind",
            Trait.VIRTUAL_TOKENS: "cuts the heads that what {} puts before each row is made for",
        },
        "sequence": {Trait.VIRTUAL_TOKENS: "cuts rows into stretches, and {} puts more before each row"},
    }
    for key, reasons in forbidden.items():
        for trait in reasons.keys() & provided.keys() if settings.get(key, 1) > 1 else ():
            what = reasons[trait].format(adapter := provided[trait])
            cure = f"set sharding.{key}=1, or choose another {adapter.partition('=')[0]}, such as full"
            yield Finding(f"sharding.{key}={settings[key]} {what}", cure)
