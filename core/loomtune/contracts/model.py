"""Where a model comes from: its skeleton, its weights, its tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from loomtune.contracts.batch import Batch
from loomtune.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, dtype, nn

Head = str
"""Name of an output head of a network: `lm` for next-token logits; others are scalar heads that a role asks for."""


class Tokenizer(ABC):
    """Text to token ids and back. Made in the launching process too, so importing it must not import torch."""

    eos_id: int
    pad_id: int
    """Never equal to `eos_id`: a padding token that ends sentences would hide them from the loss."""
    bos_id: int | None
    adds_bos: bool = True
    """Whether the tokenizer by itself begins a text with `bos_id`, as servers then do (Llama 3 does, SmolLM not)."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with no special token added by the tokenizer."""

    @abstractmethod
    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids. special: keep special tokens visible."""

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end an answer: as here that of the end of a text, and where it is another the end of a turn."""
        return (self.eos_id,)

    @property
    def template(self) -> str:
        """The text of the chat template; empty, as here, where it is no text."""
        return ""

    @abstractmethod
    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        reply: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """A conversation as the chat template writes it; `reply` opens the assistant's turn. No template: UserError.

        A UserError with a cause is about this conversation alone. tools: JSON schemas; only given where a row has some.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of everything that `encode` and `render` depend on."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the files from which the tokenizer can be made again, its chat template included."""


class WeightSource(ABC):
    """Named tensors that can be read slice by slice, so that no rank ever holds more than its share and one tensor."""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names, as in the module's `state_dict`, and full shapes. Tied names may be absent."""

    @abstractmethod
    def read(self, name: str, where: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor, or the slice of it, on the CPU in the stored type. Raises KeyError for an unknown name."""

    def dtype(self, name: str) -> dtype:
        """The stored type of a tensor, of which nothing is read."""
        return self.read(name, tuple(slice(0, 0) for _ in self.shapes()[name])).dtype


class Exchange(ABC):
    """What the ranks of a group, each with a stretch of the same rows, pass to each other in attention. With gradients.

    Every rank calls every method equally often and in the same order, in the backward pass too.
    """

    rank: int
    size: int

    @abstractmethod
    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Each `(rows, heads, stretch, width)`, all heads of a stretch, as `(rows, heads / ranks, length, width)`, some
        heads of whole rows. Heads must be a multiple of the ranks.
        """

    @abstractmethod
    def to_stretch(self, tensor: Tensor) -> Tensor:
        """The way back, in the order in which attention gives it: `(rows, length, heads / ranks, width)` as
        `(rows, stretch, heads, width)`.
        """

    @abstractmethod
    def whole(self, stretch: Tensor) -> Tensor:
        """`(rows, length)` of every rank's `(rows, stretch)`; without gradient."""


class Model(ABC):
    """A causal language model. Methods that need heavy libraries import them inside."""

    family: ClassVar[str] = "causal_lm"

    draws: ClassVar[bool] = True
    """False where no weight hangs on the seed of the run."""

    def find(self) -> None:
        """Raises UserError where named files are missing, without a tokenizer and without asking a network."""
        return

    def at_hand(self) -> bool:
        """True where the config can be read here and now, without a network."""
        return False

    def stored(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the weights as their files say, without torch and without a network; empty where unknown.

        A file's names are mostly those of the skeleton, but need not be.
        """
        return {}

    @abstractmethod
    def check(self) -> None:
        """Raises UserError at once, without torch, where files are missing or settings make no sense."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the model; without torch."""

    @abstractmethod
    def vocabulary(self) -> int:
        """Rows of the embedding; without torch. Every token id must be smaller."""

    @abstractmethod
    def context(self) -> int:
        """The longest sequence, in tokens, that the model was made for; without torch."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of what the weights are: path and file digests or settings and seed; without torch."""

    def exact(self) -> Model:
        """The same model with attention that computes in fp32 on any device; as here: this one."""
        return self

    @property
    def origin(self) -> str:
        """Whole path or id by which others load it, as an adapter's files name its base; empty where there is none."""
        return ""

    def depth(self) -> tuple[int, int]:
        """(how many blocks, after how many of them they repeat); without torch. As here, (0, 0) where nobody knows."""
        return 0, 0

    def of_depth(self, blocks: int) -> Model:
        """The same model with so many of its first blocks, a multiple of those that repeat, to foretell by.

        Not asked where `depth` is not known.
        """
        return self

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The module without weights: called on torch's meta device.

        Its forward is not called by anyone but `hidden` and generation. It is in `train()` mode.
        """

    @abstractmethod
    def weights(self, seed: int) -> WeightSource:
        """The weights. seed: for those that are drawn; the same for every world size.

        A source may also know `heads.<name>.weight` `(1, width)`, a scalar head that was trained before.
        """

    @abstractmethod
    def restore_buffers(self, module: nn.Module) -> None:
        """Rebuilds, on their real device, buffers that are not in the state dict (rotary tables hold garbage after
        birth without storage)."""

    @abstractmethod
    def hidden(
        self, module: nn.Module, batch: Batch, attention: Mapping[str, Any], extras: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Last hidden states `(rows, length, width)`, before any head. attention: what the kernel made of the batch.

        extras: takes up what the model says besides, such as router logits.
        Where attention exchanges, the batch is this rank's stretch of each row, and `attention` was made of whole rows.
        """

    def check_sequence(self, ranks: int, tensor: int = 1) -> None:
        """Raises UserError, as here, where rows cannot be cut over so many ranks, each a stretch; without torch.

        tensor: ranks over which layers are cut besides, so that each has some of the heads already.
        """
        raise UserError.of(
            f"{type(self).__name__} does not say where its attention is, so its rows cannot be cut over ranks",
            "set sharding.sequence=1",
        )

    def exchange_attention(self, module: nn.Module, exchange: Exchange | None) -> None:
        """Makes every attention of the module work on whole rows of some heads, where `hidden` gets a stretch of each
        row; None undoes it. Raises UserError, as here, where that is not known."""
        if exchange is not None:
            self.check_sequence(exchange.size)

    def check_tensor(self, ranks: int) -> None:
        """Raises UserError, as here, where layers cannot be cut over so many tensor-parallel ranks; without torch."""
        raise UserError.of(f"{type(self).__name__} does not say how its layers are cut", "set sharding.tensor=1")

    def tensor_plan(self, module: nn.Module, ranks: int) -> Mapping[str, str]:
        """Names of modules to how each is cut over tensor-parallel ranks, in transformers' words: `colwise`, `rowwise`,
        `colwise_gather_output`, `rowwise_split_input`, `embedding_rowwise`, `replicated_with_grad_allreduce`; what is
        not named stays whole. Raises UserError, as here, where that is not known."""
        self.check_tensor(ranks)
        return {}

    @abstractmethod
    def head(self, module: nn.Module) -> nn.Module:
        """The `lm` head: a module from `(..., width)` to `(..., vocabulary)`, called as one, never by its weight."""

    @abstractmethod
    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """The repeated blocks, in order: units of sharding and of activation checkpointing."""

    @abstractmethod
    def save_config(self, folder: Path, dtype: str = "float32") -> None:
        """Writes what, beside safetensors weights, makes the folder loadable as a Hugging Face model.

        dtype: torch's name of the type that the weights are written in, in which others then load them.
        """
