"""What both of TRL's contenders have in common: the settings that make it the same job, and the clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from clock import CLOCK
from job import Job
from transformers import TrainerCallback


def settings(job: Job) -> dict[str, Any]:
    """All else is TRL's default."""
    return {
        "output_dir": f"{job.rows}.trl",
        "max_steps": job.steps,
        "max_length": job.max_length,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": job.clip,
        "bf16": False,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
    }


class Marks(TrainerCallback):  # type: ignore[misc]
    """Marks a step at its end; what is said of it comes with the log that follows. examples: in each step."""

    def __init__(self, examples: Sequence[int]) -> None:
        self.examples = examples
        self.norm = float("nan")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        CLOCK.mark(self.examples[state.global_step - 1], grad_norm=self.norm)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            said = {name: float(logs[name]) for name in ("loss", "logps/chosen", "logps/rejected") if name in logs}
            CLOCK.marks[-1].update(said)

    def watch(self, trainer: Any) -> None:
        """Takes the norm of gradients before they are clipped: torch's own is 5e-4 too small for a matrix of 12 M."""
        clip = trainer.accelerator.clip_grad_norm_

        def clipping(parameters: Any, *given: Any, **named: Any) -> Any:
            parameters = list(parameters)
            self.norm = norm(parameter.grad for parameter in parameters if parameter.grad is not None)
            return clip(parameters, *given, **named)

        trainer.accelerator.clip_grad_norm_ = clipping


def norm(gradients: Any) -> float:
    """Of all of them as one vector, in double precision, without a copy of any."""
    blocks = (block for gradient in gradients for block in gradient.flatten().split(1 << 16))
    return math.hypot(*(float(torch.linalg.vector_norm(block, dtype=torch.float64)) for block in blocks))
