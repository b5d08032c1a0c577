"""What is asked of a run wherever it is: `loomtune status`, `loomtune logs` and `loomtune cancel`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from loomtune_plugins.commands.words import parser, read


def status(words: Sequence[str]) -> int:
    """Prints what the run is doing."""
    asked = _parser("status")
    asked.add_argument("--json", action="store_true")
    options = read(asked, words)
    from loomtune import api

    found = api.launched(options.folder).status(Path(options.folder).absolute())
    if options.json:
        print(json.dumps({"state": found.state, "detail": found.detail}))
    else:
        print(f"{found.state}: {found.detail}" if found.detail else found.state)
    return 0


def logs(words: Sequence[str]) -> int:
    """Prints what the ranks of the last attempt said, in order of time."""
    asked = _parser("logs")
    asked.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    options = read(asked, words)
    from loomtune import api

    for line in api.launched(options.folder).logs(Path(options.folder).absolute(), follow=options.follow):
        print(line, flush=options.follow)
    return 0


def cancel(words: Sequence[str]) -> int:
    """Ends the run; what was committed stays, and a new start goes on from it."""
    options = read(_parser("cancel"), words)
    from loomtune import api

    launcher, folder = api.launched(options.folder), Path(options.folder).absolute()
    launcher.cancel(folder)
    print(f"loomtune: {launcher.status(folder).state}", file=sys.stderr)
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    return parser(name, run=True, settings=False)
