"""Templates that want to loop for ever, fill the memory, or reach Python's internals end soon, and as nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plugins.models import hostile_templates
from plugins.models.hostile_templates import COMPILING, ENDLESS, LARGE, REACHING

SECONDS, MEBIBYTES = 10, 500
QUICK = ("loops in loops", "doubled by tilde", "nested in lists", "a power", "a text times a number", "many additions")
QUICK += ("a strip of many looked for slowly", "characters of a loop", "characters as arguments", "a macro without end")


def tried(hostile: dict[str, str], folder: Path) -> dict[str, tuple[str, float, int]]:
    """What came of each template, in a process that has not 500 MiB more, in a thread other than its first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, hostile_templates.__file__, str(MEBIBYTES)]
    done = subprocess.run(
        program, input=json.dumps(hostile), text=True, capture_output=True, env=environment, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(hostile)
    return {name: (said, seconds, grown) for name, said, seconds, grown in lines}


def check(hostile: dict[str, str], folder: Path) -> None:
    for name, (said, seconds, grown) in tried(hostile, folder).items():
        assert said.startswith("refused"), f"{name}: {said}"
        assert seconds < SECONDS, f"{name}: {seconds} s"
        assert grown < MEBIBYTES, f"{name}: {grown} MiB"


def test_a_sample_of_those_that_never_end_or_grow(tmp_path) -> None:
    check({name: text for name, text in {**ENDLESS, **LARGE, **COMPILING}.items() if name in QUICK}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("hostile", [ENDLESS, LARGE, COMPILING], ids=["endless", "large", "compiling"])
def test_all_that_never_end_or_grow(hostile: dict[str, str], tmp_path) -> None:
    check(hostile, tmp_path)


def test_nothing_of_python_is_reached(tmp_path) -> None:
    for name, (said, seconds, _) in tried(REACHING, tmp_path).items():
        assert said.startswith("refused") or said == "wrote ", f"{name}: {said}"
        assert seconds < SECONDS
    assert not list(tmp_path.iterdir()), "nothing was executed"
