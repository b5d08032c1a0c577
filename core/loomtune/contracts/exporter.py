"""Forms in which a trained model leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, dtype, nn

    from loomtune.contracts.adapter import Adapter
    from loomtune.contracts.model import Model, WeightSource

    Opener = Callable[[nn.Module], Callable[[Tensor], Tensor] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A trained model on its way out, of which tensors are read when they are asked for.

    chosen: settings of the model that the run began with, its offer's `name` among them. adapter: woven already.
    weights: the base's. source: all tensors that the run began with, by their names in the woven module. learned: names
    of those that were trained. kept: names of those that the checkpoint holds, and `fetch` reads, whole and on the CPU.
    """

    model: Model
    adapter: Adapter
    chosen: Mapping[str, Any]
    weights: WeightSource
    source: WeightSource
    learned: frozenset[str]
    kept: frozenset[str]
    fetch: Callable[[str], Tensor]

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The base's tensors with the adapter merged in: fp32, whole, under the names that the skeleton has for them.

        Tied ones come once, scalar heads as `heads.<name>.weight` `(1, width)`. What is let go of costs no memory.
        """
        return self.adapter.merged(self._all())

    def added(self) -> Iterator[tuple[str, Tensor]]:
        """What `Adapter.save` takes, in fp32: all that the base has not or that was trained, and scalar heads."""
        return self._all(lambda name: name in self.learned or self.adapter.base_name(name) is None)

    def _all(self, wanted: Callable[[str], bool] = bool) -> Iterator[tuple[str, Tensor]]:
        shapes = self.source.shapes()
        for name in filter(wanted, [*shapes, *sorted(self.kept - shapes.keys())]):  # heads that the base has not
            value = self.fetch(name) if name in self.kept else self.source.read(name)
            yield name, value.float() if value.is_floating_point() else value

    def stored(self, name: str) -> dtype | None:
        """The type in which the base's files hold a tensor, by the base's name; None where they have none such."""
        return self.weights.dtype(name) if name in self.weights.shapes() else None


class Exporter(ABC):
    """Writes a model in a form that other programs serve.

    What its offer excludes is refused of an adapter too: `Trait.UNMERGEABLE` by who asks for merged tensors.
    check: whether what left is compared with what was trained before it gets its name.
    """

    check: bool = True

    @abstractmethod
    def export(self, trained: Trained, folder: Path) -> None:
        """Writes everything that a server needs into an empty folder, which gets its name once this returns."""

    def reopened(self, trained: Trained, folder: Path) -> Mapping[str, Any] | Opener | None:
        """Settings, `name` among them, of the model by which a run would begin from what was exported there.

        Or, for what needs its base, what puts it on that: see `Adapter.reopen`. What it says is compared with what was
        trained. None, as here: nothing can open it, nothing is compared.
        """
        return None
