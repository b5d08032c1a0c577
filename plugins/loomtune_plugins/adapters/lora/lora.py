"""Low-rank adaptation by peft's layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Model, WeightSource
from loomtune.errors import UserError
from loomtune_plugins.adapters.digests import digest
from loomtune_plugins.adapters.lora.choice import check_said, choose
from loomtune_plugins.adapters.settings import LoraSettings
from loomtune_plugins.adapters.told import say
from loomtune_plugins.adapters.wrapped.files import CONFIG, MERGE, WEIGHTS, PeftFolder
from loomtune_plugins.adapters.wrapped.targets import (
    briefest,
    check_rank,
    check_tied,
    enough,
    every_linear,
    linear_layers,
    shortest,
    turned_layers,
    whole_modules,
)
from loomtune_plugins.adapters.wrapped.wrapping import NAME, Wrapping

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune_plugins.adapters.lora.summed import Term
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
        self._beneath = {
            f"under_{i}": PeftFolder.open("adapter.under", folder).plain() for i, folder in enumerate(settings.under)
        }
        self.stays = (*self._beneath, *([START] if self._choice.residual else []))
        self._layers: list[str] = []
        self._turned: set[str] = set()
        self._modules: list[str] = []
        self._brief: list[str] = []
        self._saved: list[str] = []
        self._tokens = sorted({token for token in self._choice.tokens if isinstance(token, int)})
        self._files: dict[str, tuple[PeftFolder, str]] = {}
        self._factors: dict[str, Pair] = {}
        self._source: WeightSource | None = None

    def fingerprint(self) -> str:
        """Of `path`, whose ranks and patterns are read at every weaving, and of what stays beneath."""
        files = [folder for folder in (self._file, *self._beneath.values()) if folder]
        return digest(*(folder.folder / name for folder in files for name in (CONFIG, WEIGHTS)))

    def meet(self, model: Model) -> None:
        from loomtune_plugins.adapters.lora.tokens import ids

        self._tokens = ids(self._choice.tokens, model)
        if self._file:
            check_said("tokens", self._choice.tokens, self._tokens, self._file.tokens)

    def suits(self, model: Model) -> None:
        """Builds no skeleton where the files of the model say enough."""
        if self._file:
            why = "twice that of its training where that was with pissa or olora, more where with adapter.under"
            say(f"adapter.path goes on at the rank of its file, {self._choice.rank}: {why}")
        if not self.shown(model):
            super().suits(model)

    def shown(self, model: Model) -> bool:
        """True where files say that the model can be adapted so."""
        choice = self._choice
        more = choice.tokens or choice.modules or self._file or self._beneath
        return not more and enough(model.stored(), choice.targets, choice.rank)

    def layers(self, module: nn.Module) -> list[str]:
        """The linear layers that are meant. Raises UserError where a rank is more than one of them can have."""
        from loomtune_plugins.adapters.lora.tokens import check_rows

        known, names = every_linear(module, turned=True), [name for name, _ in module.named_modules()]
        for folder in [self._file, *self._beneath.values()]:
            if folder:
                folder.check_layers(known)
        found = linear_layers(module, self._choice.targets, "LoRA", turned=True)
        if not self._file:
            check_rank("rank", self._choice.rank, found)
        self._turned = set(turned_layers(module))
        self._modules = self._whole(module, found)
        self._brief = briefest(self._modules, names)
        self._saved = shortest({*found, *self._under}, names)
        assert bool(self._tokens) == bool(self._choice.tokens), "tokens are looked up in the model that the adapter met"
        if self._tokens:
            check_rows(module, self._tokens, [*found, *self._modules])
        self._layers = list(found)
        return self._layers

    @property
    def _under(self) -> set[str]:
        """Layers that are adapted beneath."""
        return {layer for folder in self._beneath.values() for layer in folder.layers}

    def _whole(self, module: nn.Module, adapted: Iterable[str]) -> list[str]:
        """What is trained whole. Raises UserError where one file could not say it and all that is adapted."""
        check_tied(module, self._under, "adapter.under adapts", f"leave that adapter out, or {MERGE}")
        found = whole_modules(module, self._choice.modules, adapted)
        if self._file and self._choice.modules:
            check_said("modules", self._choice.modules, found, self._file.modules)
        if both := sorted(self._under.intersection(found)):
            what = f"adapter.modules trains '{both[0]}' whole, and an adapter in adapter.under adapts it"
            raise UserError.of(what, f"leave it out of adapter.modules, or {MERGE}")
        return found

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

        more: dict[str, Any] = {name: folder.frozen() for name, folder in self._beneath.items()}
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
        self._targets = self._saved
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
        """What the true base lacks leaves too: the adapters beneath, and `- s B0 A0`, which was taken out of it."""
        config.modules_to_save = self._brief or None
        if not self.stays:
            return
        from loomtune_plugins.adapters.lora.summed import summed

        rank, found = summed(self._terms(tensors), self._scale)
        tensors |= found
        config.lora_alpha = self._scale * (math.sqrt(rank) if config.use_rslora else rank)
        config.r, config.rank_pattern, config.alpha_pattern = rank, {}, {}

    def _terms(self, tensors: Mapping[str, Tensor]) -> dict[str, list[Term]]:
        """What adds to each layer of the true base. tensors: those that were trained, by their names in the file."""
        from loomtune_plugins.adapters.lora.summed import scale_of

        source = self._source
        terms: dict[str, list[Term]] = {}
        assert source is not None, "what is saved was woven"
        for name, added in self.names.added.items():
            if added.part == "lora_A":
                pair = name, name.replace(".lora_A.", ".lora_B.")
                a, b = (tensors[self.names.files[n]] if added.adapter == NAME else source.read(n) for n in pair)
                of = self.configs_of(added.layer)
                scale = -scale_of(of[NAME]) if added.adapter == START else scale_of(of[added.adapter])
                terms.setdefault(added.layer, []).append((a, b, scale))
        return terms

    def learning_rate_scale(self, name: str) -> float:
        """The ratio of LoRA+ (Hayou et al. 2024) for B."""
        added = self.names.added.get(name)
        return self._ratio if added is not None and added.part == "lora_B" else 1.0


def pattern(patterns: Mapping[str, Any], layer: str, usual: Any) -> Any:
    """What peft's patterns say of a layer."""
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), layer), usual)
