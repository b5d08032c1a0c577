"""Low-rank adaptation by peft's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loomtune.contracts import WeightSource
from loomtune.errors import Fault, UserError
from loomtune_plugins.adapters.settings import LoraSettings
from loomtune_plugins.adapters.targets import ALL_LINEAR, linear_layers
from loomtune_plugins.adapters.wrapping import Wrapping

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune_plugins.adapters.woven import Added


class Lora(Wrapping):
    """Adds `scale * B A` to linear layers and trains nothing else (Hu et al. 2021, "LoRA")."""

    def __init__(self, settings: LoraSettings) -> None:
        super().__init__()
        _check(settings)
        self._settings = settings

    def layers(self, module: nn.Module) -> list[str]:
        """The linear layers that are meant. Raises UserError where a rank is more than one of them can have."""
        found = linear_layers(module, self._settings.targets, "LoRA")
        name, widths = min(found.items(), key=lambda layer: min(layer[1]))
        if (rank := self._settings.rank) > min(widths):
            raise UserError.of(
                f"adapter.rank={rank} is more than layer '{name}' ({widths[0]} to {widths[1]}) can have",
                f"set adapter.rank to at most {min(widths)}, or leave the layer out of adapter.targets",
            )
        return list(found)

    def config(self, targets: list[str], **more: Any) -> Any:
        from peft import LoraConfig

        settings = self._settings
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
            use_rslora=settings.rslora,
            use_dora=settings.dora,
            **more,
        )

    def first(self, added: Added, shape: tuple[int, ...], base: WeightSource, seed: int) -> Tensor:
        from loomtune_plugins.adapters import lora_weights

        return lora_weights.first(added, shape, base, seed)

    def learning_rate_scale(self, name: str) -> float:
        """The ratio of LoRA+ (Hayou et al. 2024) for B."""
        added = self.names.added.get(name)
        return self._settings.plus_ratio if added is not None and added.part == "lora_B" else 1.0


def _check(settings: LoraSettings) -> None:
    faults = [
        Fault(f"adapter.{key}={value} {wrong}", f"set adapter.{key} to {right}")
        for key, value, fits, wrong, right in (
            ("rank", settings.rank, settings.rank >= 1, "is no rank", "a whole number from 1 on"),
            ("alpha", settings.alpha, settings.alpha > 0, "would add nothing", "a number above 0"),
            ("dropout", settings.dropout, 0 <= settings.dropout < 1, "is no probability below 1", "0 or more, below 1"),
            ("plus_ratio", settings.plus_ratio, settings.plus_ratio > 0, "is no ratio", "a number above 0"),
            ("targets", settings.targets, bool(settings.targets), "adapts nothing", f"[{ALL_LINEAR}] or layers"),
        )
        if not fits
    ]
    if faults:
        raise UserError(*faults)
