"""Checks of what a plugin offers, and of what importing it costs."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from loomtune.catalogue import Entry, Source, settings_of
from loomtune.errors import UserError
from loomtune.offers import Offer, Trait, axis

HEAVY = ("torch", "transformers", "deepspeed", "datasets", "wandb", "peft")


def check_offer(kind: str, offer: Offer[Any]) -> None:
    """Checks one offer of an axis: name, words, settings, traits, variants, and that its class meets the contract.

    The class is built from its default settings, which it may refuse only with a UserError.
    """
    asked = f"{kind}={offer.name}"
    assert re.fullmatch(r"[a-z0-9][a-z0-9_]*", offer.name), f"{asked}: a name has lower-case letters, digits and _"
    assert offer.summary and "\n" not in offer.summary, f"{asked} needs a summary of one line"
    for trait in offer.provides | offer.needs | offer.excludes.keys():
        assert trait in set(Trait) or re.fullmatch(r"\w+:\w+", trait), f"{asked}: a trait of your own is prefix:{trait}"
    for trait, reason in offer.excludes.items():
        assert reason and "\n" not in reason, f"{asked} excludes {trait} without a reason of one line"
        assert trait not in offer.needs, f"{asked} both needs and excludes {trait}"
    _check_schema(asked, offer.schema)
    _check_variants(kind, offer)
    module, _, attribute = offer.build.partition(":")
    built: Any = getattr(import_module(module), attribute)
    contract_module, _, contract = axis(kind).contract.partition(":")
    assert issubclass(built, getattr(import_module(contract_module), contract)), f"{asked}: {built} is no {contract}"
    assert not built.__abstractmethods__, f"{asked}: {built} lacks {sorted(built.__abstractmethods__)}"
    try:
        built(offer.schema())
    except UserError as error:
        assert all(fault.cure for fault in error.faults), f"{asked}: an error without a cure: {error}"


def _check_schema(asked: str, schema: type) -> None:
    from omegaconf import OmegaConf

    assert dataclasses.is_dataclass(schema), f"{asked}: its settings are no dataclass"
    assert schema.__doc__, f"{asked}: {schema.__name__} needs a docstring"
    for field in dataclasses.fields(schema):
        assert field.name != "name", f"{asked}: `name` is reserved for the offer's own"
        assert field.metadata.get("help"), f"{asked}: {field.name} needs its help; use loomtune.settings.option"
    OmegaConf.structured(schema)  # raises where a type is none that a config can hold


def _check_variants(kind: str, offer: Offer[Any]) -> None:
    """Every variant has a name and settings of the offer's own axis that its schema takes, unlike any other's."""
    entry = Entry(axis(kind), offer, Source("", "", ""))
    seen: dict[str, str] = {}
    for name, typed in offer.variants.items():
        asked = f"the variant {name!r} of {entry}"
        assert re.fullmatch(r"[a-z0-9][a-z0-9_ ]*", name), (
            f"{asked}: a name has lower-case letters, digits, _ and spaces"
        )
        strange = [text for text in typed if not re.match(rf"{kind}\.[\w.]+=", text)]
        assert typed and not strange, f"{asked} sets {strange or 'nothing'}; a variant sets {kind}.<key>=<value>"
        try:
            settings = str(settings_of(entry, typed, {}))
        except UserError as error:
            raise AssertionError(f"{asked} does not compose: {error}") from error
        assert seen.setdefault(settings, name) == name, f"{asked} is the same as {seen[settings]!r}"


def check_light(modules: Sequence[str]) -> None:
    """Checks, in a fresh interpreter, that importing the modules that make offers imports no heavy library."""
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{', '.join(modules)} cannot be imported:\n{ran.stderr}"
    loaded = set(HEAVY) & set(ran.stdout.split())
    assert not loaded, f"importing {', '.join(modules)} imports {', '.join(sorted(loaded))}: import it where it is used"
