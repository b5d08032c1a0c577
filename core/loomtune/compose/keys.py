"""Which keys there are: what is wrong with a key or its value, and which key was probably meant."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from loomtune.catalogue import Catalogue, is_many
from loomtune.compose.requests import AXIS_NAMES, names_choice, subject
from loomtune.errors import Fault, near
from loomtune.settings import leaves, type_name


class Keys:
    """The keys of a composed config."""

    def __init__(self, config: DictConfig, catalogue: Catalogue) -> None:
        self.config, self.catalogue = config, catalogue

    def fault(self, override: Override) -> Fault | None:
        """What is wrong with an override; None where it can be applied."""
        key = override.key_or_group
        if names_choice(key):
            return Fault(f"{key} names the choice itself", f"set {subject(key)}={override.get_value_string()}")
        if self.exists(key):
            return self._mistyped(override)
        return None if self.is_new(key) else self._unknown(key)

    def exists(self, key: str) -> bool:
        """True where the key has a place, be it without a value."""
        parent, _, leaf = key.rpartition(".")
        node = self._node(parent) if parent else self.config
        return isinstance(node, DictConfig) and leaf in node

    def is_new(self, key: str) -> bool:
        """True where the key is a mapping whose keys are the user's own (`launcher.environment`), or one within it."""
        parent = key
        while "." in parent and not self.exists(parent):
            parent = parent.rpartition(".")[0]
        node = self._node(parent)
        mapping = isinstance(node, DictConfig) and not dataclasses.is_dataclass(OmegaConf.get_type(node))
        return parent not in AXIS_NAMES and mapping

    def _node(self, key: str) -> Any:
        try:
            return OmegaConf.select(self.config, key, throw_on_missing=False)
        except OmegaConfBaseException:
            return None

    def _mistyped(self, override: Override) -> Fault | None:
        trial, key = self.config.copy(), override.key_or_group
        try:
            if isinstance(value := override.value(), dict) and self.is_new(key):
                with open_dict(trial):
                    for name, one in value.items():
                        OmegaConf.select(trial, key)[name] = one  # merged as a whole, their types would go unasked
            else:
                OmegaConf.update(trial, key, value)
        except OmegaConfBaseException as error:
            told, listed = str(error).splitlines()[0], isinstance(override.value(), str) and "ListConfig" in str(error)
            cure = f"write a list, {key}=[{override.value()}]: " if listed else ""
            return Fault(f"{override.input_line}: {told}", f"{cure}{key} is {self._described(key)}")
        return None

    def _described(self, key: str) -> str:
        """Type and explanation of a key, from the schema that it belongs to."""
        parent, _, leaf = key.rpartition(".")
        schema = OmegaConf.get_type(self._node(parent) if parent else self.config)
        group = OmegaConf.get_type(self._node(key))
        if dataclasses.is_dataclass(group):
            return f"a group of the settings {', '.join(field.name for field in dataclasses.fields(group))}"
        if not dataclasses.is_dataclass(schema):
            return "of another type"
        field = next(field for field in dataclasses.fields(schema) if field.name == leaf)
        return f"{type_name(field)}: {field.metadata.get('help', '')}"

    def _unknown(self, key: str) -> Fault:
        axis, _, rest = key.partition(".")
        if axis not in AXIS_NAMES:
            said = near(key, [name for name, _ in leaves(OmegaConf.to_container(self.config))])
            return Fault(f"there is no setting '{key}'.{said}", "`loomtune train --dry-run` shows every key")
        owners = self._owners(axis)
        if rest in owners:
            return Fault(f"{key} is not a setting of what is chosen for {axis}", f"choose {' or '.join(owners[rest])}")
        tree = {axis: OmegaConf.to_container(self.config)[axis] or {}}  # type: ignore[index,call-overload]
        inside = [name for name, _ in leaves(tree) if not name.endswith(".name") and name != axis]
        elsewhere = {f"{axis}.{other}": choices for other, choices in owners.items()}
        meant = next(iter(get_close_matches(key, [*inside, *elsewhere], n=1)), "")
        cure = f"the settings of what is chosen for {axis}: {', '.join(inside) or 'none'}"
        if meant and meant not in inside:
            cure = f"choose {' or '.join(elsewhere[meant])} and set {meant}"
        return Fault(f"there is no setting '{key}'.{near(key, [meant])}", cure)

    def _owners(self, axis: str) -> dict[str, list[str]]:
        """Keys under an axis, to the choices that would bring them."""
        owners: dict[str, list[str]] = {}
        for entry in self.catalogue.entries(axis):
            name = entry.offer.name
            for field in dataclasses.fields(entry.offer.schema):
                key, choice = (f"{name}.{field.name}", f"[...,{name}]") if is_many(axis) else (field.name, name)
                owners.setdefault(key, []).append(f"{axis}={choice}")
        return owners
