"""The format of saved bottleneck adapters, which is loomtune's own: peft has no such method.

`adapter_model.safetensors` holds `<block>.<place>.{down,up}.{weight,bias}` in fp32, where `<block>` is the block's name
in the base, such as `model.layers.3`, and `<place>` is `bottleneck_attention` or `bottleneck_mlp` (Houlsby), or
`bottleneck_block` (Pfeiffer). `adapter_config.json` says which function they are the weights of:

    format                    "loomtune-bottleneck"
    version                   1
    variant, activation, scaling, dropout
    width, size               of the model's stream and of the bottleneck
    layers                    numbers of the adapted blocks
    base_model_name_or_path   the base: path or id
    shapes                    of each tensor, by its name
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.contracts.saved import stored_shapes
from loomtune.errors import UserError
from loomtune_plugins.adapters.bottleneck.settings import ACTIVATIONS, VARIANTS

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune_plugins.adapters.bottleneck.layers import Form

FORMAT, VERSION = "loomtune-bottleneck", 1
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CURE = "set adapter.path to a folder that loomtune wrote for adapter=bottleneck, such as RUN/checkpoints/STEP/adapter"


@dataclass(frozen=True, slots=True)
class Saved:
    """A saved adapter, its config read and checked, its weights still in their file."""

    folder: Path
    form: Form
    shapes: dict[str, tuple[int, ...]]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of its tensors, in fp32."""
        for name in self.shapes:
            yield name, self.read(name)

    def read(self, name: str) -> Tensor:
        """One tensor, whole, in fp32."""
        from safetensors import safe_open

        with safe_open(str(self.folder / WEIGHTS), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.float()


def write(folder: Path, tensors: dict[str, Tensor], form: Form, base: str) -> None:
    """Writes both files. tensors: those of the adapter alone, by their names in the woven module."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "variant": form.variant,
        "activation": form.activation,
        "scaling": form.scaling,
        "dropout": form.dropout,
        "width": next(tensor.shape[1] for name, tensor in tensors.items() if name.endswith("down.weight")),
        "size": form.size,
        "layers": list(form.layers),
        "base_model_name_or_path": base,
        "shapes": {name: list(tensor.shape) for name, tensor in sorted(tensors.items())},
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read(folder: Path) -> Saved:
    """Opens a saved adapter. Raises UserError where the folder is none, or its two files contradict each other."""
    from loomtune_plugins.adapters.bottleneck.layers import Form

    try:
        config = json.loads((folder / CONFIG).read_text())
        shapes = stored_shapes(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise UserError.of(f"'{folder}' holds no saved adapter: {error}", CURE) from error
    if wrong := _wrong(config, shapes):
        raise UserError.of(f"'{folder}' {wrong}", CURE)
    form = Form(
        variant=config["variant"],
        size=config["size"],
        activation=config["activation"],
        scaling=float(config["scaling"]),
        layers=tuple(config["layers"]),
        dropout=float(config["dropout"]),
    )
    return Saved(folder, form, shapes)


def _wrong(config: Any, shapes: dict[str, tuple[int, ...]]) -> str:
    """What forbids to use the files; empty where nothing does."""
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        kind = config.get("peft_type") if isinstance(config, dict) else None
        return (
            f"holds an adapter of peft ({kind}), and no bottleneck adapter" if kind else "holds no bottleneck adapter"
        )
    if config.get("version") != VERSION:
        return f"is of version {config.get('version')} of the format, and this loomtune reads version {VERSION}"
    layers, numbers = config.get("layers"), [config.get("scaling"), config.get("dropout")]
    sound = (
        config.get("variant") in VARIANTS
        and config.get("activation") in ACTIVATIONS
        and type(config.get("size")) is int
        and isinstance(layers, list)
        and all(type(layer) is int and layer >= 0 for layer in layers)
        and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    )
    if not sound:
        return f"has a {CONFIG} with values that no bottleneck adapter has"
    said = config.get("shapes")
    if not isinstance(said, dict) or {name: list(shape) for name, shape in shapes.items()} != said:
        return f"has a {CONFIG} that belongs to other weights: names or shapes differ"
    return ""
