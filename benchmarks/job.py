"""What all contenders do: one description, written once and read by each of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Full fine-tuning in fp32: AdamW without decay at a constant rate, gradients clipped, only answers learned.

    model: folder with weights and tokenizer. rows: JSON lines in the order of training. shuffled: the same, laid out so
    that loomtune's own order visits them in that sequence. batch: rows of data per optimizer step. micro: how many of
    them TRL computes at once; 0: all. packs: rows of `max_length` tokens per step where TRL packs, so that a step holds
    about as many examples. micro_tokens: tokens, padding included, that the bare loop computes at once.
    """

    model: str
    rows: str
    shuffled: str
    steps: int
    batch: int
    max_length: int
    micro: int = 0
    packs: int = 0
    micro_tokens: int = 0
    lr: float = 1e-4
    clip: float = 1.0

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path | str) -> Job:
        """What `write` wrote."""
        return cls(**json.loads(Path(path).read_text()))

    def examples(self) -> list[dict[str, str]]:
        """The rows."""
        return [json.loads(line) for line in Path(self.rows).read_text().splitlines()]
