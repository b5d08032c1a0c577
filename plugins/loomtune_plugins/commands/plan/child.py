"""`python -m loomtune_plugins.commands.plan.child`: foretells a run in a process of its own, for one without torch.

On stdin JSON: `plan` (the text of a run.yaml), `per_node`, `remedies` (seconds, 0: none are looked for). On stdout what
`described` makes, with `refusal`: null, or the finding of a run that will not fit.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

from loomtune.plan import Plan
from loomtune_plugins.planner.figures import Figure, lines


def main() -> None:
    """Answers one question."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; only the answer is one
    answers.write(json.dumps(answer(json.loads(sys.stdin.read()))))
    answers.flush()


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """What is foreseen of the plan."""
    from loomtune_plugins.commands.plan.described import described, finding, refusal
    from loomtune_plugins.commands.plan.foreseen import Oracle
    from loomtune_plugins.commands.plan.remedies import named
    from loomtune_plugins.commands.plan.worlds import World

    plan = Plan.parse(asked["plan"])
    oracle = Oracle(plan, World(plan.processes, min(plan.processes, int(asked["per_node"]))))
    seen = oracle.foresee()
    refused = refusal(seen)
    if refused is not None and asked["remedies"]:
        refused = refusal(seen, named(oracle, seen.plan, float(asked["remedies"])))
    figures = lines(seen.forecast, seen.trace, seen.plan)
    estimates = [(one.subject, math.sqrt(one.low * one.high), one.unit, _reasoned(one)) for one in figures]
    return {**described(seen), "refusal": finding(refused) if refused else None, "estimates": estimates}


def _reasoned(one: Figure) -> str:
    return one.reasoning if one.low == one.high else f"{one.low:.4g} to {one.high:.4g}; {one.reasoning}"


if __name__ == "__main__":
    main()
