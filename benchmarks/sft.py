"""Full SFT by loomtune, by TRL and by a loop written by hand, on the same rows: `python benchmarks/sft.py --help`.

Exit code 1 where a bar is missed. See docs/benchmarks.md for what is measured and why so.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import gsm8k
import material
from contenders import LOOMTUNE, TRL, Contender
from job import Job
from race import Race
from verdict import Bar, Measured, equal, memory, ratio

from loomtune.batching import CPU_TOKENS

BARE, PACKED = "bare loop", "TRL with packing"


class Sft(Race):
    """GSM8K, only answers learned."""

    says = "Full SFT by loomtune, by TRL and by a loop written by hand."

    def contenders(self) -> Sequence[Contender]:
        bare, trl = Contender(BARE, ("with_bare.py",)), Contender(TRL, ("with_trl.py",))
        packed = Contender(PACKED, ("with_trl.py", "packing"))
        return [Contender(LOOMTUNE), bare] if self.chosen.quick else [Contender(LOOMTUNE), trl, bare, packed]

    def job(self, folder: Path) -> Job:
        chosen, count = self.chosen, self.chosen.steps * self.chosen.batch
        rows = gsm8k.sums(count) if chosen.quick else list(gsm8k.read(count))
        texts = (row["prompt"] + row["completion"] for row in rows) if chosen.quick else material.texts()
        model = material.start(folder, texts, quick=chosen.quick)
        return material.job(
            folder,
            model,
            rows,
            steps=chosen.steps,
            batch=chosen.batch,
            max_length=chosen.max_length,
            packs=gsm8k.packs(model, rows, chosen.batch, chosen.max_length),
            micro_tokens=CPU_TOKENS,
        )

    def bars(self, measured: Mapping[str, Measured]) -> list[Bar]:
        return bars(measured)


def bars(measured: Mapping[str, Measured]) -> list[Bar]:
    """All that can be said of these contenders."""
    ours, bare = measured[LOOMTUNE], measured[BARE]
    found = [
        equal("loss", BARE, ours, bare, 1e-5),
        ratio("time against the bare loop", bare, ours, 1.03, at_least=False),
    ]
    if TRL in measured:
        trl = measured[TRL]
        found.append(equal("loss", TRL, ours, trl, 1e-4))
        found.append(ratio(f"speed against {TRL}", ours, trl, 3.0))
        found.append(ratio(f"speed against {PACKED}", ours, measured[PACKED], 2.0))
        found.append(memory(TRL, ours, trl, 0.4))
        found.append(ratio(f"speed of the bare loop against {TRL}", bare, trl, 3.0))
    return found


if __name__ == "__main__":
    sys.exit(Sft().main())
