"""Adapters that peft has saved: what their files say, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.contracts.saved import stored_shapes
from loomtune.errors import Fault, UserError, near

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
A, B, MAGNITUDE, ROWS = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".trainable_tokens_delta"

KNOWN = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "peft_type"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights"),
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    # These bear on first values alone, or say nothing by themselves.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "megatron_config"),
    *("qalora_group_size", "runtime_config"),
}
"""Keys of a config whose meaning is known here. Any other that is set makes an adapter of another kind."""
MERGE = "merge it into its base (`loomtune export`, or peft's merge_and_unload) and set model.path to that"
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""First values that are taken out of the base: such an adapter belongs to a base that is changed."""


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """A LoRA adapter in a folder. key: the setting that names it. shapes: of its tensors, by name."""

    key: str
    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, key: str, folder: str) -> PeftFolder:
        """Raises UserError where the folder holds no LoRA adapter that can be read whole and without a pickle."""
        path = Path(folder).expanduser()
        found = cls(key, path, _config(key, path), _shapes(key, path))
        found._check()
        return found

    @property
    def layers(self) -> dict[str, tuple[int, int, int]]:
        """Name to (input width, output width, rank) of the layers that are adapted."""
        firsts = {name: shape for name, shape in self.shapes.items() if name.endswith(A)}
        seconds = {name: self.shapes[name.removesuffix(A) + B] for name in firsts}
        return {
            name.removeprefix(PREFIX).removesuffix(A): (shape[1], seconds[name][0], shape[0])
            for name, shape in firsts.items()
        }

    @property
    def modules(self) -> list[str]:
        """Names of the modules that were trained whole."""
        others = (name for name in self.shapes if not name.endswith((A, B, MAGNITUDE, ROWS)))
        return sorted({name.removeprefix(PREFIX).rpartition(".")[0] for name in others})

    @property
    def tokens(self) -> list[int]:
        """Ids of the tokens whose rows were trained."""
        found = self.config.get("trainable_token_indices") or []
        return list(next(iter(found.values()))) if isinstance(found, dict) else list(found)

    def plain(self) -> PeftFolder:
        """Itself. Raises UserError where it is more than a sum beside its layers."""
        more = [key for key in ("use_dora", "modules_to_save", "trainable_token_indices") if self.config.get(key)]
        if more:
            raise self.refuse(f"has {more[0]}, and only plain additions can stay beneath another", MERGE)
        return self

    def frozen(self) -> LoraConfig:
        """peft's config for exactly the layers that are adapted; what is frozen has no dropout."""
        from peft import LoraConfig

        said = self.config
        return LoraConfig(
            r=said.get("r", 8),
            lora_alpha=said.get("lora_alpha", 8),
            use_rslora=bool(said.get("use_rslora")),
            rank_pattern=dict(said.get("rank_pattern") or {}),
            alpha_pattern=dict(said.get("alpha_pattern") or {}),
            target_modules=list(self.layers),
        )

    def refuse(self, what: str, cure: str | None = None) -> UserError:
        """The error that names this folder."""
        base = self.config.get("base_model_name_or_path")
        usual = f"set {self.key} to an adapter of this model" + (
            f", or model.path to its base '{base}'" if base else ""
        )
        return UserError.of(f"{self.key}: the adapter in '{self.folder}' {what}", cure or usual)

    def check_layers(self, known: Mapping[str, tuple[int, int]]) -> None:
        """Raises UserError for a layer that the model has not. known: name to (input width, output width)."""
        for name, (inputs, outputs, _) in self.layers.items():
            if name not in known:
                raise self.refuse(f"adapts '{name}', which is no linear layer of the model.{near(name, known)}")
            if known[name] != (inputs, outputs):
                there = "{} to {}".format(*known[name])
                raise self.refuse(f"adapts '{name}' as a layer of {inputs} to {outputs}, and the model's is {there}")

    def check_names(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError where the file's tensors are not those wanted. wanted: shapes by names in the file."""
        if missing := sorted(wanted.keys() - self.shapes.keys()):
            raise self.refuse(f"lacks {missing[0]}", "save it again with peft, or name another folder")
        if idle := sorted(self.shapes.keys() - wanted.keys()):
            raise self.refuse(f"holds {idle[0]}, which belongs to nothing in the model")
        for name, shape in wanted.items():
            if self.shapes[name] != shape:
                raise self.refuse(f"holds {name} of shape {self.shapes[name]}, where the model needs {shape}")

    def _check(self) -> None:
        config = self.config
        kind, start = config.get("peft_type"), str(config.get("init_lora_weights")).lower()
        if kind != "LORA":
            raise self.refuse(f"is of peft's type {kind}, not LORA", f"merge it into its base, or leave {self.key} out")
        if start.startswith(RESIDUAL):
            cure = "save it with peft's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            raise self.refuse(f"began with init_lora_weights={start}, so it belongs to a base that was changed", cure)
        odd = [key for key in config.keys() - KNOWN if config[key] and (key, config[key]) != ("bias", "none")]
        if odd:
            said = ", ".join(f"{key}={config[key]}" for key in sorted(odd))
            raise self.refuse(f"is made with {said}, which adapter=lora has not", "merge it into its base with peft")
        for name in self.shapes:
            if "lora_embedding_" in name or not name.startswith(PREFIX):
                raise self.refuse(f"holds {name}, which is no part of a linear layer", "merge it into its base")
            if name.endswith((A, B)) and {name.replace(A, B), name.replace(B, A)} - self.shapes.keys():
                raise self.refuse(f"holds {name} without its other half", "save it again with peft")
            if name.endswith((A, B)) and len(self.shapes[name]) != 2:
                raise self.refuse(f"holds {name} of shape {self.shapes[name]}", "merge it into its base")
        if not self.layers:
            raise self.refuse("adapts no linear layer", "name another folder")


def _config(key: str, folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        cure = f"set {key} to a folder that PeftModel.save_pretrained wrote, or RUN/checkpoints/step-N/adapter"
        raise UserError.of(f"{key}: '{folder}' holds no {CONFIG}", cure)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError.of(f"{key}: '{file}' is no JSON: {error}", "save the adapter again with peft") from error
    if not isinstance(found, dict):
        raise UserError.of(f"{key}: '{file}' holds no settings", "save the adapter again with peft")
    return found


def _shapes(key: str, folder: Path) -> dict[str, tuple[int, ...]]:
    file = folder / WEIGHTS
    if not file.is_file():
        pickle = (folder / PICKLE).is_file()
        what = f"holds its weights as a pickle ({PICKLE}), which could run code" if pickle else f"holds no {WEIGHTS}"
        cure = "open it where you trust it and save it with save_pretrained(FOLDER, safe_serialization=True)"
        raise UserError(Fault(f"{key}: '{folder}' {what}", cure))
    try:
        return stored_shapes(file)
    except ValueError as error:
        raise UserError.of(f"{key}: '{file}' is no safetensors file", "save the adapter again with peft") from error
