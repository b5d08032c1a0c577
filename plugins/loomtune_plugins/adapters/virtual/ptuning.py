"""P-tuning by peft's encoder of virtual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loomtune_plugins.adapters.virtual.inputs import VirtualInputs
from loomtune_plugins.adapters.virtual.settings import PtuningSettings
from loomtune_plugins.adapters.virtual.virtual import check_length, check_width

if TYPE_CHECKING:
    from torch import nn


class Ptuning(VirtualInputs):
    """Trains virtual tokens and the network that makes them (Liu et al. 2021, "GPT Understands, Too").

    The network is of linear layers, as peft advises; its LSTM would draw dropout from torch's global state.
    """

    def __init__(self, settings: PtuningSettings) -> None:
        super().__init__(settings.length)
        check_length(settings.length)
        check_width(settings.width)
        self._settings = settings

    def config(self, **more: Any) -> Any:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.virtual_tokens,
            encoder_hidden_size=self._settings.width or None,
            **more,
        )

    def encoder(self, config: Any) -> nn.Module:
        from peft import PromptEncoder

        return PromptEncoder(config)  # type: ignore[no-any-return]
