"""An optimizer around the run's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import Optimizer, ParameterGroup, StateKind

if TYPE_CHECKING:
    import torch


class Around(Optimizer):
    """The run's optimizer, in whose steps an adapter does more.

    hook: told of what the inner one has built. kept: what the adapter keeps there of each parameter.
    """

    def __init__(
        self,
        inner: Optimizer,
        hook: Callable[[torch.optim.Optimizer], None],
        kept: Mapping[str, StateKind] | None = None,
    ) -> None:
        self._inner, self._hook, self._kept = inner, hook, kept or {}

    @property
    def learning_rate(self) -> float:
        """The inner one's."""
        return self._inner.learning_rate

    @property
    def clip(self) -> float:
        """The inner one's."""
        return self._inner.clip

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        """The inner optimizer, hooked into."""
        built = self._inner.build(groups)
        self._hook(built)
        return built

    def state(self) -> Mapping[str, StateKind]:
        """The inner one's and what is kept beside it."""
        return {**self._inner.state(), **self._kept}
