"""Full fine-tuning: the null object among adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune.contracts import Adapter, WeightSource
from loomtune.errors import UserError
from loomtune_plugins.adapters.patterns import by_start, select
from loomtune_plugins.adapters.settings import FullSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


class Full(Adapter):
    """Trains the model as it is. Nothing is added, so names, weights and files are the base's own."""

    saves_base = True

    def __init__(self, settings: FullSettings) -> None:
        self._settings = settings

    def weave(self, module: nn.Module, weights: WeightSource, seed: int) -> tuple[nn.Module, WeightSource]:
        """The same module and source, with the frozen parameters marked."""
        # Tied parameters bear several names, and any of them may be meant.
        parameters = dict(module.named_parameters(remove_duplicate=False))
        frozen = select("adapter.freeze", self._settings.freeze, list(parameters), by_start, "parameter or module")
        module.requires_grad_(True)
        for name in frozen:
            parameters[name].requires_grad_(False)
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise UserError.of("adapter.freeze leaves no parameter to train", "name fewer parameters in adapter.freeze")
        return module, weights

    def base(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return module

    def off(self, module: nn.Module) -> AbstractContextManager[None]:
        """There is nothing to switch off; who asks did not look for the trait `adapter_off`."""
        raise AssertionError("full fine-tuning changes the base itself: a frozen reference needs an engine of its own")

    def base_name(self, name: str) -> str | None:
        """The same name."""
        return name

    def learning_rate_scale(self, name: str) -> float:
        """The same rate for all."""
        return 1.0

    def merged(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors as they are."""
        return tensors

    def save(self, folder: Path, tensors: Iterator[tuple[str, Tensor]], base: str) -> None:
        """Nothing was added, so nothing is written."""
        return
