"""The command line: a thin layer over `loomtune.api`, which imports what a command needs only when it runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loomtune import __version__
from loomtune.errors import LoomtuneError, Preempted, UserError
from loomtune.settings import type_name

OVERRIDES = "settings as key=value, such as objective=sft optimizer.lr=1e-4; `--dry-run` shows all of them"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the `loomtune` command. Exit codes as in `loomtune.errors`."""
    options, rest = _parser().parse_known_args(arguments)
    stray = [text for text in rest if text.startswith("-") or "=" not in text]
    if rest and (stray or not hasattr(options, "overrides")):
        _parser().error(f"unrecognised: {' '.join(stray or rest)}; settings are written key=value")
    if rest:
        options.overrides = [*options.overrides, *rest]
    try:
        sys.exit(options.run(options))
    except LoomtuneError as error:
        print(f"loomtune: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loomtune", description="Fine-tuning where every part is a plugin.")
    parser.add_argument("--version", action="version", version=f"loomtune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = _command(commands, "train", _train, "train a model; alone, it teaches the shipped one to write SQL")
    train.add_argument(
        "--dry-run", action="store_true", help="show every setting and where it came from; start nothing"
    )
    elsewhere = "with --dry-run: as on N processes elsewhere, without asking for files"
    train.add_argument("--world", type=int, metavar="N", help=elsewhere)
    train.add_argument("--config-dir", action="append", default=[], help="a folder of your own Hydra configs")
    _overrides(train)
    resume = _command(commands, "resume", _resume, "go on with a run, under any sharding and world size")
    resume.add_argument("folder", metavar="RUN")
    _overrides(resume)
    evaluate = _command(commands, "evaluate", _evaluate, "measure a run's checkpoint with its evaluators")
    evaluate.add_argument("folder", metavar="RUN")
    evaluate.add_argument("--best", action="store_true", help="the best checkpoint instead of the latest")
    _overrides(evaluate)
    chat = _command(commands, "chat", _chat, "talk to a run's model in the terminal")
    chat.add_argument("folder", metavar="RUN")
    chat.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    chat.add_argument("--max-tokens", type=int, default=128)
    export = _command(commands, "export", _export, "write a run's model, or its adapter, as others open it")
    export.add_argument("folder", metavar="RUN")
    export.add_argument("--out", metavar="DIR", help="an empty or new folder; default: RUN/export/FORMAT")
    export.add_argument("--to", metavar="FORMAT", default="huggingface", help="`loomtune plugins exporter` lists them")
    export.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or a step")
    export.add_argument("--no-check", action="store_true", help="do not compare it with what was trained")
    _overrides(export)
    report = _command(commands, "report", _report, "write RUN/report.html anew from the run's files")
    report.add_argument("folder", metavar="RUN")
    plugins = _command(commands, "plugins", _plugins, "list what can be chosen, who brought it, and its settings")
    plugins.add_argument("name", nargs="?", metavar="NAME", help="an axis, an offer, or axis=offer")
    plugins.add_argument("--trait", help="only what provides this trait")
    plugins.add_argument("--json", action="store_true")
    matrix = _command(commands, "matrix", _matrix, "show which objectives, adapters and shardings go together")
    matrix.add_argument("--processes", type=int, default=2, help="world size of the shardings that run on several")
    matrix.add_argument("--json", action="store_true")
    _overrides(matrix)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    return parser


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def _train(options: argparse.Namespace) -> int:
    from loomtune import api

    if options.dry_run:
        return _dry_run(options)
    if options.world is not None:
        raise UserError.of(f"--world {options.world} is a world that is not here", "add --dry-run, or leave it out")
    return _ended(api.train(options.overrides, options.config_dir))


def _dry_run(options: argparse.Namespace) -> int:
    from loomtune import api
    from loomtune.catalogue import installed
    from loomtune.compose import explain
    from loomtune.plan import estimates

    elsewhere = options.world is not None
    if elsewhere and options.world < 1:
        raise UserError.of(f"--world {options.world} has no process", "name at least 1")
    plan = api.compose(options.overrides, options.config_dir, options.world or 0)
    api.warn(api.check(plan, simulated=elsewhere))
    for key, value, origin in explain(options.overrides, options.config_dir):
        print(f"{key}={value if str(value).isprintable() else repr(value)}  # {origin}")
    for foretold in estimates(plan, installed()):
        print(f"estimate: {foretold.subject} {foretold.value:g} {foretold.unit} ({foretold.reasoning})")
    if elsewhere:
        if not plan.build(installed(), "model").at_hand():
            print("not asked: whether the model can be laid out so, because its config is not at hand")
        return 0
    launcher = plan.build(installed(), "launcher")
    for command in launcher.render(launcher.spec(Path("RUN"), plan.processes)).commands:
        print(f"would run: {' '.join(command)}")
    return 0


def _resume(options: argparse.Namespace) -> int:
    from loomtune import api

    return _ended(api.resume(options.folder, options.overrides))


def _ended(result: Any) -> int:
    if result.status == "failed" or result.error:
        print(f"loomtune: the run {result.status} at step {result.step}: {result.error}", file=sys.stderr)
        return 1
    return Preempted.exit_code if result.status == "preempted" else 0


def _evaluate(options: argparse.Namespace) -> int:
    from loomtune import api

    print(json.dumps(api.evaluate(options.folder, options.overrides, best=options.best), indent=1))
    return 0


def _chat(options: argparse.Namespace) -> int:
    from loomtune.chat import chat

    return chat(Path(options.folder), options.temperature, options.max_tokens)


def _export(options: argparse.Namespace) -> int:
    from loomtune import api

    named = {"to": options.to, "checkpoint": options.checkpoint, "check": not options.no_check}
    print(api.export(options.folder, options.out, options.overrides, **named))
    return 0


def _report(options: argparse.Namespace) -> int:
    from loomtune.api import report

    print(report(Path(options.folder)))
    return 0


def _plugins(options: argparse.Namespace) -> int:
    from loomtune.catalogue import installed

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


def _matrix(options: argparse.Namespace) -> int:
    from loomtune import matrix

    cells = list(matrix.cells(options.overrides, options.processes))
    described = {"processes": options.processes, "cells": [cell.described() for cell in cells]}
    print(json.dumps(described, indent=1) if options.json else "\n".join(matrix.shown(cells)))
    return 0


def _is_asked(entry: Any, options: argparse.Namespace) -> bool:
    """True where an entry is meant by NAME (an axis, an offer, axis=offer, a plugin) and has the trait."""
    axis, _, offer = (options.name or "").partition("=")
    names = ("", entry.axis.name, entry.axis.hook, entry.offer.name, entry.source.plugin)
    named = axis in names and offer in ("", entry.offer.name)
    return named and (not options.trait or options.trait in entry.offer.provides)


def _described(entry: Any, *, detail: bool) -> dict[str, Any]:
    offer, source = entry.offer, entry.source
    said = {"axis": entry.axis.name, "name": offer.name, "summary": offer.summary, **dataclasses.asdict(source)}
    said |= {"extra": offer.extra, "provides": sorted(offer.provides), "needs": sorted(offer.needs)}
    if detail:
        said |= {"excludes": dict(offer.excludes), "variants": {name: list(of) for name, of in offer.variants.items()}}
        said["settings"] = [_setting(field) for field in dataclasses.fields(offer.schema)]
    return said


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


if __name__ == "__main__":
    main()
