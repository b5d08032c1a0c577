"""A model, its adapter and its heads as one module with one forward, which is what sharding strategies wrap."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from loomtune.contracts.batch import Batch
from loomtune.contracts.model import Head
from loomtune.contracts.role import Reader
from loomtune.contracts.sharding import EngineSpec
from loomtune.toolkit.dropout import replace_dropout
from loomtune.world import derive

PREFIX = "module."


class Network(nn.Module):
    """What runs inside an engine's forward. All that needs whole parameters happens in `forward`, the head included."""

    def __init__(self, spec: EngineSpec) -> None:
        """Builds the skeleton without storage and weaves the adapter in; `source` then knows every tensor of it."""
        super().__init__()
        self.spec = spec
        with torch.device("meta"):
            skeleton = spec.model.skeleton()
            width = int(spec.model.head(skeleton).in_features)  # type: ignore[arg-type]
            self.heads = nn.ModuleDict({name: nn.Linear(width, 1, bias=False) for name in spec.scalar_heads})
        woven, self.source = spec.adapter.weave(skeleton, spec.model.weights(spec.seed), spec.seed)
        self.module = woven
        replace_dropout(woven, spec.seed)
        if spec.optimizer is None:
            self.requires_grad_(False)

    @property
    def base(self) -> nn.Module:
        """The model as its plugin made it."""
        return self.spec.adapter.base(self.module)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of activations."""
        return torch.bfloat16 if self.spec.precision == "bf16" else torch.float32

    def forward(self, batch: Batch, reader: Reader, head: Head, adapter: bool) -> Tensor:
        """What the reader makes of the hidden states `(targets, width)` at the positions that predict."""
        spec = self.spec
        with nullcontext() if adapter else spec.adapter.off(self.module):
            hidden = spec.model.hidden(self.base, batch, spec.kernel.attention(batch, self.compute_dtype))
        predicting = hidden.flatten(0, 1).index_select(0, batch.predict_from)
        return reader(predicting, spec.model.head(self.base) if head == "lm" else self.heads[head])

    def initial(self, name: str, where: tuple[slice, ...] | None) -> Tensor:
        """A parameter's or saved buffer's first values, or a slice of them, by its name in this module."""
        if name.startswith(PREFIX):
            return self.source.read(name.removeprefix(PREFIX), where)
        shape = self.get_parameter(name).shape
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(derive(self.spec.seed, name))) / shape[-1]
        return drawn if where is None else drawn[where]


def saved_name(name: str) -> str:
    """The name in checkpoints of a tensor of a network: the woven module's own; heads keep their prefix."""
    return name.removeprefix(PREFIX)
