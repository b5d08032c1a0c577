"""Which parameters are trained, and what is added to the model for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from loomtune.contracts.batch import Batch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from loomtune.contracts.model import Model, WeightSource
    from loomtune.contracts.optimizer import Optimizer


class Adapter(ABC):
    """Changes a skeleton before it has weights, and knows how what it added is saved, switched off and merged.

    virtual_tokens: how many positions of the model's context what `inputs` adds takes from each sample.
    """

    virtual_tokens: int = 0

    def suits(self, model: Model) -> None:
        """Raises UserError where the model cannot be adapted so, before any process exists.

        It may weave a skeleton, which imports torch; a quick look at `Model.stored()` should come first.
        """
        return

    def meet(self, model: Model) -> None:
        """Told of the model before each weaving for training; the place to ask its tokenizer."""
        return

    def fingerprint(self) -> str:
        """Digest of the files from which it is woven, which no checkpoint holds; without torch.

        Empty, as here: nothing outside the settings. Raises UserError where files are missing.
        """
        return ""

    @abstractmethod
    def weave(self, module: nn.Module, weights: WeightSource, seed: int) -> tuple[nn.Module, WeightSource]:
        """Adds to a module, which may be on the meta device, and marks by `requires_grad` what is trained.

        Returns the module to use and a source that knows every name of it: the base's tensors under the names that they
        have now, and initial values of what was added, drawn from (seed, name) and so equal on every world size.
        Raises UserError where a target matches nothing.
        """

    @abstractmethod
    def base(self, module: nn.Module) -> nn.Module:
        """The module as the model's plugin made it, whatever it is wrapped in now."""

    @abstractmethod
    def off(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within it the module computes as the base does."""

    def inputs(
        self, module: nn.Module, batch: Batch, attention: Callable[[Batch], Mapping[str, Any]]
    ) -> tuple[Batch, Mapping[str, Any]]:
        """What the model is given for a batch: the batch with virtual tokens in it, or attention to more than its rows.

        Called inside the network's forward while the adapter is on, where the adapter's own modules may be called.
        attention: makes of a batch what its attention is given. `predict_from` and `row` must mean the same targets.
        """
        return batch, attention(batch)

    def optimizer(self, optimizer: Optimizer, steps: int) -> Optimizer:
        """The run's optimizer, or one around it that does more in each step. steps: of the whole run."""
        return optimizer

    @abstractmethod
    def base_name(self, name: str) -> str | None:
        """The base's name of a parameter, or None for what the adapter added."""

    def exact(self) -> Adapter:
        """The same method, with the same names for what it adds, on the base as its files store it; as here: this one.

        Another where the training computes with an approximation of the base (in 4 bits): by it the model leaves.
        """
        return self

    @abstractmethod
    def learning_rate_scale(self, name: str) -> float:
        """Factor of the learning rate for a trained parameter (LoRA+); 1 for most."""

    @abstractmethod
    def merged(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """From all tensors of the woven module, in any order, the base's tensors with the adapter merged in.

        Raises UserError, whose cure names the exporter `adapter`, where the method cannot be merged.
        """

    @abstractmethod
    def save(self, folder: Path, tensors: Iterator[tuple[str, Tensor]], base: str) -> None:
        """Writes what was added, as others read it (peft's format). base: path or id of the base. `full`: nothing."""

    def reopen(self, module: nn.Module, folder: Path) -> Callable[[Tensor], Tensor] | None:
        """Puts what `save` wrote on its base as other programs do: token ids `(1, length)` to logits of each token.

        module: a skeleton with the base's weights, which is used for nothing else afterwards. None, as here, where no
        other program opens it.
        """
        return None

    @property
    @abstractmethod
    def saves_base(self) -> bool:
        """True where training changes the base itself, so that a checkpoint must hold all of it (`full`)."""
