"""Settings of learning from a teacher."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option
from loomtune_plugins.objectives.sft_settings import SftSettings


@dataclass
class DistillSettings(SftSettings):
    """How far the policy is from its teacher, and on which tokens."""

    beta: float = option(0.5, "0: forward KL(teacher || policy), 1: reverse KL(policy || teacher), between: JSD")
    temperature: float = option(1.0, "divides the logits of both")
    teacher_logits: str = option(
        "live",
        "live: the teacher is read in each step; stored: once before the first, its top_k log-probabilities of each "
        "target are kept on disk, and it is not in memory while training",
    )
    top_k: int = option(64, "likeliest tokens kept with teacher_logits=stored; all others count as one more class")
    on_policy: float = option(0.0, "share of rows, drawn anew at each visit, whose answer the policy writes itself")
    max_new_tokens: int = option(128, "longest answer that the policy writes, in tokens, where on_policy > 0")
    sampling_temperature: float = option(1.0, "at which the policy writes where on_policy > 0; 0: greedily")
