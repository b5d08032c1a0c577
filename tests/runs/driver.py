"""One rank of a world that stays joined and runs one plan after another: `python driver.py`, jobs on stdin.

Starting processes and importing torch takes seconds; a plan of this size takes a fraction of one. A job is a line with the
run's folder; the answer is a line with its result, or with the error that ended it. Everything else that is printed goes
to stderr.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from loomtune import world as worlds
from loomtune.plan import Plan
from loomtune.worker import execute


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    world = worlds.join()
    for line in sys.stdin:
        answers.write(json.dumps(answer(Path(line.strip()), world)) + "\n")
        gc.collect()
    worlds.leave()


def answer(folder: Path, world: worlds.World) -> dict[str, Any]:
    try:
        return {"result": execute(Plan.load(folder), folder, world)}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


main()
