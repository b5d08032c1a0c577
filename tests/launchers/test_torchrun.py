"""The one place where torchrun's command and a job's environment are made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from loomtune.contracts import JobSpec
from loomtune_launchers import torchrun

RUN = Path("runs/one")


def job(**settings: Any) -> JobSpec:
    return JobSpec(run=RUN, arguments=(str(RUN),), **settings)


def test_one_process_is_started_by_itself() -> None:
    assert torchrun.command(job()) == (sys.executable, "-m", "loomtune.worker", "runs/one")


def test_several_are_started_by_torchrun_with_a_port_of_its_own_choice() -> None:
    command = torchrun.command(job(procs=3, restarts=2, grace=90))
    assert command[:5] == (sys.executable, "-m", "loomtune_launchers.agent", "runs/one", "auto")
    assert {"--standalone", "--nproc-per-node=3", "--max-restarts=2", "--shutdown-timeout=90"} <= set(command)
    assert command[-3:] == ("-m", "loomtune.worker", "runs/one"), "after the script torchrun takes no flag for its own"


def test_one_process_that_may_start_again_needs_torchrun() -> None:
    assert "loomtune_launchers.agent" in torchrun.command(job(restarts=1))


def test_nodes_meet_where_they_are_told_under_the_attempt_s_name() -> None:
    command = torchrun.command(job(procs=2, nodes=(1, 4)), torchrun.Meeting("first:29400", "job-7"), "/opt/python")
    assert command[:5] == ("/opt/python", "-m", "loomtune_launchers.agent", "runs/one", "job-7")
    met = {"--nnodes=1:4", "--rdzv-endpoint=first:29400", "--rdzv-id=job-7", "--rdzv-backend=c10d"}
    assert met <= set(command) and "--standalone" not in command


def test_one_process_a_node_still_meets_the_others() -> None:
    assert "loomtune_launchers.agent" in torchrun.command(job(nodes=(2, 2)), torchrun.Meeting("first:29400", "job-7"))


@pytest.mark.parametrize(
    "name",
    [
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "PET_NNODES",
        "SLURM_PROCID",
        "LOOMTUNE_PARENT",
        "LOOMTUNE_JOB",
        "LOOMTUNE_HEARTBEATS",
    ],
)
def test_what_an_outer_job_left_does_not_reach_the_inner_one(name: str) -> None:
    assert name not in torchrun.environment(job(), {name: "1"})


def test_the_rest_of_the_environment_stays_and_the_job_s_own_wins() -> None:
    outer = {"PATH": "/bin", "RANKING": "kept", "OMP_NUM_THREADS": "8"}
    found = torchrun.environment(job(environment={"OMP_NUM_THREADS": "2"}), outer)
    assert found == {
        "PATH": "/bin",
        "RANKING": "kept",
        "OMP_NUM_THREADS": "2",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def test_without_another_environment_it_is_this_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARP", "weft")
    monkeypatch.setenv("RANK", "3")
    found = torchrun.environment(job())
    assert found["WARP"] == "weft" and "RANK" not in found
