"""What all schedules share: a warm-up, and how far a step has come on the way down.

No step is void. With a warm-up of w steps (none counts as 1) the rate rises as step / w, so that step w is the first at
the peak, and the way down would reach its end one step after the last. Hence

    factor(step, steps) == transformers' lambda at current_step = step,
                           with num_warmup_steps = w and num_training_steps = steps + 1

(transformers/optimization.py, `get_cosine_schedule_with_warmup` and `get_linear_schedule_with_warmup`). Without a
warm-up that is also, step for step, what transformers' Trainer does; with one, the Trainer's first rate is 0.
"""

from loomtune.errors import UserError


def check(warmup: float, floor: float = 0.0) -> None:
    """Raises UserError for a negative warm-up and for a floor outside 0 to 1."""
    if warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
        raise UserError.of(
            f"a warm-up of {warmup} is neither a number of steps nor a share of them",
            "set schedule.warmup to a whole number of steps, or to a share from 0 to below 1",
        )
    if not 0 <= floor <= 1:
        raise UserError.of(
            f"a floor of {floor} does not lie between 0 and 1", "set schedule.floor to a factor of the rate"
        )


def warm_steps(warmup: float, steps: int) -> int:
    """Steps until the peak, at least 1 (the peak itself)."""
    return max(1, int(warmup * steps) if warmup < 1 else int(warmup))


def rising(step: int, warm: int) -> float:
    """Factor of a step of the warm-up; 1 from its last step on."""
    return min(1.0, step / warm)


def progress(step: int, steps: int, warm: int) -> float:
    """How far down a step after the warm-up is: 0 at the peak, 1 where the run has ended."""
    return min(1.0, max(0, step - warm) / max(1, steps + 1 - warm))
