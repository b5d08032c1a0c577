"""What the table of memory is made of: models of 10 M to 1 B parameters, under every layout, adapter and objective."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLAMA = "model=random model.shape.model_type=llama model.shape.tie_word_embeddings=false"
MODELS: Mapping[str, str] = {
    "Llama 11 M": f"{LLAMA} model.shape.vocab_size=8192 model.shape.hidden_size=256 model.shape.intermediate_size=704 "
    "model.shape.num_hidden_layers=8 model.shape.num_attention_heads=4 model.shape.num_key_value_heads=4",
    "Llama 35 M": "model=llama_35m",
    "Llama 134 M": f"{LLAMA} model.shape.vocab_size=32000 model.shape.hidden_size=768 "
    "model.shape.intermediate_size=2048 model.shape.num_hidden_layers=12 model.shape.num_attention_heads=12 "
    "model.shape.num_key_value_heads=4",
    "Llama 373 M": f"{LLAMA} model.shape.vocab_size=32000 model.shape.hidden_size=1024 "
    "model.shape.intermediate_size=2816 model.shape.num_hidden_layers=24 model.shape.num_attention_heads=16 "
    "model.shape.num_key_value_heads=16",
    "Llama 3.2 1 B": "model=llama32_1b",
    "Llama 3.2 1 B, 32k": "model=llama32_1b model.shape.vocab_size=32000",
    "Qwen3 30 M, tied": "model=random model.shape.model_type=qwen3 model.shape.tie_word_embeddings=true "
    "model.shape.vocab_size=32000 model.shape.hidden_size=384 model.shape.intermediate_size=1152 "
    "model.shape.num_hidden_layers=8 model.shape.num_attention_heads=6 model.shape.num_key_value_heads=2 "
    "model.shape.head_dim=64",
    "Mixtral 33 M": "model=random model.shape.model_type=mixtral model.shape.vocab_size=8192 "
    "model.shape.hidden_size=256 model.shape.intermediate_size=704 model.shape.num_hidden_layers=6 "
    "model.shape.num_attention_heads=4 model.shape.num_key_value_heads=2 model.shape.num_local_experts=8",
}

ROWS = {"sft": "texts", "pretrain": "plain", "dpo": "pairs", "grpo": "asked"}
"""Which file each objective learns from."""


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table.

    length: tokens of the longest row. rows: of a step, over all ranks. settings: beside those of every case, as typed.
    mixed: rows are of many lengths, not all full. steps: that are taken.
    """

    model: str
    settings: str = ""
    processes: int = 1
    length: int = 256
    rows: int = 4
    objective: str = "sft"
    mixed: bool = False
    steps: int = 2

    @property
    def name(self) -> str:
        """As it is asked for, and kept."""
        rows = f"{self.rows}x{self.length}{' mixed' if self.mixed else ''}"
        return " ".join([self.model, self.objective, f"x{self.processes}", rows, self.settings]).strip()

    def overrides(self, folder: Path) -> list[str]:
        """What a run of it is composed from; rows as `write` has left them in the folder."""
        kind = ROWS[self.objective] + ("-mixed" if self.mixed else "")
        objective = f"objective={self.objective}"
        if self.objective == "grpo":
            objective += " reward=[length] reward.length.longest=20 rollout=huggingface"
            objective += " objective.group=4 objective.max_new_tokens=48"
        steps = f"steps={self.steps} batch.size={self.rows} max_length={self.length}"
        data = f"data=jsonl data.path={folder / kind}-{self.rows}.jsonl"
        quiet = "tracker=[] evaluator=[] guard=[] exporter=[] dry_step=never checkpoint.background=false"
        sharding = "" if "sharding=" in self.settings else "sharding=single"
        return " ".join([MODELS[self.model], objective, steps, data, quiet, sharding, self.settings]).split()


