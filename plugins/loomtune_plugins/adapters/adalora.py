"""AdaLoRA by peft's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Optimizer, WeightSource
from loomtune.errors import UserError
from loomtune_plugins.adapters.adalora_settings import AdaLoraSettings, resolved, too_short
from loomtune_plugins.adapters.around import Around
from loomtune_plugins.adapters.told import misset
from loomtune_plugins.adapters.wrapped.targets import ALL_LINEAR, check_rank, linear_layers
from loomtune_plugins.adapters.wrapped.wrapping import Wrapping

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune_plugins.adapters.wrapped.woven import Added


class AdaLora(Wrapping):
    """Adds `scale * B diag(E) A` to linear layers, and lets the least important entries of E go.

    Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning". Sharing out is a part of the
    optimizer's step (see `Allocator`), since what it remembers of each parameter lies where the parameter does.
    """

    def __init__(self, settings: AdaLoraSettings) -> None:
        super().__init__()
        _check(settings)
        self._settings = settings
        # Where no run tells its steps, as in an export, what peft's config asks for at least.
        self._scheduled = replace(settings, tinit=settings.tinit or 0, tfinal=settings.tfinal or 0)
        self._steps = (settings.tinit or 0) + (settings.tfinal or 0) + 1

    def layers(self, module: nn.Module) -> list[str]:
        """The linear layers that are meant. Raises UserError where a rank is more than one of them can have."""
        found = linear_layers(module, self._settings.targets, "AdaLoRA")
        check_rank("init_rank", self._settings.init_rank, found)
        return list(found)

    def config(self, targets: list[str], **more: Any) -> Any:
        from peft import AdaLoraConfig

        settings = self._scheduled
        return AdaLoraConfig(
            init_r=settings.init_rank,
            target_r=settings.target_rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
            tinit=settings.tinit,
            tfinal=settings.tfinal,
            deltaT=settings.delta_t,
            beta1=settings.beta1,
            beta2=settings.beta2,
            orth_reg_weight=settings.orth_reg_weight,
            total_step=self._steps,
            **more,
        )

    def settle(self, module: nn.Module) -> None:
        """The rank that peft divides by never changes: no parameter, then, that has to be saved and sharded."""
        from peft.tuners.adalora.layer import AdaLoraLayer

        for layer in module.modules():
            if isinstance(layer, AdaLoraLayer):
                ranks = {name: float(rank) for name, rank in layer.r.items()}
                del layer.ranknum
                layer.ranknum = ranks

    def first(self, added: Added, shape: tuple[int, ...], base: WeightSource, seed: int) -> Tensor:
        """E of zeros, so that nothing is added; A and B normal, of deviation 0.02 as in peft."""
        import torch

        from loomtune.world import derive

        if added.part == "lora_E":
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(derive(seed, added.layer, added.part))
        return torch.randn(shape, generator=generator).mul_(0.02)

    def optimizer(self, optimizer: Optimizer, steps: int) -> Optimizer:
        """The run's, whose steps also share out ranks. Raises UserError where the run is too short for that."""
        from loomtune_plugins.adapters.adalora_budget import KEPT, Allocator

        if wrong := too_short(self._settings, steps):
            raise UserError.of(*wrong)
        self._scheduled, self._steps = resolved(self._settings, steps), steps
        return Around(optimizer, lambda built: Allocator(built, self._scheduled, steps, self.parts()).join(), KEPT)


def _check(settings: AdaLoraSettings) -> None:
    low, high = settings.target_rank, settings.init_rank
    steps, right = "is no number of steps", "0 or more, or to null"
    faults = misset(
        settings,
        ("init_rank", high >= 1, "is no rank", "a whole number from 1 on"),
        ("target_rank", low >= 1, "is no rank", "a whole number from 1 on"),
        ("target_rank", low <= high, f"is more than adapter.init_rank={high}", f"at most {high}"),
        ("alpha", settings.alpha > 0, "would add nothing", "a number above 0"),
        ("dropout", 0 <= settings.dropout < 1, "is no probability below 1", "0 or more, below 1"),
        ("targets", bool(settings.targets), "adapts nothing", f"[{ALL_LINEAR}] or layers"),
        ("delta_t", settings.delta_t >= 1, steps, "a whole number from 1 on"),
        ("beta1", 0 < settings.beta1 < 1, "does not lie between 0 and 1", "above 0 and below 1"),
        ("beta2", 0 < settings.beta2 < 1, "does not lie between 0 and 1", "above 0 and below 1"),
        ("orth_reg_weight", settings.orth_reg_weight >= 0, "would tear A and B apart", "0 or more"),
        ("tinit", (settings.tinit or 0) >= 0, steps, right),
        ("tfinal", (settings.tfinal or 0) >= 0, steps, right),
    )
    if faults:
        raise UserError(*faults)
