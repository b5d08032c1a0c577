"""`loomtune train` and `loomtune resume`: thin layers over `loomtune.api`."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune.catalogue import installed
from loomtune.errors import Preempted, UserError
from loomtune.plan import estimates
from loomtune_plugins.commands.words import parser, read

if TYPE_CHECKING:
    from loomtune.api import Result
    from loomtune.contracts import Launcher, Submission


_MISTAKE = re.compile(r"(rank \d+ on \S+: )?UserError: ")
"""How a result begins that ended by a mistake of the user's, which ranks alone could find."""


def train(words: Sequence[str]) -> int:
    """Trains, or shows what training would be."""
    asked = parser("train")
    asked.add_argument(
        "--dry-run", action="store_true", help="show every setting and where it came from; start nothing"
    )
    elsewhere = "with --dry-run: as on N processes elsewhere, without asking for files"
    asked.add_argument("--world", type=int, metavar="N", help=elsewhere)
    several = (
        "a run for each combination of values: objective=sft,dpo seed=0,1,2; hydra.* keys say how (docs/sweeps.md)"
    )
    asked.add_argument("-m", "--multirun", action="store_true", help=several)
    asked.add_argument("--config-dir", action="append", default=[], help="a folder of your own Hydra configs")
    options = read(asked, words)
    if options.multirun:
        return _sweep(options)
    if options.dry_run:
        return _dry_run(options)
    if options.world is not None:
        raise UserError.of(f"--world {options.world} is a world that is not here", "add --dry-run, or leave it out")
    from loomtune import api  # only now: it brings Hydra along, for which no help waits

    return _ended(api.train(options.overrides, options.config_dir))


def resume(words: Sequence[str]) -> int:
    """Goes on with a run, or with a sweep."""
    options = read(parser("resume", run=True), words)
    if (Path(options.folder) / "sweep.json").is_file():
        from loomtune_plugins.commands.sweeps.command import again

        return again(Path(options.folder), options.overrides)
    from loomtune import api

    return _ended(api.resume(options.folder, options.overrides))


def _sweep(options: argparse.Namespace) -> int:
    from loomtune_plugins.commands.sweeps.command import shown, sweep

    if options.world is not None:
        raise UserError.of("--world is for a dry run of one run", "leave it out, or leave -m out")
    return (shown if options.dry_run else sweep)(options.overrides, options.config_dir)


def _ended(result: Result) -> int:
    if result.status == "submitted":
        run = shlex.quote(str(result.folder))
        print(f"loomtune: submitted; follow it by `loomtune logs -f {run}` and `loomtune status {run}`")
    if result.status == "failed" or result.error:
        print(f"loomtune: the run {result.status} at step {result.step}: {result.error}", file=sys.stderr)
        return UserError.exit_code if _MISTAKE.match(result.error or "") else 1
    return Preempted.exit_code if result.status == "preempted" else 0


def _dry_run(options: argparse.Namespace) -> int:
    from loomtune import api
    from loomtune.compose import explain

    elsewhere = options.world is not None
    if elsewhere and options.world < 1:
        raise UserError.of(f"--world {options.world} has no process", "name at least 1")
    plan = api.compose(options.overrides, options.config_dir, options.world or 0)
    launcher: Launcher = plan.build(installed(), "launcher")
    api.warn(api.check(plan, simulated=elsewhere or launcher.elsewhere))
    for key, value, origin in explain(options.overrides, options.config_dir):
        print(f"{key}={value if str(value).isprintable() else repr(value)}  # {origin}")
    for foretold in estimates(plan, installed()):
        print(f"estimate: {foretold.subject} {foretold.value:g} {foretold.unit} ({foretold.reasoning})")
    if elsewhere:
        if not plan.build(installed(), "model").at_hand():
            print("not asked: whether the model can be laid out so, because its config is not at hand")
        return 0
    folder = Path(plan.root.run.dir or "RUN")
    _show(folder, launcher.render(launcher.spec(folder, plan.processes, plan.overrides)))
    return 0


def _show(folder: Path, submission: Submission) -> None:
    """What would be written, and run, quoted as a shell would take it."""
    for name, text in submission.files.items():
        print(f"would write: {folder / name}", *text.splitlines(), sep="\n    ")
    for name, value in submission.environment.items():
        print(f"would set: {name}={shlex.quote(value)}")
    for command in submission.commands:
        print(f"would run: {shlex.join(command)}")
    for line in submission.input.splitlines():
        print(f"would send: {line}")
