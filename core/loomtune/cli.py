"""The command line: which commands there are, and their exit codes. The commands themselves are plugins'."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

from loomtune import __version__
from loomtune.catalogue import imported, installed
from loomtune.errors import LoomtuneError, UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the `loomtune` command. Exit codes as in `loomtune.errors`."""
    try:
        options, words = _parser().parse_known_args(arguments)
        code = options.run()(words)
        sys.stdout.flush()
        sys.exit(code)
    except LoomtuneError as error:
        print(f"loomtune: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells have it
    except BrokenPipeError:  # the reader of our output left, as `head` does; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    """Of a command's name alone: it reads what follows by itself."""
    parser = argparse.ArgumentParser(prog="loomtune", description="Fine-tuning where every part is a plugin.")
    parser.add_argument("--version", action="version", version=f"loomtune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, source in installed().commands:
        asked = f"the command {command.name} of {source}"
        if command.name in commands.choices:
            cure = "uninstall it, or let in only the third parties that you want: LOOMTUNE_PLUGINS=<names>"
            raise UserError.of(f"{asked} is there already", cure)
        one = commands.add_parser(command.name, help=command.summary, add_help=False)
        one.set_defaults(run=partial(imported, command.run, asked, source))
    return parser


if __name__ == "__main__":
    main()
