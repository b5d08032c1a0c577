"""What all contenders do: one description, written once and read by each of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Full fine-tuning in fp32: AdamW without decay at a constant rate, gradients clipped, only completions learned.

    model: folder with weights and tokenizer. rows: JSON lines with prompt and completion, in the order of training.
    batch: examples per optimizer step. packs: rows of `max_length` tokens per step where TRL packs, so that a step
    holds about as many examples. micro_tokens: tokens, padding included, that the bare loop computes at once.
    """

    model: str
    rows: str
    shuffled: str
    steps: int
    batch: int
    packs: int
    micro_tokens: int
    max_length: int
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
