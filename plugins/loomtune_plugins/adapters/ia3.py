"""IA3 by peft's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loomtune.contracts import WeightSource
from loomtune.errors import UserError
from loomtune_plugins.adapters.ia3_settings import IA3Settings
from loomtune_plugins.adapters.patterns import by_end, select
from loomtune_plugins.adapters.wrapped.targets import ALL_LINEAR, linear_layers
from loomtune_plugins.adapters.wrapped.wrapping import Wrapping

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune_plugins.adapters.wrapped.woven import Added

USUAL = (
    ("k_proj", "v_proj", "down_proj"),  # Llama, Qwen, Mistral, Gemma
    ("k_proj", "v_proj", "fc2"),  # OPT, Phi
    ("k_proj", "v_proj", "fc_out"),  # GPT-J
    ("qkv_proj", "down_proj"),  # Phi-3
    ("query_key_value", "dense_4h_to_h"),  # GPT-NeoX, Falcon, Bloom
)
"""What is adapted by default: the first names that a model has all of. As in the paper, or the nearest to it where
queries, keys and values are one layer."""

FEEDFORWARD = ("down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2")
"""Last layers of feed-forwards, whose input is the inner activation."""


class IA3(Wrapping):
    """Multiplies activations by learned factors (Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning")."""

    def __init__(self, settings: IA3Settings) -> None:
        super().__init__()
        if settings.targets == []:
            raise UserError.of("adapter.targets=[] adapts nothing", "set adapter.targets to layers, or to null")
        self._settings = settings
        self._feedforward: set[str] = set()

    def layers(self, module: nn.Module) -> list[str]:
        """The linear layers that are meant. Raises UserError where the model has none of the usual names."""
        targets = self._settings.targets
        layers = list(linear_layers(module, _usual(module) if targets is None else targets, "IA3"))
        self._feedforward = set(self._feedforwards(layers))
        return layers

    def _feedforwards(self, layers: list[str]) -> list[str]:
        """Those whose inputs are scaled. Raises UserError for a name among them that is no target."""
        if (named := self._settings.feedforward) is not None:
            return select("adapter.feedforward", named, layers, by_end, "layer among the targets")
        return [layer for layer in layers if layer.rpartition(".")[2] in FEEDFORWARD]

    def config(self, targets: list[str], **more: Any) -> Any:
        from peft import IA3Config

        inner = [target for target in targets if target in self._feedforward | self._short]
        return IA3Config(target_modules=targets, feedforward_modules=inner, **more)

    @property
    def _short(self) -> set[str]:
        return {layer.rpartition(".")[2] for layer in self._feedforward}

    def config_of(self, layer: str) -> Any:
        from peft import IA3Config

        inner = ["layer"] if layer in self._feedforward else []
        return IA3Config(target_modules=["layer"], feedforward_modules=inner)

    def weave(self, module: nn.Module, weights: WeightSource, seed: int) -> tuple[nn.Module, WeightSource]:
        """Wraps the layers; in files they have short names only where these tell the two kinds apart."""
        woven = super().weave(module, weights, seed)
        layers = {added.layer for added in self.names.added.values()}
        # peft takes whatever ends with a feed-forward's name, also in the middle of a word, to be one.
        if any(layer.endswith(tuple(self._short)) for layer in layers - self._feedforward):
            self._targets = sorted(layers)
        return woven

    def first(self, added: Added, shape: tuple[int, ...], base: WeightSource, seed: int) -> Tensor:
        """Ones, which change nothing."""
        import torch

        return torch.ones(shape)


def _usual(module: nn.Module) -> list[str]:
    from torch import nn

    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    there = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    for names in USUAL:
        if set(names) <= there.keys():
            return list(names)
    raise UserError.of(
        "adapter=ia3 knows no names for the keys, values and feed-forwards of this model",
        f"set adapter.targets, and adapter.feedforward to those of them whose inputs are to be scaled: names or "
        f"patterns of what there is, such as {', '.join([*there][:8]) or ALL_LINEAR}",
    )
