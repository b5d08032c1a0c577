"""The contender that is TRL: `python with_trl.py JOB [packing]`.

As it comes: every setting is TRL's default but those that make it the same job (rows in order, batch, rate, fp32, clip,
length, no checkpoints, losses logged at every step). Packing: its own default strategy, with as many packed rows a step
as hold about `batch` examples.
"""

from __future__ import annotations

import sys
from typing import Any

from clock import CLOCK
from datasets import Dataset, disable_progress_bars
from job import Job
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Marks(TrainerCallback):  # type: ignore[misc]
    """Marks a step at its end; the loss comes with the log that follows it, the examples from what was packed."""

    def __init__(self, examples: list[int]) -> None:
        self.examples = examples

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        CLOCK.mark(float("nan"), self.examples[state.global_step - 1])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            CLOCK.marks[-1]["loss"] = float(logs["loss"])


def main() -> None:
    job, packing = Job.read(sys.argv[1]), "packing" in sys.argv[2:]
    disable_progress_bars()
    trainer = SFTTrainer(
        model=job.model,
        args=config(job, packing),
        train_dataset=Dataset.from_list(job.examples()),
        processing_class=AutoTokenizer.from_pretrained(job.model),
    )
    trainer.add_callback(Marks(examples(trainer.train_dataset, job, packing)))
    trainer.train()
    CLOCK.write()


def config(job: Job, packing: bool) -> SFTConfig:
    return SFTConfig(
        output_dir=f"{job.rows}.trl",
        per_device_train_batch_size=job.packs if packing else job.batch,
        max_steps=job.steps,
        max_length=job.max_length,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        max_grad_norm=job.clip,
        bf16=False,
        packing=packing,
        train_sampling_strategy="sequential",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )


def examples(rows: Any, job: Job, packing: bool) -> list[int]:
    """Examples in each step."""
    if not packing:
        return [job.batch] * job.steps
    counts = [len(lengths) for lengths in rows["seq_lengths"]]
    visits = [counts[i % len(counts)] for i in range(job.steps * job.packs)]
    return [sum(visits[i : i + job.packs]) for i in range(0, len(visits), job.packs)]


if __name__ == "__main__":
    main()
