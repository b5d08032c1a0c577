"""Low-rank adaptation by peft's layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Model, WeightSource
from loomtune.errors import UserError
from loomtune_plugins.adapters.lora.choice import choose
from loomtune_plugins.adapters.settings import LoraSettings
from loomtune_plugins.adapters.wrapped.files import WEIGHTS, PeftFolder
from loomtune_plugins.adapters.wrapped.targets import (
    briefest,
    enough,
    every_linear,
    linear_layers,
    turned_layers,
    whole_modules,
)
from loomtune_plugins.adapters.wrapped.wrapping import NAME, Wrapping

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune_plugins.adapters.lora.weights import Pair
    from loomtune_plugins.adapters.wrapped.woven import Added

START = "start"
"""The first A and B once more, frozen, where they were taken out of the base: with them alone it is the base again."""
ROWS = "trainable_tokens_delta"


class Lora(Wrapping):
    """Adds `scale * B A` to linear layers and trains nothing else (Hu et al. 2021, "LoRA")."""

    def __init__(self, settings: LoraSettings) -> None:
        super().__init__()
        self._file = PeftFolder.open("adapter.path", settings.path) if settings.path else None
        self._choice, self._ratio = choose(settings, self._file), settings.plus_ratio
        self._beneath = {f"under_{i}": beneath(folder) for i, folder in enumerate(settings.under)}
        self.stays = (*self._beneath, *([START] if self._choice.residual else []))
        self._layers: list[str] = []
        self._turned: set[str] = set()
        self._modules: list[str] = []
        self._brief: list[str] = []
        self._tokens = sorted({token for token in self._choice.tokens if isinstance(token, int)})
        self._files: dict[str, tuple[PeftFolder, str]] = {}
        self._factors: dict[str, Pair] = {}
        self._source: WeightSource | None = None

    def meet(self, model: Model) -> None:
        from loomtune_plugins.adapters.lora.tokens import ids

        self._tokens = ids(self._choice.tokens, model)

    def suits(self, model: Model) -> None:
        """Builds no skeleton where the files of the model say enough."""
        choice = self._choice
        more = choice.tokens or choice.modules or self._file or self._beneath
        if more or not enough(model.stored(), choice.targets, choice.rank):
            super().suits(model)

    def layers(self, module: nn.Module) -> list[str]:
        """The linear layers that are meant. Raises UserError where a rank is more than one of them can have."""
        from loomtune_plugins.adapters.lora.tokens import check_rows

        known = every_linear(module, turned=True)
        for folder in [self._file, *self._beneath.values()]:
            if folder:
                folder.check_layers(known)
        found = linear_layers(module, self._choice.targets, "LoRA", turned=True)
        name, widths = min(found.items(), key=lambda layer: min(layer[1]))
        if (rank := self._choice.rank) > min(widths) and not self._file:
            raise UserError.of(
                f"adapter.rank={rank} is more than layer '{name}' ({widths[0]} to {widths[1]}) can have",
                f"set adapter.rank to at most {min(widths)}, or leave the layer out of adapter.targets",
            )
        self._turned = set(turned_layers(module))
        self._modules = whole_modules(module, self._choice.modules, found)
        self._brief = briefest(self._modules, [name for name, _ in module.named_modules()])
        assert bool(self._tokens) == bool(self._choice.tokens), "tokens are looked up in the model that the adapter met"
        if self._tokens:
            check_rows(module, self._tokens, [*found, *self._modules])
        self._layers = list(found)
        return self._layers

    def config(self, targets: list[str], **more: Any) -> Any:
        from peft import LoraConfig

        choice, rows = self._choice, self._tokens or None
        return LoraConfig(
            r=choice.rank,
            lora_alpha=choice.alpha,
            lora_dropout=choice.dropout,
            target_modules=targets,
            use_rslora=choice.rslora,
            use_dora=choice.dora,
            rank_pattern=dict(choice.ranks),
            alpha_pattern=dict(choice.alphas),
            modules_to_save=self._modules or None,
            trainable_token_indices=rows,
            fan_in_fan_out=bool(self._layers) and self._turned.issuperset(self._layers),
            **more,
        )

    def config_of(self, layer: str) -> Any:
        choice = self._choice
        rank, alpha = pattern(choice.ranks, layer, choice.rank), pattern(choice.alphas, layer, choice.alpha)
        return self._plain(layer, rank, alpha, choice.rslora, use_dora=choice.dora)

    def _plain(self, layer: str, rank: int, alpha: float, rslora: bool, **more: Any) -> Any:
        from peft import LoraConfig

        turned, scale = layer in self._turned, {"lora_alpha": alpha, "use_rslora": rslora}
        return LoraConfig(r=rank, target_modules=["layer"], fan_in_fan_out=turned, **scale, **more)

    def configs_of(self, layer: str) -> Mapping[str, Any]:
        configs = {NAME: self.config_of(layer)} if layer in self._layers else {}
        for name, folder in self._beneath.items():
            if layer in folder.layers:
                said = folder.config
                alpha = pattern(said.get("alpha_pattern") or {}, layer, said.get("lora_alpha", 8))
                configs[name] = self._plain(layer, folder.layers[layer][2], alpha, bool(said.get("use_rslora")))
        return configs

    def dress(self, woven: Any) -> None:
        """Adds the adapters beneath, and the first values where they were taken out of the base."""
        import torch
        from peft.tuners.lora import LoraLayer

        from loomtune_plugins.adapters.lora.beneath import config_of

        more = {name: config_of(folder) for name, folder in self._beneath.items()}
        if self._choice.residual:
            more[START] = config = self.config(self._layers)
            config.modules_to_save = config.trainable_token_indices = None
            config.use_dora, config.lora_dropout = False, 0.0
        with torch.device("meta"):
            for name, config in more.items():
                woven.add_adapter(name, config)
        for layer in woven.modules():
            if isinstance(layer, LoraLayer) and self.stays:
                layer._active_adapter = [name for name in (*self._beneath, NAME) if name in layer.lora_A]

    def settle(self, module: nn.Module) -> None:
        """Drops peft's copy of the rows that tokens had: it would be garbage, and only un-merging needs it."""
        from peft.tuners.trainable_tokens import TrainableTokensLayer

        for layer in module.modules():
            if isinstance(layer, TrainableTokensLayer) and NAME in layer.trainable_tokens_original:
                layer.trainable_tokens_original.pop(NAME)

    def weave(self, module: nn.Module, weights: WeightSource, seed: int) -> tuple[nn.Module, WeightSource]:
        """As every wrapping method does, and sees that files hold what the module wants of them."""
        from loomtune_plugins.adapters.wrapped.woven import files

        self._factors = {}
        woven, source = super().weave(module, weights, seed)
        self._source, shapes = source, source.shapes()
        of = {NAME: self._file, **self._beneath}
        self._files = {}
        for adapter, folder in of.items():
            if folder:
                names = files(woven, self.names, adapter)
                folder.check_names({names[name]: shapes[name] for name in names})
                self._files |= {name: (folder, file) for name, file in names.items()}
        return woven, source

    def changed(self, weights: WeightSource, seed: int) -> WeightSource:
        from loomtune_plugins.adapters.lora.residual import Residual

        if not self._choice.residual:
            return weights
        return Residual(weights, self._layers, lambda layer: self._taken(layer, weights, seed))

    def first_of(self, name: str, added: Added, shape: tuple[int, ...], base: WeightSource, seed: int) -> Tensor:
        if (stored := self._files.get(name)) is not None:
            from safetensors import safe_open

            folder, key = stored
            with safe_open(folder.folder / WEIGHTS, "pt") as file:
                found: Tensor = file.get_tensor(key).float()
            return found
        if added.part == ROWS:
            from loomtune_plugins.adapters.lora.tokens import rows

            return rows(base, f"{added.layer}.weight", self._tokens)
        return super().first_of(name, added, shape, base, seed)

    def first(self, added: Added, shape: tuple[int, ...], base: WeightSource, seed: int) -> Tensor:
        """A magnitude of DoRA is the length of each row of the base: `s B A` is zero at first, or taken out of it."""
        import torch

        if added.part == "lora_magnitude_vector":
            # Liu et al. 2024, equation 5.
            lengths: Tensor = torch.linalg.vector_norm(self._matrix(added.layer, base), dim=1)
            return lengths
        a, b = self._pair(added.layer, base, seed)
        return a if added.part == "lora_A" else b

    def _pair(self, layer: str, base: WeightSource, seed: int) -> Pair:
        """First A and B of a layer; those that are factors of its matrix are made once and kept, the matrix is not."""
        from loomtune.world import derive
        from loomtune_plugins.adapters.lora import weights as lora_weights

        choice = self._choice
        if not choice.residual:
            outputs, inputs = self._shape(layer, base)
            return lora_weights.drawn(layer, choice.init, (inputs, outputs, choice.rank), seed)
        if layer not in self._factors:
            matrix, seed = self._matrix(layer, base), derive(seed, layer, choice.init)
            self._factors[layer] = lora_weights.factors(matrix, choice.init, choice.rank, self._scale, seed)
        return self._factors[layer]

    def _shape(self, layer: str, base: WeightSource) -> tuple[int, int]:
        first, second = base.shapes()[f"{layer}.weight"]
        return (second, first) if layer in self._turned else (first, second)

    def _matrix(self, layer: str, base: WeightSource) -> Tensor:
        """`(outputs, inputs)` in fp32."""
        weight = base.read(f"{layer}.weight").float()
        return weight.t() if layer in self._turned else weight

    def _taken(self, layer: str, base: WeightSource, seed: int) -> Tensor:
        a, b = self._pair(layer, base, seed)
        taken = self._scale * (b @ a)
        return taken.t() if layer in self._turned else taken

    @property
    def _scale(self) -> float:
        rank = self._choice.rank
        return self._choice.alpha / (math.sqrt(rank) if self._choice.rslora else rank)

    def _merged(
        self, layer: str, base: Mapping[str, Tensor], parts: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Rows of tokens take the places of the embedding's own."""
        if {self.names.added[name].part for name in parts} != {ROWS}:
            yield from super()._merged(layer, base, parts)
            return
        from loomtune_plugins.adapters.wrapped.merging import with_rows

        (rows,) = parts.values()
        yield f"{layer}.weight", with_rows(base["weight"], rows, self._tokens)

    def leaves(self, tensors: dict[str, Tensor], config: Any) -> None:
        """What belongs to a changed base leaves as a LoRA of twice the rank for the true base: `s (B A - B0 A0)`."""
        import torch

        config.modules_to_save = self._brief or None
        if not self._choice.residual:
            return
        for name, added in self.names.added.items():
            if (
                added.adapter == START
                and (file := self.names.files[name.replace(f".{START}.", f".{NAME}.")]) in tensors
            ):
                assert self._source is not None
                start, axis = self._source.read(name), 0 if added.part == "lora_A" else 1
                tensors[file] = torch.cat([tensors[file], start if axis == 0 else -start], dim=axis).contiguous()
        config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)

    def learning_rate_scale(self, name: str) -> float:
        """The ratio of LoRA+ (Hayou et al. 2024) for B."""
        added = self.names.added.get(name)
        return self._ratio if added is not None and added.part == "lora_B" else 1.0


def beneath(folder: str) -> PeftFolder:
    """An adapter that stays. Raises UserError where it is more than a sum beside its layers."""
    found = PeftFolder.open("adapter.under", folder)
    more = [key for key in ("use_dora", "modules_to_save", "trainable_token_indices") if found.config.get(key)]
    if more:
        cure = "merge it into its base (`loomtune export`, or peft's merge_and_unload) and set model.path to that"
        raise found.refuse(f"has {more[0]}, and only plain additions can stay beneath another", cure)
    return found


def pattern(patterns: Mapping[str, Any], layer: str, usual: Any) -> Any:
    """What peft's patterns say of a layer."""
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), layer), usual)
