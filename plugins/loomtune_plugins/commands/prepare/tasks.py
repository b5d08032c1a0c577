"""Carrying out one task, in whatever process: what it writes gets its name when it is whole."""

from __future__ import annotations

import errno
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
    "page": writing.page,
}


def carry_out(task: dict[str, Any]) -> dict[str, Any]:
    """Does a task, which says in plain data what and where; a place that is there is done already.

    Gives what went wrong as plain data too, since exceptions do not pass unchanged from one process to another.
    """
    work, place = opened(task["folder"]), Path(task["folder"]) / task["place"]
    try:
        if task["do"] == "read" and not place.is_dir():
            reading.read(work, place, task)
        elif not place.is_dir():
            with committed(place) as folder:
                _INTO_A_FOLDER[task["do"]](work, task, folder)
    except UserError as error:
        return {"faults": [[fault.what, fault.cure] for fault in error.faults]}
    except (LoomtuneError, SystemExit, OSError, MemoryError) as error:
        return {"failed": _told(task, error)}
    return {}


def _told(task: dict[str, Any], error: BaseException) -> str:
    if isinstance(error, OSError):
        return str(disk_fault(error, Path(task["folder"]).parents[1]))
    if isinstance(error, MemoryError):
        return str(Fault(f"MemoryError: {error}", "--workers N asks for fewer processes; the same command goes on"))
    if isinstance(error, SystemExit):  # a plugin's; it would end the process, and the message with it
        told = f"a plugin ended the process while it was to {task['do']}: SystemExit: {error}"
        return str(Fault(told, "tell its author, or leave it out"))
    return str(error)


def disk_fault(error: OSError, place: Path) -> Fault:
    """What is wrong with the disk below a folder."""
    on = "then the same command goes on from where it was"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Fault(f"no room is left in {place}: {error}", f"make room there; {on}")
    return Fault(f"{type(error).__name__}: {error}", f"see that {place} can be written into; {on}")


def raise_for(answer: dict[str, Any]) -> None:
    """Raises what a task, carried out elsewhere, raised."""
    if "faults" in answer:
        raise UserError(*(Fault(what, cure) for what, cure in answer["faults"]))
    if "failed" in answer:
        raise RunFailed(answer["failed"])
