"""What is asked of a run that has ended: `loomtune evaluate`, `loomtune export` and `loomtune report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from loomtune_plugins.commands.words import parser, read


def evaluate(words: Sequence[str]) -> int:
    """Prints metrics."""
    asked = parser("evaluate", run=True)
    asked.add_argument("--best", action="store_true", help="the best checkpoint instead of the latest")
    options = read(asked, words)
    from loomtune import api  # only now: it brings Hydra along, for which no help waits

    print(json.dumps(api.evaluate(options.folder, options.overrides, best=options.best), indent=1))
    return 0


def export(words: Sequence[str]) -> int:
    """Prints the folder that the model is in."""
    asked = parser("export", run=True)
    asked.add_argument("--out", metavar="DIR", help="an empty or new folder; default: RUN/export/FORMAT")
    asked.add_argument("--to", metavar="FORMAT", default="huggingface", help="`loomtune plugins exporter` lists them")
    asked.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or a step")
    asked.add_argument("--no-check", action="store_true", help="do not compare it with what was trained")
    options = read(asked, words)
    from loomtune import api

    named = {"to": options.to, "checkpoint": options.checkpoint, "check": not options.no_check}
    print(api.export(options.folder, options.out, options.overrides, **named))
    return 0


def report(words: Sequence[str]) -> int:
    """Prints where the report is."""
    options = read(parser("report", run=True, settings=False), words)
    from loomtune import api

    print(api.report(Path(options.folder)))
    return 0
