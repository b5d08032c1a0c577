"""The contender that is TRL's DPO: `python with_trl_dpo.py JOB [patched]`.

As it comes: every setting is TRL's default but those that make it the same job, and the reference's log-probabilities
are computed before the first step. Patched: its head keeps to positions with a target, as it does on GPUs (TRL 1.16,
`trainer/utils.py`, `compact`); nothing else changes.
"""

from __future__ import annotations

import sys

import trl_marks
from clock import CLOCK
from datasets import Dataset, disable_progress_bars
from job import Job
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils


def main() -> None:
    job = Job.read(sys.argv[1])
    disable_progress_bars()
    if "patched" in sys.argv[2:]:
        utils._use_triton = lambda device: True
    args = DPOConfig(
        **trl_marks.settings(job),
        per_device_train_batch_size=job.micro,
        gradient_accumulation_steps=job.batch // job.micro,
        precompute_ref_log_probs=True,
    )
    trainer = DPOTrainer(
        model=job.model,
        args=args,
        train_dataset=Dataset.from_list(job.examples()),
        processing_class=AutoTokenizer.from_pretrained(job.model),
    )
    marks = trl_marks.Marks([job.batch] * job.steps)
    marks.watch(trainer)
    trainer.add_callback(marks)
    trainer.train()
    CLOCK.write()


if __name__ == "__main__":
    main()
