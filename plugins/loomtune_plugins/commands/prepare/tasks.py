"""Carrying out one task, in whatever process: what it writes gets its name when it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loomtune.errors import Fault, LoomtuneError, RunFailed, UserError
from loomtune_plugins.commands.prepare import comparing, deciding, equality, meeting, reading, refining, writing
from loomtune_plugins.commands.prepare.job import opened
from loomtune_plugins.commands.prepare.parts import committed

_INTO_A_FOLDER = {
    "refine": refining.refine,
    "equal": equality.equal,
    "keys": meeting.keys,
    "meet": meeting.meet,
    "compare": comparing.compare,
    "each": comparing.each,
    "decide": deciding.decide,
    "write": writing.write,
    "dropped": writing.dropped,
}


def carry_out(task: dict[str, Any]) -> dict[str, Any]:
    """Does a task, which says in plain data what and where; a place that is there is done already.

    Gives what went wrong as plain data too, since exceptions do not pass unchanged from one process to another.
    """
    work, place = opened(task["folder"]), Path(task["folder"]) / task["place"]
    try:
        if place.is_dir():
            return {}
        if task["do"] == "read":
            reading.read(work, place, task)
        else:
            with committed(place) as folder:
                _INTO_A_FOLDER[task["do"]](work, task, folder)
    except UserError as error:
        return {"faults": [[fault.what, fault.cure] for fault in error.faults]}
    except LoomtuneError as error:
        return {"failed": str(error)}
    except (OSError, MemoryError) as error:
        told = f"{type(error).__name__}: {error}"
        return {"failed": str(Fault(told, "make room; the same command then goes on from where it was"))}
    return {}


def raise_for(answer: dict[str, Any]) -> None:
    """Raises what a task, carried out elsewhere, raised."""
    if "faults" in answer:
        raise UserError(*(Fault(what, cure) for what, cure in answer["faults"]))
    if "failed" in answer:
        raise RunFailed(answer["failed"])
