"""What the adapters of peft that wrap layers have in common."""

from __future__ import annotations

import logging
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Adapter, Model, WeightSource
from loomtune_plugins.adapters.wrapped.targets import shortest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune_plugins.adapters.wrapped.woven import Added, Names

PREFIX = "base_model.model"
"""Where peft's two wrappers keep the model."""
NAME = "default"
"""What peft calls the adapter that is trained, within the module; its files leave it out."""
WHOLE = "modules_to_save"
"""The part of a module that is trained whole, as peft names it."""


class Wrapping(Adapter):
    """Puts peft's modules around layers of a skeleton, and trains nothing but what they add.

    A method says which layers, by which config of peft, and what its parts first are. What a tensor is called, in the
    module and in files, is read off the woven module and peft itself; merging is done by peft's layers, one at a time.
    """

    saves_base = False
    stays: tuple[str, ...] = ()
    """Names, in peft's modules, of adapters that compute while the trained one is off."""

    def __init__(self) -> None:
        self._names: Names | None = None
        self._targets: list[str] = []
        self._woven: weakref.ref[nn.Module] | None = None

    @abstractmethod
    def layers(self, module: nn.Module) -> list[str]:
        """Names of the layers to wrap. Raises UserError where there is none, or one that cannot be wrapped."""

    @abstractmethod
    def config(self, targets: list[str], **more: Any) -> Any:
        """peft's config of the method. targets: names of layers. more: what every config of peft takes."""

    @abstractmethod
    def first(self, added: Added, shape: tuple[int, ...], base: WeightSource, seed: int) -> Tensor:
        """First values, whole and in fp32, of what is added: a function of its name, the seed and the base alone."""

    def settle(self, module: nn.Module) -> None:
        """Makes plain values of what peft computes at birth and no file holds: buffers lose it on the meta device."""
        return

    def config_of(self, layer: str) -> Any:
        """peft's config by which one layer is merged, whose target is called `layer`."""
        return self.config(["layer"])

    def configs_of(self, layer: str) -> Mapping[str, Any]:
        """The same for each adapter that is merged into the layer, by its name in peft's modules."""
        return {NAME: self.config_of(layer)}

    def dress(self, woven: Any) -> None:
        """Adds to the woven module, on the meta device, what one config of peft cannot say; names are read after it."""
        return

    def changed(self, weights: WeightSource, seed: int) -> WeightSource:
        """The base's weights as the layers beneath the adapter are to have them."""
        return weights

    def first_of(self, name: str, added: Added, shape: tuple[int, ...], base: WeightSource, seed: int) -> Tensor:
        """The same as `first`, by the name in the woven module too; what is trained whole begins as the base."""
        if added.part == WHOLE:
            return base.read(f"{added.layer}.{name.rpartition('.')[2]}").float()
        return self.first(added, shape, base, seed)

    def leaves(self, tensors: dict[str, Tensor], config: Any) -> None:
        """Changes, in place, what is saved where that is not what was trained. tensors: by their names in the file."""
        return

    def suits(self, model: Model) -> None:
        """Weaves a skeleton that never has weights: what training would refuse is refused here."""
        import torch

        from loomtune_plugins.adapters.wrapped.woven import Nowhere

        self.meet(model)
        with torch.device("meta"):
            skeleton = model.skeleton()
        self.weave(skeleton, Nowhere(), 0)

    def weave(self, module: nn.Module, weights: WeightSource, seed: int) -> tuple[nn.Module, WeightSource]:
        """Wraps the layers. First values come from the source: what peft draws on the meta device is nothing."""
        quiet()
        from peft import get_peft_model

        from loomtune_plugins.adapters.wrapped.woven import WovenWeights, names, owners

        layers, before = self.layers(module), owners(module)
        self._targets = shortest(layers, (name for name, _ in module.named_modules()))
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5 for a property by its old name.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            # The whole names: what the user's patterns chose, and not what peft would make of them.
            # peft tells that it takes the layers of GPT-2 for what they are.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            woven = get_peft_model(module, self.config(layers))
            self.dress(woven)
        self.settle(woven)
        self._names, self._woven = (found := names(woven, before)), weakref.ref(woven)
        for name, parameter in woven.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and found.trains(name))

        def first(name: str, added: Added, shape: tuple[int, ...]) -> Tensor:
            return self.first_of(name, added, shape, weights, seed)

        return woven, WovenWeights(self.changed(weights, seed), woven, found, first)

    def parts(self) -> list[dict[str, nn.Parameter]]:
        """What the module woven last has added to each layer, by part: to be asked when an engine's are in place."""
        woven = self._woven() if self._woven is not None else None
        assert woven is not None, "an optimizer is built of a module that is woven"
        layers: dict[str, dict[str, nn.Parameter]] = {}
        for name, added in self.names.added.items():
            layers.setdefault(added.layer, {})[added.part] = woven.get_parameter(name)
        return list(layers.values())

    def base(self, module: nn.Module) -> nn.Module:
        """The model inside peft's two wrappers; its layers stay wrapped."""
        return module.get_submodule(PREFIX)

    @contextmanager
    def off(self, module: nn.Module) -> Iterator[None]:
        """Lets the wrapped layers compute as their base does.

        peft's own `disable_adapter` also clears `requires_grad` and sets it on leaving, behind the back of DDP and
        FSDP2, which read it once; so only the layers' switch is thrown here.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        switched = [m for m in module.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in switched]
        try:
            for layer in switched:
                there = layer._get_available_adapters() if self.stays else set()
                if staying := [name for name in self.stays if name in there]:
                    layer._active_adapter = staying
                else:
                    layer._disable_adapters = True
            yield
        finally:
            for layer, disabled, active in before:
                layer._disable_adapters, layer._active_adapter = disabled, active

    @property
    def names(self) -> Names:
        """What the tensors of the module woven last are."""
        assert self._names is not None, "names are known once a skeleton is woven"
        return self._names

    def base_name(self, name: str) -> str | None:
        """Without peft's `base_model.model.` and `base_layer`; None for what was added."""
        return None if name in self.names.added else self.names.base.get(name, name)

    def learning_rate_scale(self, name: str) -> float:
        """The same rate for all."""
        return 1.0

    def merged(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The base with what was added in it, computed in fp32, a layer at a time; waits for what it still lacks."""
        wanted: dict[str, int] = {}
        for part in self.names.added.values():
            wanted[part.layer] = wanted.get(part.layer, 0) + 1
        for name in self.names.base.values():
            layer = name.rpartition(".")[0]
            wanted.update({layer: wanted[layer] + 1} if layer in wanted else {})
        waiting: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        for name, tensor in tensors:
            added, known = self.names.added.get(name), self.names.base.get(name, name)
            layer, _, leaf = known.rpartition(".") if added is None else (added.layer, "", "")
            if layer not in wanted:
                yield known, tensor
                continue
            base, parts = waiting.setdefault(layer, ({}, {}))
            (base if added is None else parts)[leaf if added is None else name] = tensor
            if len(base) + len(parts) == wanted[layer]:
                del waiting[layer]
                yield from self._merged(layer, base, parts)
        assert not waiting, f"parts of the adapter never came: {sorted(waiting)[:3]}"

    def _merged(
        self, layer: str, base: Mapping[str, Tensor], parts: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """A layer's tensors, in the types that they had. parts: by their names in the woven module."""
        from loomtune_plugins.adapters.wrapped.merging import merged

        kinds = {name: self.names.added[name] for name in parts}
        if all(added.part == WHOLE for added in kinds.values()):
            yield from (
                (f"{layer}.{leaf}", parts[name].to(base[leaf].dtype)) for name in parts for leaf in [_leaf(name)]
            )
            return
        configs = self.configs_of(layer)
        whole = {
            name.removeprefix(f"{PREFIX}.{layer}."): tensor
            for name, tensor in parts.items()
            if kinds[name].adapter in configs
        }
        made = merged(configs, base, whole, self.settle)
        yield from ((f"{layer}.{leaf}", tensor.to(base[leaf].dtype)) for leaf, tensor in made.items())

    def save(self, folder: Path, tensors: Iterator[tuple[str, Tensor]], base: str) -> None:
        """Writes `adapter_model.safetensors` and `adapter_config.json`, which `PeftModel.from_pretrained` opens."""
        from safetensors.torch import save_file

        files = self.names.files
        ours = {files[name]: tensor.detach().cpu().contiguous() for name, tensor in tensors if name in files}
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config(self._targets, task_type="CAUSAL_LM", inference_mode=True)
        self.leaves(ours, config)
        save_file(ours, folder / "adapter_model.safetensors")
        config.base_model_name_or_path = base
        # peft keeps the targets as a set, whose order would change the file's bytes from run to run.
        config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(folder))

    def reopen(self, module: nn.Module, folder: Path) -> Callable[[Tensor], Tensor] | None:
        """By `PeftModel.from_pretrained`."""
        from loomtune_plugins.adapters.wrapped.opened import by_peft

        return by_peft(module, folder)


def quiet() -> None:
    """Before peft is imported: it imports bitsandbytes, which warns of a kernel that nothing here calls (0.50.2)."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
