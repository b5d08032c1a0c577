"""LoRA on a base of 4 bits a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loomtune.contracts import Adapter, Model, WeightSource
from loomtune.errors import Fault, UserError
from loomtune_plugins.adapters.lora.lora import Lora
from loomtune_plugins.adapters.lora.qlora_settings import QloraSettings
from loomtune_plugins.adapters.patterns import by_end, select
from loomtune_plugins.adapters.told import misset, say

if TYPE_CHECKING:
    from torch import nn

    from loomtune_plugins.adapters.lora.choice import Choice
    from loomtune_plugins.adapters.lora.quantised import Packing

KINDS = ("nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes takes."""


class Qlora(Lora):
    """Dettmers et al. 2023, "QLoRA": every linear layer but the output head is packed, whether LoRA adapts it or not.

    What is learned is LoRA's own, in peft's format, for the base as it is stored as for the packed one.
    """

    def __init__(self, settings: QloraSettings) -> None:
        super().__init__(settings)
        _check(settings, self._choice)
        self._quantised = settings

    def shown(self, model: Model) -> bool:
        """Never: names in files do not show what can be packed."""
        return False

    def weave(self, module: nn.Module, weights: WeightSource, seed: int) -> tuple[nn.Module, WeightSource]:
        from loomtune_plugins.adapters.lora.quantised_weights import QuantisedWeights

        packings = self._pack(module)
        if left := _left(module):
            say(f"adapter=qlora leaves what is no linear layer in its own type: {left}")
        return super().weave(module, QuantisedWeights(weights, packings), seed)

    def exact(self) -> Adapter:
        """LoRA: what was learned is merged into the weights as they are stored, not into their 4 bits."""
        return Lora(self._quantised)

    def _pack(self, module: nn.Module) -> Mapping[str, Packing]:
        """Puts packed layers in the places of linear ones, and says how each is packed."""
        from loomtune_plugins.adapters.lora.quantised import Packing, QuantisedLinear

        settings, packings = self._quantised, dict[str, Packing]()
        for name, layer in _packable(module, settings.keep, self._choice.modules).items():
            packings[name] = how = Packing(
                layer.out_features, layer.in_features, settings.quant, settings.block, settings.double_quant
            )
            packed = QuantisedLinear(how, layer.bias)
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, packed.train(layer.training))
        return packings


def _packable(module: nn.Module, keep: list[str], whole: list[str]) -> dict[str, nn.Linear]:
    """Linear layers with a matrix of their own, but for the output head and those that are kept or trained whole."""
    from torch import nn

    find_head = getattr(module, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    # A subclass may compute otherwise, and the other owner of a tied matrix would lose it.
    owners = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    linear = {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and layer is not head and owners[id(layer.weight)] == 1
    }
    kept = set(select("adapter.keep", keep, list(linear), by_end, "linear layer"))
    if found := {name: layer for name, layer in linear.items() if name not in kept and not _meant(name, whole)}:
        return found
    what = f"adapter.keep={keep} leaves no linear layer" if kept else f"{type(module).__name__} has no linear layer"
    cure = "name fewer layers in adapter.keep" if kept else "set adapter=lora, or adapter=full"
    raise UserError.of(f"{what} to quantise but the output head", cure)


def _meant(name: str, patterns: list[str]) -> bool:
    return any(by_end(name, pattern) for pattern in patterns)


def _left(module: nn.Module) -> str:
    """Matrices that are neither packed nor an embedding or a linear layer, by the type of their modules."""
    from torch import nn

    found: Counter[str] = Counter()
    for part in module.modules():
        if not isinstance(part, nn.Embedding | nn.Linear):
            sizes = [p.numel() for p in part.parameters(recurse=False) if p.ndim > 1 and p.is_floating_point()]
            found.update({type(part).__name__: sum(sizes)} if sizes else {})
    return ", ".join(f"{name} ({size:,} weights)" for name, size in found.most_common())


def _check(settings: QloraSettings, choice: Choice) -> None:
    unknown = "is none that bitsandbytes knows"
    faults = misset(
        settings,
        ("quant", settings.quant in KINDS, unknown, ", ".join(KINDS)),
        ("block", settings.block in BLOCKS, unknown, ", ".join(map(str, BLOCKS))),
    )
    if choice.residual:
        what = f"adapter.init={choice.init} takes first values out of the base, and in 4 bits there is no exact rest"
        faults.append(Fault(what, "set adapter.init to kaiming, gaussian or orthogonal, or adapter=lora"))
    if faults:
        raise UserError(*faults)
