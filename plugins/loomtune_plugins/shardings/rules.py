"""What the set values of a strategy make impossible, said before any process exists. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loomtune import hookimpl
from loomtune.offers import Trait
from loomtune.plan import Finding, Plan


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    chosen = next(iter(plan.choices("sharding").values()), {"name": ""})
    return list(_fsdp(chosen, provided)) if chosen["name"] == "fsdp" else []


def _fsdp(settings: Mapping[str, Any], provided: Mapping[str, str]) -> Iterator[Finding]:
    if settings["tensor"] > 1 and Trait.WRAPPED_LINEARS in provided:
        asked, adapter = f"sharding.tensor={settings['tensor']}", provided[Trait.WRAPPED_LINEARS]
        what = f"{asked} cuts linear layers, which {adapter} wraps in modules of its own"
        yield Finding(what, f"set sharding.tensor=1, or choose another {adapter.partition('=')[0]}, such as full")
