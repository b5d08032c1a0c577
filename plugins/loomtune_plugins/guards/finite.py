"""Steps whose numbers are not finite."""

import math

from loomtune.contracts import Guard, Judgement, Verdict
from loomtune.errors import UserError
from loomtune_plugins.guards.settings import FiniteSettings


class Finite(Guard):
    """Skips a step with a loss or gradient norm that is NaN or infinite: one such update ruins every weight."""

    def __init__(self, settings: FiniteSettings) -> None:
        if settings.patience < 0:
            raise UserError.of(
                f"guard.finite.patience={settings.patience} is negative", "set guard.finite.patience to 0 or more"
            )
        self._patience = settings.patience
        self._last, self._in_a_row = 0, 0

    def judge(self, step: int, loss: float, gradient_norm: float) -> Judgement:
        """SKIP where a number is not finite, STOP after more than `patience` of them in a row."""
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            return Judgement(Verdict.CONTINUE)
        if step != self._last:  # with several trained networks a step is judged once for each
            self._in_a_row = self._in_a_row + 1 if step == self._last + 1 else 1
            self._last = step
        reason = f"step {step}: loss {loss:g}, gradient norm {gradient_norm:g}"
        if self._in_a_row <= self._patience:
            return Judgement(Verdict.SKIP, reason)
        return Judgement(
            Verdict.STOP,
            f"{reason}; {self._in_a_row} steps in a row were not finite. "
            "Lower optimizer.lr, lengthen schedule.warmup or set precision=fp32",
        )
