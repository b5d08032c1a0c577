"""bitsandbytes' AdamW on parameters that may be sharded, with state that a checkpoint can hold.

bitsandbytes 0.50.2 steps plain tensors, keeps its tables of 8-bit values with every parameter and counts steps in a
plain number. Here each step hands it this rank's part as a plain tensor, the tables are left out of the state, and
whether a parameter is small is decided by all of it: ranks would keep parts of one parameter in different types.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.optim import AdamW
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SMALL = 4096
"""Numbers below which a parameter's moments stay in fp32."""

TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}
MOMENTS = ("state1", "state2")
SCALES = ("absmax1", "absmax2")


class BlockwiseAdamW(AdamW):  # type: ignore[misc]  # bitsandbytes has no types
    """The state of a parameter: `state1`, `state2`, `step`, and `absmax1`, `absmax2` where moments have 8 bits."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        bits: int,
        paged: bool,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, optim_bits=bits, is_paged=paged)

    def init_state(self, group: Mapping[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Moments of zero."""
        part = _part(p)
        self.args.min_8bit_size = 0 if p.numel() >= SMALL else part.numel() + 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            super().init_state(group, part, gindex, pindex)
        made = {name: value for name, value in self.state.pop(part).items() if name not in TABLES}
        if self.args.optim_bits == 8:  # a small parameter has no blocks, which a checkpoint is to say
            made = {**dict.fromkeys(SCALES, torch.zeros(0, device=part.device)), **made}
        self.state[p].update(made)

    def update_step(self, group: Mapping[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """AdamW on this rank's part, in place."""
        part, state = _part(p), self.state[p]
        assert p.grad is not None and part.is_contiguous(), "what is not contiguous would be updated in a copy"
        if not part.numel():
            return
        part.grad = _part(p.grad)
        known = {name: self._held(part, _part(value)) if name in MOMENTS else value for name, value in state.items()}
        if known["state1"].dtype == torch.uint8:
            known |= {table: self._table(values, part.device) for table, values in TABLES.items()}
        self.state[part] = {**known, "step": int(state["step"])}
        try:
            super().update_step(group, part, gindex, pindex)
        finally:
            done = self.state.pop(part)
        state.update({name: value for name, value in done.items() if name not in TABLES})

    def _held(self, part: Tensor, moment: Tensor) -> Tensor:
        """A moment where it belongs: one that a checkpoint gave is put into pages first."""
        if not self.is_paged or part.device.type == "cpu" or part.numel() < 1e5 or hasattr(moment, "is_paged"):
            return moment
        buffer: Tensor = self.get_state_buffer(part, dtype=moment.dtype)
        return buffer.copy_(moment)

    def _table(self, values: str, device: torch.device) -> Tensor:
        """The 256 values of a moment."""
        found: Tensor = self.name2qmap[values].to(device)
        self.name2qmap[values] = found
        return found


def _part(tensor: Tensor) -> Tensor:
    """This rank's part, as a plain tensor that shares its storage and can be told from its parameter."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
