"""Bottleneck adapters: small networks after the sublayers of each transformer block.

Houlsby et al. 2019 ("Parameter-Efficient Transfer Learning for NLP"): the output `s` of a sublayer, attention or MLP,
becomes `s + A(s)` before it is added to the stream, with `A(x) = up(activation(down(x)))`. Where a family norms a
sublayer's output before the addition (Gemma 2, OLMo 2), `s` is what the sublayer itself gives, and `s + A(s)` is what
is normed; where both sublayers read the same stream (GPT-NeoX, Phi, Falcon), each has its adapter before their sum.

Pfeiffer et al. 2020 ("MAD-X", "AdapterFusion"): one adapter a block, after the MLP. In a post-norm transformer it reads
the normed sum `h = LN(x + s)`, and what it adds joins `s` before the residual: `LN(x + (s + A(h)))`. A pre-norm decoder
has no norm there, and the same formula without it is taken: `h = x + s`, and the block gives `x + s + A(h) = h + A(h)`,
which is an adapter at the block's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune.contracts import Adapter, Model, WeightSource
from loomtune.errors import UserError
from loomtune_plugins.adapters.bottleneck import checks, files
from loomtune_plugins.adapters.bottleneck.settings import (
    ACTIVATIONS,
    ATTENTION,
    BLOCK,
    MLP,
    VARIANTS,
    BottleneckSettings,
)
from loomtune_plugins.adapters.digests import digest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune_plugins.adapters.bottleneck.layers import Form

REDUCTION = 16
"""As in both papers' repositories."""


