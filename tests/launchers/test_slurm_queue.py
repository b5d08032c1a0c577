"""What Slurm's own commands say of a job, as sites and users have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchers.slurm_side import commands
from loomtune.errors import UserError
from loomtune_launchers.slurm import queue
from loomtune_launchers.slurm.queue import Job


def test_an_outer_job_is_not_taken_for_options_of_ours() -> None:
    outer = {"SLURM_CONF": "/etc/x", "SLURM_MEM_PER_NODE": "1", "SLURM_JOB_ID": "7", "SBATCH_ACCOUNT": "a", "HOME": "/"}
    assert queue.environment(outer) == {"SLURM_CONF": "/etc/x", "SBATCH_ACCOUNT": "a", "HOME": "/"}


def test_the_state_is_asked_of_the_queue_and_then_of_the_accounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    commands(tmp_path, monkeypatch, squeue="echo 'PENDING|Resources'", sacct="exit 1")
    assert Job("7").state() == ("PENDING", "Resources") and Job("7").active()
    commands(tmp_path, monkeypatch, squeue=gone, sacct="echo 'CANCELLED by 0|None'")
    assert Job("7").state() == ("CANCELLED", "None") and not Job("7").active()
    commands(tmp_path, monkeypatch, squeue=gone, sacct="echo disabled >&2; exit 1")
    assert Job("7").state() == ("", "") and not Job("7").active()
    commands(tmp_path, monkeypatch, squeue="echo 'Unable to contact slurm controller' >&2; exit 1")
    assert Job("7").state()[0] == "UNKNOWN" and Job("7").active(), "silence is no end"


@pytest.mark.parametrize(
    ("times", "preempted"),
    [
        ("2026-11-22T19:43:48   2026-11-22T19:43:52  ", True),
        ("2026-11-22T19:43:48   N/A  ", False),
        ("2026-11-22T19:43:48   2026-11-22T18:00:00  ", False),
        ("", False),
    ],
)
def test_a_preemption_counts_for_the_start_that_it_ends(
    times: str, preempted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(tmp_path, monkeypatch, squeue=f"echo '{times}'")
    assert Job("7").preempted() is preempted


def test_an_array_is_active_while_an_item_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(tmp_path, monkeypatch, squeue="echo 'RUNNING|None'; echo 'COMPLETED|None'")
    assert Job("7").active()


@pytest.mark.parametrize(
    ("printed", "job"),
    [
        ("12\n", Job("12")),
        ("welcome to 3 clusters\n12;far\nyour project has 7 hours left\n", Job("12", "far")),
    ],
)
def test_a_job_is_found_in_what_a_wrapper_of_sbatch_prints(printed: str, job: Job) -> None:
    assert Job.parse(printed) == job


def test_an_sbatch_that_makes_no_job_is_told() -> None:
    with pytest.raises(UserError, match="did not say which job it made, but 'to start at noon'"):
        Job.parse("to start at noon\n")


def test_the_name_of_a_cluster_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(tmp_path, monkeypatch, squeue="echo 'CLUSTER: far'; echo 'RUNNING|None'")
    assert Job("7", "far").state() == ("RUNNING", "None")
    commands(tmp_path, monkeypatch, squeue="echo 'CLUSTER: far'", sacct="exit 1")
    assert Job("7", "far").state() == ("", "")


def test_a_filter_of_the_users_own_hides_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filtered = '[ -z "$SQUEUE_PARTITION" ] && echo "RUNNING|None"; exit 0'
    commands(tmp_path, monkeypatch, squeue=filtered, sacct="exit 1")
    monkeypatch.setenv("SQUEUE_PARTITION", "elsewhere")
    assert Job("7").active()
