"""A rehearsal in a process of its own, for those that import no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from loomtune.errors import UserError
from loomtune_plugins.planner.child import parsed
from rehearsing import planned


def test_the_trace_comes_back_and_a_misfit_is_told_with_its_cure() -> None:
    asked = [
        {"plan": planned("sharding=fsdp", *words).dump(), "processes": 2} for words in ((), ("sharding.tensor=4",))
    ]
    command = [sys.executable, "-m", "loomtune_plugins.planner.child", "--many"]
    lines = "".join(json.dumps(one) + "\n" for one in asked)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    first, second = map(json.loads, done.stdout.splitlines())
    trace = parsed(first)
    assert (trace.processes, trace.micro) == (2, 1)
    assert sum(trace.peak.causes.values()) == trace.peak.bytes > 0
    with pytest.raises(UserError, match="2 processes cannot be divided") as told:
        parsed(second)
    assert "launch a multiple of 4" in told.value.faults[0].cure


def test_who_asks_another_process_imports_no_torch() -> None:
    code = "import sys, loomtune_plugins.planner.child; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