RECOMPUTED = "sharding.activation_checkpointing=true"
BF16 = "precision=bf16"
CASES: Sequence[Case] = (
    Case("Llama 11 M"),
    Case("Llama 11 M", BF16),
    Case("Llama 11 M", RECOMPUTED),
    Case("Llama 11 M", "batch.micro=1"),
    Case("Llama 11 M", "packing=true", mixed=True, rows=16),
    Case("Llama 11 M", mixed=True, rows=12, length=512),
    Case("Llama 11 M", objective="pretrain", length=512),
    Case("Llama 11 M", "optimizer=sgd", length=64),
    Case("Llama 11 M", "sharding=fsdp sharding.replicate=2", processes=4),
    Case("Llama 11 M", f"sharding=fsdp sharding.replicate=2 {RECOMPUTED} {BF16}", processes=4, rows=8),
    Case("Llama 11 M", "sharding=fsdp sharding.replicate=2 adapter=lora", processes=4),
    Case("Llama 11 M", "adapter=lora", objective="grpo", rows=2, steps=2),
    Case("Llama 35 M"),
    Case("Llama 35 M", f"{BF16} {RECOMPUTED}", length=512),
    Case("Llama 35 M", objective="dpo"),
    Case("Llama 35 M", "objective.reference=live", objective="dpo"),
    Case("Llama 35 M", "adapter=lora", objective="dpo"),
    Case("Llama 35 M", "sharding=ddp", processes=2),
    Case("Llama 35 M", f"sharding=ddp {BF16} {RECOMPUTED} batch.micro=1", processes=2),
    Case("Llama 35 M", "sharding=ddp adapter=lora packing=true", processes=2, rows=16, mixed=True),
    Case("Llama 35 M", "sharding=fsdp", processes=2),
    Case("Llama 35 M", f"sharding=fsdp {BF16}", processes=2),
    Case("Llama 35 M", f"sharding=fsdp {RECOMPUTED} batch.micro=1", processes=2),
    Case("Llama 35 M", "sharding=fsdp sharding.sequence=2", processes=2),
    Case("Llama 35 M", "sharding=fsdp sharding.tensor=2", processes=2),
    Case("Llama 35 M", "sharding=fsdp adapter=lora", processes=2, objective="dpo"),
    Case("Llama 35 M", "sharding=zero sharding.stage=1", processes=2),
    Case("Llama 35 M", "sharding=zero sharding.stage=2", processes=2),
    Case("Llama 35 M", "sharding=zero sharding.stage=3", processes=2),
    Case("Llama 35 M", f"sharding=zero sharding.stage=3 {BF16} {RECOMPUTED}", processes=2),
    Case("Llama 35 M", f"sharding=zero sharding.stage=2 adapter=lora {BF16}", processes=2),
    Case("Qwen3 30 M, tied"),
    Case("Qwen3 30 M, tied", "sharding=fsdp", processes=2),
    Case("Mixtral 33 M"),
    Case("Mixtral 33 M", f"sharding=fsdp {BF16}", processes=2),
    Case("Llama 134 M"),
    Case("Llama 134 M", f"adapter=lora {BF16}"),
    Case("Llama 134 M", f"adapter=qlora {BF16}"),
    Case("Llama 134 M", "sharding=fsdp", processes=2),
    Case("Llama 134 M", f"sharding=fsdp adapter=qlora {BF16} {RECOMPUTED}", processes=2),
    Case("Llama 134 M", f"sharding=zero sharding.stage=3 adapter=lora {RECOMPUTED}", processes=2),
    Case("Llama 373 M", f"{BF16} {RECOMPUTED}", rows=2),
    Case("Llama 373 M", f"adapter=lora {RECOMPUTED}", rows=2),
    Case("Llama 373 M", f"sharding=fsdp {RECOMPUTED}", rows=2, processes=2),
    Case("Llama 3.2 1 B", f"adapter=lora {BF16}", rows=2, length=128),
    Case("Llama 3.2 1 B", f"adapter=qlora {BF16} {RECOMPUTED}", rows=2, length=128),
    Case("Llama 3.2 1 B", f"sharding=fsdp adapter=lora {BF16} {RECOMPUTED}", rows=2, length=128, processes=2),
    Case("Llama 3.2 1 B, 32k", f"{BF16} {RECOMPUTED} optimizer=sgd", rows=1, length=128),
)
"""All lines, the small ones first."""


def write(folder: Path) -> None:
    """The files of all cases: as many rows as a step takes, so that each step meets the longest of them."""
    for kind in dict.fromkeys(ROWS.values()):
        for count in sorted({case.rows for case in CASES}):
            for mixed in (False, True):
                rows = [_row(kind, number, count, mixed) for number in range(count)]
                path = folder / f"{kind}{'-mixed' if mixed else ''}-{count}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(kind: str, number: int, count: int, mixed: bool) -> dict[str, Any]:
    """A row longer than any case takes, or one of some length up to it."""
    draw = random.Random(f"{kind} {number} {count} {mixed}")
    share = (number + 1) / count if mixed else 1.0
    asked = _words(draw, 12)
    answers = [_words(draw, int(share * (300 if kind != "asked" else 12))) for _ in range(2)]
    if kind == "pairs":
        return {"prompt": asked, "chosen": answers[0], "rejected": answers[1]}
    if kind == "asked":
        return {"prompt": asked, "answer": answers[0]}
    if kind == "plain":  # in one piece each: longer ones are cut into several rows
        return {"text": " ".join(answers[0].split()[:100])}
    return {"prompt": asked, "completion": answers[0]}


def _words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 8))) for _ in range(count))
