"""What runs where a job is elsewhere: torchrun, whose ranks get what was typed and whose end can be told apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loomtune.contracts import JobSpec
from loomtune_launchers import elsewhere, there
from loomtune_launchers.settings import GroupSettings
from support import ROOT

NASTY = """ a 'b' "c" $(id) $$(id) ${local_rank} $HOME `id` ; & | > \\ \n\ttwo: lines # é"""
PLACE = {"PET_STANDALONE": "1", "PET_NPROC_PER_NODE": "1"}
PATHS = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "core"), str(ROOT / "launchers")])


def given(folder: Path) -> list[str]:
    """What a rank that writes down what it is told is started by."""
    job = JobSpec(run=folder, module="launchers.witness", arguments=(NASTY,))
    return list(elsewhere.command(job, str(folder), sys.executable, "")[3:])


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`there` in a process of its own; PET_ variables as an engine would set them."""
    place = {
        **os.environ,
        **elsewhere.environment(GroupSettings()),
        "PYTHONPATH": PATHS,
        "WITNESS_FOLDER": str(folder),
        **PLACE,
        **environment,
    }
    words = [sys.executable, "-m", there.__name__, *arguments]
    return subprocess.run(words, env=place, capture_output=True, text=True, timeout=300, check=False)


def test_ranks_get_what_was_typed_and_the_first_node_prints_the_result(tmp_path: Path) -> None:
    done = start(tmp_path, *given(tmp_path), NASTY=NASTY, WITNESS_STATUS="completed")
    assert done.returncode == 0, done.stderr
    heard = json.loads((tmp_path / "rank-0.json").read_text())
    assert heard["arguments"] == [NASTY]
    assert heard["environment"]["NASTY"] == NASTY
    assert "[rank 0] heard" in done.stdout.splitlines()
    found = elsewhere.result(done.stdout.splitlines())
    assert found == {"status": "completed", "step": 3, "metrics": {}, "error": None}


@pytest.mark.parametrize(("code", "status"), [(75, "preempted"), pytest.param(2, "", marks=pytest.mark.slow)])
def test_it_ends_as_the_rank_that_failed_first(code: int, status: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"status": "failed", "step": 1, "metrics": {}, "error": "old"}))
    packed = there.pack(given(tmp_path), {"NASTY": NASTY, "WITNESS_CODE": str(code)})
    done = start(tmp_path, LOOMTUNE_PACKED=packed, WITNESS_STATUS=status)
    assert done.returncode == code, done.stderr
    heard = json.loads((tmp_path / "rank-0.json").read_text())
    assert heard["arguments"] == [NASTY]
    assert heard["environment"]["NASTY"] == NASTY
    assert "LOOMTUNE_PACKED" not in heard["environment"]
    found = elsewhere.result(done.stdout.splitlines())
    assert found == ({"status": status, "step": 3, "metrics": {}, "error": None} if status else None), "not the old one"


def test_what_is_packed_needs_no_quotes() -> None:
    packed = there.pack([NASTY], {"A": NASTY})
    assert set(packed) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")
