"""What of a bottleneck adapter's settings, or of a saved one, does not go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loomtune.errors import Fault, UserError
from loomtune_plugins.adapters.bottleneck.settings import ACTIVATIONS, VARIANTS, BottleneckSettings
from loomtune_plugins.adapters.told import misset

if TYPE_CHECKING:
    from loomtune_plugins.adapters.bottleneck.files import Saved
    from loomtune_plugins.adapters.bottleneck.layers import Form


def fits(shapes: Mapping[str, tuple[int, ...]], saved: Saved) -> None:
    """Raises UserError where a saved adapter is not of these names and shapes, those of a woven module."""
    for name in sorted(shapes.keys() | saved.shapes.keys()):
        if (ours := shapes.get(name)) != (theirs := saved.shapes.get(name)):
            raise UserError.of(
                f"the adapter in '{saved.folder}' does not fit the model: {name} is {theirs or 'absent'} there and "
                f"{ours or 'absent'} in the model",
                "set model.path to the model that it was trained on, or adapter.path to another",
            )


def agree(settings: BottleneckSettings, form: Form, width: int, layers: tuple[int, ...]) -> None:
    """What was set beside `adapter.path` must be as the saved adapter is."""
    asked: dict[str, tuple[Any, Any]] = {
        "variant": (settings.variant, form.variant),
        "size": (settings.size, form.size),
        "activation": (settings.activation, form.activation),
        "scaling": (settings.scaling, form.scaling),
    }
    faults = [
        Fault(f"adapter.{key}={ours}, and the adapter in adapter.path has {theirs}", f"leave adapter.{key} out")
        for key, (ours, theirs) in asked.items()
        if ours and ours != theirs
    ]
    if settings.reduction and width // settings.reduction != form.size:
        what = f"adapter.reduction={settings.reduction} makes a width of {width // settings.reduction}"
        faults.append(Fault(f"{what}, and the adapter in adapter.path has {form.size}", "leave adapter.reduction out"))
    if settings.layers and layers != form.layers:
        what = f"adapter.layers={settings.layers}, and the adapter in adapter.path is of blocks {list(form.layers)}"
        faults.append(Fault(what, "leave adapter.layers out"))
    if faults:
        raise UserError(*faults)


def check(settings: BottleneckSettings) -> None:
    """Raises UserError that names all settings without sense."""
    variants, activations = " or ".join(VARIANTS), ", ".join(ACTIVATIONS)
    faults = misset(
        settings,
        ("variant", settings.variant in ("", *VARIANTS), "is no variant", variants),
        ("reduction", settings.reduction >= 0, "is no factor", "a whole number from 1 on, or 0 for the usual"),
        ("size", settings.size >= 0, "is no width", "a whole number from 1 on, or 0"),
        ("activation", settings.activation in ("", *ACTIVATIONS), "is no activation", activations),
        ("dropout", 0 <= settings.dropout < 1, "is no probability below 1", "0 or more, below 1"),
        ("scaling", settings.scaling >= 0, "is no factor", "a number above 0, or 0 for 1"),
    )
    if settings.size and settings.reduction:
        faults.append(Fault("adapter.size and adapter.reduction both say how wide it is", "set one of them"))
    if faults:
        raise UserError(*faults)
