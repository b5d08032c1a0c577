"""How a network is laid out over processes: the engine contract.

An engine is everything that differs between one process, DDP, FSDP2 and ZeRO. What it does must not depend on which one
it is: sums over ranks, never means of means; the true global gradient norm; full tensors by name on demand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loomtune.contracts.batch import Batch
from loomtune.contracts.model import Head
from loomtune.contracts.optimizer import Optimizer
from loomtune.contracts.role import Reader
from loomtune.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune.contracts.adapter import Adapter
    from loomtune.contracts.kernel import Kernel
    from loomtune.contracts.model import Model
    from loomtune.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an engine is made of.

    optimizer: None for a frozen network.
    precision: `fp32` or `bf16`, the type of computation; weights that are trained are kept in fp32 in either.
    heads: the output heads that are read: `lm`, and names of scalar heads `(width -> 1)`. An `lm` head that is not
        among them, nor tied to the embedding, is not trained.
    seed: of drawn weights and dropout.
    """

    model: Model
    adapter: Adapter
    kernel: Kernel
    optimizer: Optimizer | None
    precision: str
    seed: int
    heads: tuple[Head, ...] = ("lm",)


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """The part of a parameter that this rank answers for in a checkpoint.

    name: as in the woven module. shape: of the whole parameter. offset: where the part begins, one entry a dimension.
    tensors: `weight` (fp32) and what the optimizer declared, each the same part, or a scalar. A parameter may come in
    several parts, each a box: a flat partition is cut into boxes.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensors: Mapping[str, Tensor]


Region = tuple[slice, ...]
StateReader = Callable[[str, str, Region | None], "Tensor"]
"""(parameter, tensor name, region or None for all of it) -> the stored values, on the CPU; KeyError where none are."""


class Engine(ABC):
    """A network under a sharding strategy, with the optimizer of its trained parameters.

    Every rank calls every method equally often and in the same order, with empty batches where it has no rows.
    spec: what it was made of. updates: how often weights changed; a copy of them elsewhere is stale once it grows.
    """

    spec: EngineSpec
    updates: int = 0

    @abstractmethod
    def forward(self, batch: Batch, reader: Reader, *, adapter: bool = True) -> Any:
        """Runs the network and gives what the reader makes of the hidden states at `batch.predict_from`.

        adapter: False computes as the base does.
        """

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch. After the last one's gradients are reduced over ranks.

        When the others' are, is the engine's choice: each by itself where only a part of them is kept.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients. Summed over ranks and micro-batches they are the global loss's: no averaging."""

    @abstractmethod
    def step(self, rate: float, clip: float, proceed: Callable[[float], bool]) -> float:
        """Takes one optimizer step and gives the global gradient norm before clipping.

        rate: learning rate, which each parameter group scales. clip: largest norm, 0 for none. proceed: asked with the
        norm, which is equal on every rank; where it answers False the gradients are dropped and nothing changes.
        """

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """Within it dropout is off and no gradients are kept; afterwards nothing has changed."""

    @abstractmethod
    def gathered(self) -> AbstractContextManager[nn.Module]:
        """Within it the plain base module (adapter included) with all weights, for generation; freed afterwards."""

    @abstractmethod
    def stream_weights(self, wanted: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Parameters and saved buffers, one full fp32 tensor at a time, on every rank. Tied names come once.

        wanted: which names, so that the others need not be gathered; the same on every rank. None: all.
        """

    @abstractmethod
    def shards(self) -> Iterator[ParameterShard]:
        """This rank's part of every trained parameter and its optimizer state; no communication."""

    @abstractmethod
    def load(self, read: StateReader, *, optimizer: bool) -> None:
        """Sets trained parameters, and the optimizer's state if asked, from any layout."""

    def wearing(self, read: StateReader) -> AbstractContextManager[None]:
        """Within it trained parameters are those that are read; afterwards they are to the bit what they were.

        The optimizer's state is not touched. A KeyError of `read` leaves a parameter as it is. Collective, on leaving
        too. Raises UserError, as here, where a layout cannot do it.
        """
        what = f"{type(self).__name__} cannot put other values in the place of those that it trains"
        raise UserError.of(what, "choose another sharding, or give the role a model of its own")

    @abstractmethod
    def trained(self) -> Mapping[str, tuple[int, ...]]:
        """Names and full shapes of the trained parameters, in the order of the module."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes that the optimizer's state takes on this rank's device once every parameter has taken a step.

        What lies in host memory between steps takes none there.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees what the engine holds."""


class Sharding(ABC):
    """A strategy: makes engines."""

    @abstractmethod
    def check(self, world_size: int) -> None:
        """Raises UserError where the strategy cannot run on so many ranks, naming the nearest that it can."""

    def suits(self, model: Model) -> None:
        """Raises UserError where the model cannot be laid out so; without torch, before any process exists."""
        return

    @abstractmethod
    def replicas(self, world: World) -> tuple[int, int]:
        """(this rank's index, how many) among those that get different rows; tensor-parallel ranks share theirs."""

    @abstractmethod
    def engine(self, spec: EngineSpec, world: World) -> Engine:
        """Builds a network: birth without storage, weaving, layout, weights read slice by slice, optimizer."""

    def rehearsed(self, spec: EngineSpec, world: World, kind: str = "") -> Engine:
        """The engine for a rehearsal: tensors without storage, and collectives that reach nobody.

        kind: of the devices that the run is for, as in `Hardware`; the tensors are of the CPU, whatever it is.
        As here `engine` itself, where its code runs so. Else a double that allocates, computes and sends the same.
        """
        return self.engine(spec, world)
