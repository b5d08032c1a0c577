"""What the set values of an adapter make impossible, said before any process exists. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loomtune import hookimpl
from loomtune.plan import Finding, Plan
from loomtune_plugins.adapters.adalora_settings import AdaLoraSettings, too_short


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    """Where the number of steps is known, whether it leaves AdaLoRA time."""
    return list(_time(plan))


def _time(plan: Plan) -> Iterator[Finding]:
    """A run as long as its epochs is asked when its data are read."""
    for name, node in plan.choices("adapter").items():
        if name == "adalora" and plan.root.steps:
            settings = AdaLoraSettings(**{key: value for key, value in node.items() if key != "name"})
            if wrong := too_short(settings, plan.root.steps):
                yield Finding(*wrong)
