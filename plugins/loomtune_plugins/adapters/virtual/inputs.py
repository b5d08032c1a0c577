"""Virtual tokens as inputs: what prompt tuning and P-tuning have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Batch
from loomtune_plugins.adapters.virtual.virtual import Virtual

if TYPE_CHECKING:
    from torch import nn

    from loomtune_plugins.adapters.virtual.woven import Woven


class VirtualInputs(Virtual):
    """Puts virtual tokens before each sample, which the model's embedding has the encoder make.

    Real tokens stand at the positions behind them, as in peft.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self._vocabulary = 0

    def prepare(self, woven: Woven) -> None:
        from loomtune_plugins.adapters.virtual import rows as virtual_rows

        self._vocabulary = virtual_rows.understand(woven)

    def inputs(
        self, module: nn.Module, batch: Batch, attention: Callable[[Batch], Mapping[str, Any]]
    ) -> tuple[Batch, Mapping[str, Any]]:
        """The batch with virtual tokens before each tree of segments, packed or not, and its attention."""
        from loomtune_plugins.adapters.virtual.rows import led

        given = led(batch, self.virtual_tokens, self._vocabulary)
        return given, attention(given)

    def lead(self, woven: Woven, call: dict[str, Any]) -> dict[str, Any]:
        from loomtune_plugins.adapters.virtual import rows as virtual_rows

        return virtual_rows.lead(self._vocabulary, woven, call)
