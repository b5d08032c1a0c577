"""Pairs whose prompt is computed once against twice, where that should pay and where it should not.

`python benchmarks/sharing.py --help`; exit code 1 where a bar is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from contenders import LOOMTUNE, Contender
from dpo import SETTINGS, Dpo
from verdict import Bar, Measured, equal, ratio

ALWAYS, NEVER = "loomtune, prompts computed once", "loomtune, prompts computed twice"


class Sharing(Dpo):
    """Prompts at least twice as long as each answer: only in conversations of several turns."""

    says = "DPO with prompts computed once, and twice."
    markers = "sharing of long prompts"
    least: float = 1.3

    def wanted(self, asked: int, chosen: int, rejected: int) -> bool:
        return asked >= 2 * max(chosen, rejected) and self.whole(asked, chosen, rejected)

    def whole(self, asked: int, chosen: int, rejected: int) -> bool:
        """Whether nothing of either answer is cut off."""
        return asked + max(chosen, rejected) < self.chosen.max_length

    def contenders(self) -> Sequence[Contender]:
        chosen = {LOOMTUNE: "auto", ALWAYS: "always", NEVER: "never"}
        return [Contender(name, settings={**SETTINGS, "batch.share": share}) for name, share in chosen.items()]

    def bars(self, measured: Mapping[str, Measured]) -> list[Bar]:
        ours, always, never = (measured[name] for name in (LOOMTUNE, ALWAYS, NEVER))
        return [
            equal("grad_norm", NEVER, always, never, 1e-5),
            ratio("speed of auto against prompts computed twice", ours, never, self.least),
            ratio("speed of prompts computed once against twice", always, never, self.least),
        ]


class ShortPrompts(Sharing):
    """Prompts of at most a tenth of both answers: whatever is chosen must cost nothing, as far as can be measured."""

    markers = "sharing of short prompts"
    least = 0.98

    def wanted(self, asked: int, chosen: int, rejected: int) -> bool:
        return 10 * asked <= chosen + rejected and self.whole(asked, chosen, rejected)

    def bars(self, measured: Mapping[str, Measured]) -> list[Bar]:
        return super().bars(measured)[:2]


if __name__ == "__main__":
    sys.exit(max([Sharing().main(), ShortPrompts().main()]))
