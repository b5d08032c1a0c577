"""torchrun as launchers start it: a failed rank is named, heard, and answered for by its own exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PATIENCE = 240.0

RANK = """
import os, sys, time
rank = int(os.environ["RANK"])
print(f"this is rank {rank}", file=sys.stderr, flush=True)
if rank == 1 and sys.argv[1] != "well":
    print("the warp is torn", file=sys.stderr, flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), 9)
    sys.exit(7)
if sys.argv[1] != "well":
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("well", 0, ""),
        ("failing", 7, "rank 1 ended first, with exit code 7"),
        pytest.param("killed", 1, "rank 1 ended first, with signal 9", marks=pytest.mark.slow),
    ],
)
def test_the_rank_that_failed_first_is_heard(how: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = ["--standalone", "--nproc-per-node=2", "--redirects=1:3", str(tmp_path / "rank.py"), how]
    command = [sys.executable, "-m", "loomtune_launchers.agent", str(tmp_path / "logs"), *torchrun]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert "this is rank 0" in done.stderr, "the first rank speaks on the terminal"
    assert ("the warp is torn" in done.stderr) is (how != "well")
    (log,) = (tmp_path / "logs").rglob("1/stderr.log")
    assert log.read_text().startswith("this is rank 1")
    assert (f"all of it is in {log}" in done.stderr) is (how != "well")
