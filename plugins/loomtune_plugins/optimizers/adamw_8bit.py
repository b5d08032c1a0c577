"""AdamW by bitsandbytes: moments of 8 bits, or paged."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import ParameterGroup, StateKind
from loomtune.errors import UserError
from loomtune_plugins.optimizers.adamw_8bit_settings import AdamW8bitSettings
from loomtune_plugins.optimizers.base import Checked
from loomtune_plugins.optimizers.groups import torch_groups

if TYPE_CHECKING:
    import torch


class AdamW8bit(Checked):
    """Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization": moments in blocks of 256 with a scale each.

    Blocks are cut out of what a rank holds of a parameter, so moments of 8 bits mean nothing under another layout.
    """

    def __init__(self, settings: AdamW8bitSettings) -> None:
        super().__init__(settings)
        if settings.bits not in (8, 32):
            raise UserError.of(f"moments of {settings.bits} bits are not known", "set optimizer.bits to 8 or 32")
        if settings.bits == 32 and not settings.paged:
            raise UserError.of("optimizer.bits=32 without pages is plain AdamW", "set optimizer=adamw, or paged=true")

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        """bitsandbytes' AdamW over the groups, in order."""
        # It warns at import of a kernel that nothing here calls (bitsandbytes 0.50.2).
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        from loomtune_plugins.optimizers.blockwise import BlockwiseAdamW

        settings = self._settings
        if settings.paged and any(p.device.type == "cpu" for group in groups for p in group.parameters):
            _say("optimizer.paged has no effect on a CPU, where there is no other memory to move to")
        return BlockwiseAdamW(
            torch_groups(groups, settings.lr, settings.weight_decay),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            bits=settings.bits,
            paged=settings.paged,
        )

    def state(self) -> Mapping[str, StateKind]:
        """Two moments and the count of steps; in 8 bits the blocks' scales too, which small parameters have none of."""
        if self._settings.bits == 32:
            return {"state1": StateKind.LIKE, "state2": StateKind.LIKE, "step": StateKind.SCALAR}
        opaque = dict.fromkeys(("state1", "state2", "absmax1", "absmax2"), StateKind.OPAQUE)
        return {**opaque, "step": StateKind.SCALAR}


@functools.cache
def _say(text: str) -> None:
    """Once, on the first rank's stderr."""
    if os.environ.get("RANK", "0") == "0":
        print(f"loomtune: {text}", file=sys.stderr)  # noqa: T201