class Bottleneck(Adapter):
    """Adds modules beside the base's, whose names stay, and calls them by hooks on what they come after.

    A hook on a block runs outside of what activation checkpointing computes again, and one on a sublayer inside it:
    either way within the block's call, where strategies have its parameters whole.
    """

    saves_base = False

    def __init__(self, settings: BottleneckSettings) -> None:
        checks.check(settings)
        self._settings = settings

    @cached_property
    def _saved(self) -> files.Saved | None:
        """What `adapter.path` names; read once, since training may outlive the folder."""
        return files.read(Path(self._settings.path)) if self._settings.path else None

    def fingerprint(self) -> str:
        """Of `adapter.path`, whose form is read at every weaving."""
        found = self._saved
        return digest(found.folder / files.CONFIG, found.folder / files.WEIGHTS) if found else ""

    def suits(self, model: Model) -> None:
        """Looks for the places in a skeleton on the meta device."""
        import torch

        from loomtune_plugins.adapters.bottleneck.layers import insert

        with torch.device("meta"):
            skeleton = model.skeleton()
        form, saved = self._form(skeleton)
        shapes = insert(skeleton, form)
        if saved is not None:
            checks.fits(shapes, saved)

    def weave(self, module: nn.Module, weights: WeightSource, seed: int) -> tuple[nn.Module, WeightSource]:
        """The same module with more in it, of which nothing else is trained."""
        from loomtune_plugins.adapters.bottleneck.layers import bottlenecks, first, insert
        from loomtune_plugins.adapters.wrapped.woven import Added, Names, WovenWeights

        form, saved = self._form(module)
        module.requires_grad_(False)
        shapes = insert(module, form)
        for part in bottlenecks(module):
            part.requires_grad_(True)
        if saved is not None:
            checks.fits(shapes, saved)
        added = {name: Added("", name) for name in shapes}
        names = Names(base={name: name for name in module.state_dict() if name not in added}, added=added)
        values = saved.read if saved is not None else partial(first, shapes=shapes, seed=seed)
        return module, WovenWeights(weights, module, names, lambda name, *_: values(name))

    def _form(self, module: nn.Module) -> tuple[Form, files.Saved | None]:
        """What is to be added, and the saved adapter that says so, if one does."""
        from loomtune_plugins.adapters.bottleneck import layers as bottleneck_layers
        from loomtune_plugins.adapters.bottleneck import places as bottleneck_places

        settings = self._settings
        width, count = bottleneck_places.width(module), len(bottleneck_places.blocks(module))
        layers = bottleneck_layers.numbers(settings.layers, count)
        if (saved := self._saved) is not None:
            checks.agree(settings, saved.form, width, layers)
            return replace(saved.form, dropout=settings.dropout), saved
        size = settings.size or width // (settings.reduction or REDUCTION)
        if size < 1:
            what = f"adapter.reduction={settings.reduction or REDUCTION} leaves nothing of the model's width {width}"
            raise UserError.of(what, f"set adapter.reduction to at most {width}, or adapter.size")
        form = bottleneck_layers.Form(
            variant=settings.variant or VARIANTS[0],
            size=size,
            activation=settings.activation or ACTIVATIONS[0],
            scaling=settings.scaling or 1.0,
            layers=layers,
            dropout=settings.dropout,
        )
        return form, None

    def base(self, module: nn.Module) -> nn.Module:
        """The module itself, in which only names have been added."""
        return module

    def off(self, module: nn.Module) -> AbstractContextManager[None]:
        """The hooks do nothing."""
        from loomtune_plugins.adapters.bottleneck.layers import inert

        return inert(module)

    def base_name(self, name: str) -> str | None:
        """The same name, or None inside an added module."""
        return None if {ATTENTION, MLP, BLOCK}.intersection(name.split(".")) else name

    def learning_rate_scale(self, name: str) -> float:
        """The same rate for all."""
        return 1.0

    def merged(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Raises UserError: between the two layers stands a function that no matrix is."""
        raise UserError.of(
            "adapter=bottleneck is not linear, so no weights of the base can have it in them",
            "export the adapter by itself: `loomtune export RUN --to adapter`",
        )

    def save(self, folder: Path, tensors: Iterator[tuple[str, Tensor]], base: str) -> None:
        """Writes the format of `bottleneck_files`, which `adapter.path` goes on from and `attach` opens."""
        from loomtune_plugins.adapters.bottleneck.layers import Form

        ours = {name: tensor.detach().cpu() for name, tensor in tensors if self.base_name(name) is None}
        # What is said of the adapter is read off its tensors: who saves need not be who wove.
        downs = {name: tensor for name, tensor in ours.items() if name.endswith("down.weight")}
        known = self._saved.form if self._saved is not None else None
        form = Form(
            variant="pfeiffer" if any(f".{BLOCK}." in name for name in ours) else "houlsby",
            size=next(iter(downs.values())).shape[0],
            activation=known.activation if known else self._settings.activation or ACTIVATIONS[0],
            scaling=known.scaling if known else self._settings.scaling or 1.0,
            layers=tuple(sorted({int(name.split(".")[-4]) for name in downs})),
            dropout=self._settings.dropout,
        )
        files.write(folder, ours, form, base)

    def reopen(self, module: nn.Module, folder: Path) -> Callable[[Tensor], Tensor] | None:
        """By `attach`; None where the model is called otherwise than those of transformers."""
        from loomtune_plugins.adapters.wrapped.opened import asked

        return asked(attach(module, folder)) if hasattr(module, "prepare_inputs_for_generation") else None


def attach(model: nn.Module, folder: str | Path) -> nn.Module:
    """Puts a saved bottleneck adapter on a model of transformers, for inference without loomtune; gives the same model.

    It is added to the model in place, in fp32, on the devices of the blocks. Generation works as before: an adapter
    looks at one position at a time, so key-value caches are as valid as without it.
    """
    import torch

    from loomtune_plugins.adapters.bottleneck.layers import insert

    saved = files.read(Path(folder))
    shapes = insert(model, saved.form)
    checks.fits(shapes, saved)
    with torch.no_grad():
        for name, tensor in saved.tensors():
            model.get_parameter(name).copy_(tensor)
    return model
