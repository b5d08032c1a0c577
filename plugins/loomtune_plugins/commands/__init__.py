"""Commands of the command line: each a function of the words behind its name, over what `loomtune.api` does."""

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.offers import Command
from loomtune_plugins.commands.plan.preflight import estimate, foresee

__all__ = ["commands", "estimate", "foresee"]

HERE = "loomtune_plugins.commands"


@hookimpl
def commands() -> Sequence[Command]:
    """Gives the built-in commands."""
    return (
        Command("inspect", f"{HERE}.inspect.command:inspect", "show rows as a model will see them, and their figures"),
        Command("prepare", f"{HERE}.prepare.command:prepare", "make raw files into rows that can be trusted"),
        Command("plan", f"{HERE}.plan.command:plan", "foretell memory, time and cost of a run, and what would fit"),
        Command("train", f"{HERE}.train:train", "train a model; alone, it teaches the shipped one to write SQL"),
        Command("resume", f"{HERE}.train:resume", "go on with a run, under any sharding and world size"),
        Command("status", f"{HERE}.launched:status", "say what a run is doing, wherever it was launched"),
        Command("logs", f"{HERE}.launched:logs", "show what all ranks of a run said, in order of time; -f follows"),
        Command("cancel", f"{HERE}.launched:cancel", "end a run politely, then hard, so that nothing starts it again"),
        Command("evaluate", f"{HERE}.ended:evaluate", "measure a run's checkpoint with its evaluators"),
        Command("chat", f"{HERE}.chat:chat", "talk to a run's model in the terminal"),
        Command("export", f"{HERE}.ended:export", "write a run's model, or its adapter, as others open it"),
        Command("report", f"{HERE}.ended:report", "write RUN/report.html anew from the run's files"),
        Command("compare", f"{HERE}.compare.command:compare", "lay runs, or a sweep's, beside each other"),
        Command("plugins", f"{HERE}.plugins:plugins", "list what can be chosen, who brought it, and its settings"),
        Command("matrix", f"{HERE}.matrix:matrix", "show which objectives, adapters and shardings go together"),
        Command("doctor", f"{HERE}.doctor.command:doctor", "ask every node whether a large run would go well there"),
    )
