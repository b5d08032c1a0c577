"""The contender that is TRL: `python with_trl.py JOB [packing]`.

As it comes: every setting is TRL's default but those that make it the same job (rows in order, batch, rate, fp32, clip,
length, no checkpoints, losses logged at every step). Packing: its own default strategy, with as many packed rows a step
as hold about `batch` examples.
"""

from __future__ import annotations

import sys
from typing import Any

import trl_marks
from clock import CLOCK
from datasets import Dataset, disable_progress_bars
from job import Job
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    job, packing = Job.read(sys.argv[1]), "packing" in sys.argv[2:]
    disable_progress_bars()
    size = job.packs if packing else job.batch
    trainer = SFTTrainer(
        model=job.model,
        args=SFTConfig(**trl_marks.settings(job), per_device_train_batch_size=size, packing=packing),
        train_dataset=Dataset.from_list(job.examples()),
        processing_class=AutoTokenizer.from_pretrained(job.model),
    )
    trainer.add_callback(trl_marks.Marks(examples(trainer.train_dataset, job, packing)))
    trainer.train()
    CLOCK.write()


def examples(rows: Any, job: Job, packing: bool) -> list[int]:
    """Examples in each step."""
    if not packing:
        return [job.batch] * job.steps
    counts = [len(lengths) for lengths in rows["seq_lengths"]]
    visits = [counts[i % len(counts)] for i in range(job.steps * job.packs)]
    return [sum(visits[i : i + job.packs]) for i in range(0, len(visits), job.packs)]


if __name__ == "__main__":
    main()
