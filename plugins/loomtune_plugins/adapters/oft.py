"""OFT and COFT by peft's layers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Optimizer, WeightSource
from loomtune.errors import UserError
from loomtune_plugins.adapters.around import Around
from loomtune_plugins.adapters.oft_settings import BLOCK_SIZE, CoftSettings, OftSettings
from loomtune_plugins.adapters.told import misset
from loomtune_plugins.adapters.wrapped.targets import ALL_LINEAR, linear_layers
from loomtune_plugins.adapters.wrapped.wrapping import Wrapping

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune_plugins.adapters.wrapped.woven import Added


class Oft(Wrapping):
    """Rotates the inputs of linear layers by Cayley's formula of skew matrices, and trains nothing else.

    Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning"; on inputs as in Qiu et al. 2025,
    "Orthogonal Finetuning Made Scalable". peft 0.21 takes a dropout of blocks and never applies it: there is none here.
    """

    def __init__(self, settings: OftSettings) -> None:
        super().__init__()
        _check(settings)
        self._settings = settings

    def layers(self, module: nn.Module) -> list[str]:
        """The linear layers that are meant. Raises UserError where blocks do not divide the inputs of one of them."""
        found = linear_layers(module, self._settings.targets, "OFT")
        asked, counted = self._blocks, self._settings.blocks is not None
        key = "blocks" if counted else "block_size"
        for name, (inputs, _) in found.items():
            if inputs % asked or (counted and inputs // asked < 2):
                near = _nearest(asked, (widths[0] for widths in found.values()), counted)
                what = f"adapter.{key}={asked} does not divide the {inputs} inputs of layer '{name}' into blocks"
                cure = f"set adapter.{key}={near}, the nearest that divides all layers'"
                raise UserError.of(
                    what, cure if near else "leave the layer out of adapter.targets: nothing divides all"
                )
        return list(found)

    @property
    def _blocks(self) -> int:
        """The number of blocks, where it is set, else their size."""
        return self._settings.blocks or self._settings.block_size or BLOCK_SIZE

    def config(self, targets: list[str], **more: Any) -> Any:
        from peft import OFTConfig

        settings, counted = self._settings, self._settings.blocks is not None
        return OFTConfig(
            r=self._blocks if counted else 0,
            oft_block_size=0 if counted else self._blocks,
            block_share=settings.block_share,
            use_cayley_neumann=settings.neumann_terms > 0,
            num_cayley_neumann_terms=settings.neumann_terms,
            target_modules=targets,
            **more,
        )

    def settle(self, module: nn.Module) -> None:
        """Where a block's numbers stand in its skew matrix, which peft keeps in buffers that no file holds."""
        import torch
        from peft.tuners.oft.layer import OFTRotationModule

        for rotation in module.modules():
            if isinstance(rotation, OFTRotationModule):
                del rotation.rows, rotation.cols
                size = rotation.block_size
                rotation.rows, rotation.cols = torch.triu_indices(size, size, 1, device="cpu")
                rotation.register_forward_pre_hook(_follow)

    def first(self, added: Added, shape: tuple[int, ...], base: WeightSource, seed: int) -> Tensor:
        """Zeros, the skew matrix of the identity."""
        import torch

        return torch.zeros(shape)


class Coft(Oft):
    """OFT whose skew matrices are kept within a ball.

    peft projects in each forward, in place, which a gathered copy of a sharded parameter would forget. Here it is a
    part of the optimizer's step, after which every forward finds what peft would make of it.
    """

    def __init__(self, settings: CoftSettings) -> None:
        super().__init__(settings)
        if settings.eps <= 0:
            raise UserError.of(f"adapter.eps={settings.eps} rotates nothing", "set adapter.eps to a number above 0")
        self._eps = settings.eps

    def leaves(self, tensors: dict[str, Tensor], config: Any) -> None:
        """Files alone say that it is constrained: what is in them already is."""
        config.coft, config.eps = True, self._eps

    def optimizer(self, optimizer: Optimizer, steps: int) -> Optimizer:
        """The run's, whose steps end in the ball."""
        from loomtune_plugins.adapters.oft_projection import project_after

        return Around(optimizer, lambda built: project_after(built, self.parts(), self._eps))


def _follow(rotation: Any, given: tuple[Tensor]) -> None:
    """Brings plain tensors, which a module does not take along, to where it computes."""
    if rotation.rows.device != given[0].device:
        rotation.rows, rotation.cols = (where.to(given[0].device) for where in (rotation.rows, rotation.cols))


def _nearest(asked: int, inputs: Iterable[int], counted: bool) -> int | None:
    """The nearest number of blocks, or of inputs in one, that divides all; a block has two inputs at least."""
    common = math.gcd(*inputs)
    fits = [size for size in range(1, common + 1) if common % size == 0 and (common // size if counted else size) > 1]
    return min(fits, key=lambda size: abs(size - asked), default=None)


def _check(settings: OftSettings) -> None:
    size, blocks, terms = settings.block_size, settings.blocks, settings.neumann_terms
    faults = misset(
        settings,
        ("block_size", size is None or size >= 2, "rotates nothing", "a whole number from 2 on, or to null"),
        ("blocks", blocks is None or blocks >= 1, "is no number of blocks", "1 or more, or to null"),
        ("block_size", not (size and blocks), f"stands beside adapter.blocks={blocks}", "null"),
        ("neumann_terms", terms == 0 or terms >= 2, "rotates nothing", "2 or more, or to 0"),
        ("targets", bool(settings.targets), "adapts nothing", f"[{ALL_LINEAR}] or layers"),
    )
    if faults:
        raise UserError(*faults)
