"""Where each value of a composition came from: a schema, a config, or the command line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from loomtune.compose.composition import Composition
from loomtune.compose.requests import AXIS_NAMES, names_choice, subject
from loomtune.settings import leaves

TYPED = "command line"


def origins(composition: Composition) -> Iterator[tuple[str, Any, str]]:
    """(key, value, origin) of every setting: the last that set it. Raises UserError where it does not compose."""
    settings = composition.settings()
    setters = _setters(composition)
    for key, value in leaves(settings):
        found = [place for place in setters if key == place or key.startswith(f"{place}.")]
        yield key, value, setters[max(found, key=len)] if found else "default"


def _setters(composition: Composition) -> dict[str, str]:
    """Key, or the mapping that a key lies in, to who set it last."""
    setters: dict[str, str] = {}
    choosers = dict.fromkeys(AXIS_NAMES, "config.yaml")
    for part in composition.loader.parts(composition.texts):
        choosers |= dict.fromkeys(part.chooses, part.label)
        for key, _ in leaves(OmegaConf.to_container(part.config, resolve=False)):
            _put(setters, f"{part.package}.{key}" if part.package else key, part.label)
    choosers |= dict.fromkeys(composition.requests.chosen(), TYPED)
    for override in composition.requests.values:
        for key, _ in leaves({override.key_or_group: override.value()}):
            _put(setters, key, TYPED)
    return {key: choosers[subject(key)] if names_choice(key) else setter for key, setter in setters.items()}


def _put(setters: dict[str, str], key: str, setter: str) -> None:
    """A mapping that is set as a whole replaces what was said of its parts."""
    for part in [known for known in setters if known.startswith(f"{key}.")]:
        del setters[part]
    setters[key] = setter
