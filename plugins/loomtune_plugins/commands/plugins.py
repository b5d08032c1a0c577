"""`loomtune plugins`: what can be chosen, who brought it, and its settings."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_type_hints

from loomtune.catalogue import Entry, installed
from loomtune.errors import UserError
from loomtune.settings import type_name
from loomtune_plugins.commands.words import parser, read


def plugins(words: Sequence[str]) -> int:
    """Prints what is offered, as lines or as JSON."""
    asked = parser("plugins", settings=False)
    asked.add_argument("name", nargs="?", metavar="NAME", help="an axis, an offer, or axis=offer")
    asked.add_argument("--trait", help="only what provides this trait")
    asked.add_argument("--json", action="store_true")
    options = read(asked, words)
    catalogue = installed()
    entries = [entry for entry in catalogue.entries() if _is_asked(entry, options)]
    if not entries and (options.name or options.trait):
        names = ", ".join(sorted({name for e in catalogue.entries() for name in (e.axis.name, e.offer.name)}))
        raise UserError.of(f"nothing is called '{options.name or options.trait}'", f"there are: {names}")
    described = [_described(entry, detail=bool(options.name) or options.json) for entry in entries]
    if options.json:
        print(json.dumps({"offers": described, "broken": catalogue.broken}, indent=1))
        return 0
    for one in described:
        _print_offer(one)
    return 0


def _is_asked(entry: Entry, options: argparse.Namespace) -> bool:
    """True where an entry is meant by NAME (an axis, an offer, axis=offer, a plugin) and has the trait."""
    axis, _, offer = (options.name or "").partition("=")
    names = ("", entry.axis.name, entry.axis.hook, entry.offer.name, entry.source.plugin)
    named = axis in names and offer in ("", entry.offer.name)
    return named and (not options.trait or options.trait in entry.offer.provides)


def _described(entry: Entry, *, detail: bool) -> dict[str, Any]:
    offer, source = entry.offer, entry.source
    said = {"axis": entry.axis.name, "name": offer.name, "summary": offer.summary, **dataclasses.asdict(source)}
    said |= {"extra": offer.extra, "provides": sorted(offer.provides), "needs": sorted(offer.needs)}
    if detail:
        said |= {"excludes": dict(offer.excludes), "variants": {name: list(of) for name, of in offer.variants.items()}}
        said["settings"] = list(_settings(offer.schema))
    return said


def _settings(schema: Any, prefix: str = "") -> Iterator[dict[str, Any]]:
    """Those of a schema, and of each that a name of the user's own leads to."""
    types = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield _setting(field) | {"key": f"{prefix}{field.name}"}
        for inner in get_args(types[field.name]):
            if dataclasses.is_dataclass(inner):
                yield from _settings(inner, f"{prefix}{field.name}.NAME.")


def _setting(field: Any) -> dict[str, Any]:
    default = field.default if field.default is not dataclasses.MISSING else None
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
        default = dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default  # type: ignore[arg-type]
    return {"key": field.name, "type": type_name(field), "default": default, "help": field.metadata.get("help", "")}


def _print_offer(one: dict[str, Any]) -> None:
    brought = "built in" if one["distribution"] == "loomtune" else f"{one['distribution']} {one['version']}"
    print(f"{one['axis'] + '=' + one['name']:<28} {one['summary']}  [{brought}]")
    for label in ("provides", "needs"):
        if one[label] and "settings" in one:
            print(f"    {label}: {', '.join(one[label])}")
    if one["extra"]:
        print(f"    extra: {one['distribution']}[{one['extra']}]")
    for trait, reason in one.get("excludes", {}).items():
        print(f"    excludes: {trait}, because {reason}")
    for variant, typed in one.get("variants", {}).items():
        print(f"    variant: {variant:<17} {' '.join(typed)}")
    for setting in one.get("settings", []):
        print(f"    {setting['key']:<26} {setting['type']} = {setting['default']!r}  {setting['help']}")
