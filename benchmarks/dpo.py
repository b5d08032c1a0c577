"""Full DPO by loomtune and by TRL on the same pairs, references computed before: `python benchmarks/dpo.py --help`.

Exit code 1 where a bar is missed. See docs/benchmarks.md for what is measured and why so.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import material
from contenders import LOOMTUNE, TRL, Contender
from job import Job
from race import Race
from verdict import Bar, Measured, equal, memory, ratio

import oasst

APART, PATCHED = "loomtune, prompts computed twice", "TRL, only targets through its head"
SETTINGS = {"objective": "dpo", "data.format": "preference", "objective.reference": "stored"}
MICRO = 2
"""Pairs that TRL computes at once: less padding and less memory than with its own 8."""
RATE = 1e-5
"""Learning rate: at the 1e-4 of fine-tuning the loss is 0 after a few steps, and compares nothing."""


class Dpo(Race):
    """OpenAssistant's ranked replies."""

    says = "Full DPO by loomtune and by TRL, references computed before the first step."
    examples = "pairs"
    steps = 3
    warm_up = 1
    markers = "dpo"

    def wanted(self, asked: int, chosen: int, rejected: int) -> bool:
        """Whether a pair of these lengths takes part, in tokens."""
        return True

    def contenders(self) -> Sequence[Contender]:
        ours = [
            Contender(LOOMTUNE, settings=SETTINGS),
            Contender(APART, settings={**SETTINGS, "batch.share": "never"}),
        ]
        theirs = [Contender(TRL, ("with_trl_dpo.py",)), Contender(PATCHED, ("with_trl_dpo.py", "patched"))]
        return ours if self.chosen.quick else [*ours, *theirs]

    def job(self, folder: Path) -> Job:
        chosen, count = self.chosen, self.chosen.steps * self.chosen.batch
        texts = ("".join(row.values()) for row in oasst.made_up(count)) if chosen.quick else material.texts()
        model = material.start(folder, texts, quick=chosen.quick)
        rows = oasst.made_up(count) if chosen.quick else oasst.pairs(count, model, chosen.max_length, self.wanted)
        sizes = {"steps": chosen.steps, "batch": chosen.batch, "max_length": chosen.max_length}
        return material.job(folder, model, rows, **sizes, micro=MICRO, lr=RATE)

    def bars(self, measured: Mapping[str, Measured]) -> list[Bar]:
        return bars(measured)


def bars(measured: Mapping[str, Measured]) -> list[Bar]:
    """All that can be said of these contenders.

    A loss, and how much each pair counts in the gradient, come of differences of sums of log-probabilities near -2,000,
    of which fp32 keeps 1e-4; only in the first step, which begins without a difference, nothing cancels.
    """
    ours = measured[LOOMTUNE]
    found = []
    for name, theirs in measured.items():
        if name != LOOMTUNE:
            found += [equal(f"logps/{answer}", name, ours, theirs, 2e-6) for answer in ("chosen", "rejected")]
            found.append(equal("grad_norm", name, ours, theirs, 1e-5, steps=1))
            found += [equal(said, name, ours, theirs, 1e-4) for said in ("grad_norm", "loss")]
    found.append(ratio("speed against prompts computed twice", ours, measured[APART], 1.0))
    if TRL in measured:
        found.append(ratio(f"speed against {TRL}", ours, measured[TRL], 3.0))
        found.append(ratio(f"speed against {PATCHED}", ours, measured[PATCHED], 1.8))
        found.append(memory(TRL, ours, measured[TRL], 0.45))
    return found


if __name__ == "__main__":
    sys.exit(Dpo().main())
