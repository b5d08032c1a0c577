"""What the set values of an adapter make impossible, said before any process exists. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loomtune import hookimpl
from loomtune.plan import Finding, Plan
from loomtune_plugins.adapters.adalora_settings import AdaLoraSettings, too_short


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    """Whether the steps leave AdaLoRA time, where they are known, and whether a prefix has a row of its own."""
    return [*_time(plan), *_rows(plan)]


def _rows(plan: Plan) -> Iterator[Finding]:
    """Only an explicit mask can show one prefix to several samples; attention by their lengths has no place for it."""
    if plan.root.packing and "prefix" in plan.choices("adapter"):
        what = "packing=true lays several samples into a row, and adapter=prefix gives each row one prefix to see"
        yield Finding(what, "set packing=false, or adapter=prompt or ptuning, whose tokens stand before each sample")


def _time(plan: Plan) -> Iterator[Finding]:
    """A run as long as its epochs is asked when its data are read."""
    for name, node in plan.choices("adapter").items():
        if name == "adalora" and plan.root.steps:
            settings = AdaLoraSettings(**{key: value for key, value in node.items() if key != "name"})
            if wrong := too_short(settings, plan.root.steps):
                yield Finding(*wrong)
