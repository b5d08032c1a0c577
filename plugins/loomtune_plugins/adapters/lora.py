"""Low-rank adaptation by peft's layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Adapter, WeightSource
from loomtune.errors import Fault, UserError
from loomtune_plugins.adapters.lora_names import PREFIX, added, base_name, saved_name, shortest
from loomtune_plugins.adapters.patterns import by_end, select
from loomtune_plugins.adapters.settings import LoraSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

ALL_LINEAR = "all-linear"


class Lora(Adapter):
    """Adds `scale * B A` to linear layers and trains nothing else (Hu et al. 2021, "LoRA")."""

    saves_base = False

    def __init__(self, settings: LoraSettings) -> None:
        _check(settings)
        self._settings = settings
        self._short_targets: list[str] = []

    def weave(self, module: nn.Module, weights: WeightSource, seed: int) -> tuple[nn.Module, WeightSource]:
        """Wraps the target layers in peft's. First values come from the source, so peft draws none."""
        from peft import get_peft_model

        from loomtune_plugins.adapters.lora_weights import WovenWeights

        settings = self._settings
        layers = _layers(module, settings.targets)
        _check_rank(layers, settings.rank)
        self._short_targets = shortest(layers, (name for name, _ in module.named_modules()))
        # The whole names: what the user's patterns chose, and not what peft would make of them.
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5 for a property by its old name.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            woven = get_peft_model(module, self._peft_config(list(layers), init_lora_weights=False))
        return woven, WovenWeights(weights, layers, settings.rank, settings.dora, seed)

    def base(self, module: nn.Module) -> nn.Module:
        """The model inside peft's two wrappers; its linear layers stay wrapped."""
        return module.get_submodule(PREFIX.rstrip("."))

    @contextmanager
    def off(self, module: nn.Module) -> Iterator[None]:
        """Lets the wrapped layers compute as their base does.

        peft's own `disable_adapter` also clears `requires_grad` and sets it on leaving, behind the back of DDP and
        FSDP2, which read it once; so only the layers' switch is thrown here.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        before = [(layer, layer._disable_adapters) for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        try:
            for layer, _ in before:
                layer._disable_adapters = True
            yield
        finally:
            for layer, was in before:
                layer._disable_adapters = was

    def base_name(self, name: str) -> str | None:
        """Without peft's `base_model.model.` and `base_layer`; None for A, B and a magnitude."""
        return None if added(name) else base_name(name)

    def learning_rate_scale(self, name: str) -> float:
        """The ratio of LoRA+ (Hayou et al. 2024) for B."""
        part = added(name)
        return self._settings.plus_ratio if part is not None and part.part == "lora_B" else 1.0

    def merged(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The base with the additions in it, computed in fp32, a layer at a time."""
        from loomtune_plugins.adapters.lora_weights import merged

        return merged(tensors, self._settings)

    def save(self, folder: Path, tensors: Iterator[tuple[str, Tensor]], base: str) -> None:
        """Writes `adapter_model.safetensors` and `adapter_config.json`, which `PeftModel.from_pretrained` opens."""
        from safetensors.torch import save_file

        ours = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors if added(name)}
        layers = dict.fromkeys(part.layer for part in map(added, ours) if part is not None)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({saved_name(name): tensor for name, tensor in ours.items()}, folder / "adapter_model.safetensors")
        config = self._peft_config(self._short_targets or sorted(layers), task_type="CAUSAL_LM", inference_mode=True)
        config.base_model_name_or_path = base
        # peft keeps the targets as a set, whose order would change the file's bytes from run to run.
        config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(folder))

    def _peft_config(self, targets: list[str], **more: Any) -> Any:
        from peft import LoraConfig

        settings = self._settings
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
            use_rslora=settings.rslora,
            use_dora=settings.dora,
            **more,
        )


def _check(settings: LoraSettings) -> None:
    faults = [
        Fault(f"adapter.{key}={value} {wrong}", f"set adapter.{key} to {right}")
        for key, value, fits, wrong, right in (
            ("rank", settings.rank, settings.rank >= 1, "is no rank", "a whole number from 1 on"),
            ("alpha", settings.alpha, settings.alpha > 0, "would add nothing", "a number above 0"),
            ("dropout", settings.dropout, 0 <= settings.dropout < 1, "is no probability below 1", "0 or more, below 1"),
            ("plus_ratio", settings.plus_ratio, settings.plus_ratio > 0, "is no ratio", "a number above 0"),
            ("targets", settings.targets, bool(settings.targets), "adapts nothing", f"[{ALL_LINEAR}] or layers"),
        )
        if not fits
    ]
    if faults:
        raise UserError(*faults)


def _layers(module: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Name to (input width, output width) of the linear layers that are meant, in the order of the module."""
    from torch import nn

    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    find_head = getattr(module, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    inner = [name for name, layer in linear.items() if layer is not head]
    patterns = [target for target in targets if target != ALL_LINEAR]
    chosen = {*select("adapter.targets", patterns, list(linear), by_end, "linear layer")}
    if ALL_LINEAR in targets:
        chosen.update(inner)
    layers = {name: (layer.in_features, layer.out_features) for name, layer in linear.items() if name in chosen}
    if not layers:
        raise UserError.of(
            f"adapter.targets={list(targets)} finds no linear layer in the model",
            "use adapter=full: LoRA can adapt linear layers only",
        )
    _check_tied(module, chosen)
    return layers


def _check_tied(module: nn.Module, chosen: set[str]) -> None:
    """A shared weight cannot be adapted in one place: merging would change the other, or tear them apart."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        ours = [name for name in shared if name.rpartition(".")[0] in chosen]
        if ours and len(shared) > 1:
            others = ", ".join(name for name in shared if name != ours[0])
            raise UserError.of(
                f"adapter.targets names '{ours[0].rpartition('.')[0]}', whose weight is tied to {others}",
                "leave it out of adapter.targets",
            )


def _check_rank(layers: Mapping[str, tuple[int, int]], rank: int) -> None:
    name, widths = min(layers.items(), key=lambda layer: min(layer[1]))
    if rank > min(widths):
        raise UserError.of(
            f"adapter.rank={rank} is more than layer '{name}' ({widths[0]} to {widths[1]}) can have",
            f"set adapter.rank to at most {min(widths)}, or leave the layer out of adapter.targets",
        )
