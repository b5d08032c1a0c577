"""A run on a cluster, by kubectl: started, looked at, ended. A stand-in answers as kubectl does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launchers.tools import Tool
from loomtune.errors import UserError
from loomtune_launchers.kubernetes.kubernetes import Kubernetes
from loomtune_launchers.kubernetes.settings import KubernetesSettings

KIND = "trainjobs.trainer.kubeflow.org"
RESULT = {"status": "completed", "step": 9, "metrics": {"loss": 0.5}, "error": None}


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    return Tool("kubectl", tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path: Path, kubectl: Tool) -> Path:
    """The folder of a run that was started."""
    folder = tmp_path / "mine"
    assert launcher().submit(launcher().spec(folder, 2)) == "loomtune-mine"
    return folder


def launcher(**settings: Any) -> Kubernetes:
    return Kubernetes(KubernetesSettings(**{"volume": "models", "nodes": 2, **settings}))


def job(condition: str = "", ready: int = 0, message: str = "") -> str:
    conditions = [{"type": condition, "status": "True", "message": message}] if condition else []
    part = {"name": "node", "ready": ready, "active": 1, "failed": 0, "succeeded": 0, "suspended": 0}
    return json.dumps({"status": {"conditions": conditions, "jobsStatus": [part]}})


def test_what_was_rendered_is_written_and_created(run: Path, kubectl: Tool) -> None:
    assert kubectl.calls == [["create", "-f", str(run / "job.yaml")]]
    assert (run / "job.yaml").read_text() == launcher().render(launcher().spec(run, 2)).files["job.yaml"]


def test_rendering_touches_nothing(tmp_path: Path, kubectl: Tool) -> None:
    launcher().render(launcher().spec(tmp_path / "mine", 2))
    assert not (tmp_path / "mine").exists()
    assert kubectl.calls == []


@pytest.mark.parametrize(
    ("said", "state", "detail"),
    [
        (job(), "pending", ""),
        (job(ready=1), "running", ""),
        (job("Complete"), "completed", ""),
        (job("Failed", message="node lost"), "failed", "node lost"),
        ("", "unknown", "the cluster has no such job, or no more"),
    ],
)
def test_the_cluster_says_how_a_run_stands(said: str, state: str, detail: str, run: Path, kubectl: Tool) -> None:
    kubectl.answer("get", KIND, "loomtune-mine", says=said)
    found = launcher().status(run)
    assert (found.state, found.detail) == (state, detail)


def test_a_jobset_says_so_in_its_own_words(tmp_path: Path, kubectl: Tool) -> None:
    jobset, run = launcher(kind="jobset", image="me/loomtune", requeues=2), tmp_path / "mine"
    jobset.submit(jobset.spec(run, 2))
    part = {"name": "node", "ready": 1}
    going = {"status": {"restarts": 1, "replicatedJobsStatus": [part]}}
    kubectl.answer("get", "jobsets.jobset.x-k8s.io", says=json.dumps(going))
    assert (jobset.status(run).state, jobset.status(run).detail) == ("running", "start 2")
    going["status"]["conditions"] = [{"type": "Completed", "status": "True"}]
    kubectl.answer("get", "jobsets.jobset.x-k8s.io", says=json.dumps(going))
    assert jobset.status(run).state == "completed"


def test_an_ended_run_stands_as_its_result_says(run: Path, kubectl: Tool) -> None:
    kubectl.answer("get", says=job("Failed", message="backoff limit"))
    preempted = {**RESULT, "status": "preempted"}
    kubectl.answer(
        "logs", says=f"[rank 0] step 9\nloomtune-result {json.dumps(RESULT)}\nloomtune-result {json.dumps(preempted)}"
    )
    assert launcher().result(run) == preempted, "the last start's"
    assert (launcher().status(run).state, launcher().status(run).detail) == ("preempted", "step 9")
    assert "batch.kubernetes.io/job-completion-index=0" in " ".join(kubectl.calls[-1])


def test_a_run_that_goes_on_is_not_started_twice(run: Path, kubectl: Tool) -> None:
    kubectl.answer("get", says=job(ready=1))
    with pytest.raises(UserError, match="loomtune cancel"):
        launcher().submit(launcher().spec(run, 2))
    assert [call[0] for call in kubectl.calls] == ["create", "get"]


def test_an_ended_job_makes_way_for_the_run_to_go_on(run: Path, kubectl: Tool) -> None:
    (run / "cancelled").touch()
    kubectl.answer("get", says=job("Failed"))
    launcher().submit(launcher().spec(run, 2))
    assert [call[0] for call in kubectl.calls] == ["create", "get", "delete", "create"]
    assert not (run / "cancelled").exists()


def test_logs_of_all_pods_are_one_in_order_of_time(run: Path, kubectl: Tool) -> None:
    kubectl.answer(
        "logs",
        says="[pod/loomtune-mine-node-0-1-x7k2p/node] 2026-11-22T20:00:02.5Z [rank 1] second\n"
        "[pod/loomtune-mine-node-0-0-abcde/node] 2026-11-22T20:00:01.5Z [rank 0] first: \x1b[1mbold\x1b[0m\n"
        "some warning of kubectl",
    )
    assert list(launcher().logs(run)) == [
        "2026-11-22T20:00:01.5Z node-0-0 [rank 0] first: bold",
        "2026-11-22T20:00:02.5Z node-0-1 [rank 1] second",
    ]
    assert "--max-log-requests=2" in kubectl.calls[-1]


def test_logs_are_followed_until_the_run_is_over_and_nothing_is_told_twice(
    run: Path, kubectl: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = "[pod/loomtune-mine-node-0-0-abcde/node] 2026-11-22T20:00:01.5Z [rank 0] first"
    second = "[pod/loomtune-mine-node-0-0-fghij/node] 2026-11-22T20:00:01.7Z [rank 0] again"
    kubectl.answer("get", says=job(ready=1))
    kubectl.answer("logs", "-f", says=first)
    asleep = iter(
        [
            lambda: kubectl.answer("logs", "-f", "--since-time=2026-11-22T20:00:01Z", says=f"{first}\n{second}"),
            lambda: kubectl.answer("get", says=job("Complete")),
        ]
    )
    monkeypatch.setattr("loomtune_launchers.kubernetes.kubernetes.time.sleep", lambda seconds: next(asleep)())
    said = list(launcher().logs(run, follow=True))
    assert [line.rpartition(" ")[2] for line in said] == ["first", "again"]


def test_following_a_run_that_is_over_tells_what_was_said(run: Path, kubectl: Tool) -> None:
    kubectl.answer("get", says=job("Complete"))
    kubectl.answer("logs", says="[pod/loomtune-mine-node-0-0-abcde/node] 2026-11-22T20:00:01.5Z [rank 0] the end")
    assert list(launcher().logs(run, follow=True)) == ["2026-11-22T20:00:01.5Z node-0-0 [rank 0] the end"]


def test_cancelling_deletes_the_job_and_waits_for_its_pods(run: Path, kubectl: Tool) -> None:
    launcher().cancel(run)
    deleted = ["delete", KIND, "loomtune-mine", "--ignore-not-found", "--cascade=foreground", "--wait"]
    assert kubectl.calls[-1] == [*deleted, "--timeout=165s"], "pods of a lost node would stay for ever"
    assert launcher().status(run).state == "cancelled"


def test_cancelling_what_is_over_takes_nothing_away(run: Path, kubectl: Tool) -> None:
    kubectl.answer("get", says=job("Complete"))
    launcher().cancel(run)
    assert "delete" not in [call[0] for call in kubectl.calls]
    assert launcher().status(run).state == "completed"


def test_a_run_is_asked_after_where_it_was_made(tmp_path: Path, kubectl: Tool) -> None:
    made = launcher(context="east", namespace="team", nodes=3)
    made.submit(made.spec(tmp_path / "mine", 3))
    list(launcher().logs(tmp_path / "mine"))
    assert kubectl.calls[-1][:3] == ["--context=east", "--namespace=team", "logs"]
    assert "--max-log-requests=3" in kubectl.calls[-1]
    launcher(namespace="other").cancel(tmp_path / "mine")
    assert [call[:2] for call in kubectl.calls[-2:]] == [["--context=east", "--namespace=team"]] * 2


def test_a_submission_that_is_broken_off_can_be_cancelled(
    tmp_path: Path, kubectl: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(words: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("loomtune_launchers.elsewhere.call", interrupted)
        launcher().submit(launcher().spec(tmp_path / "mine", 2))
    launcher().cancel(tmp_path / "mine")
    assert kubectl.calls[-1][:3] == ["delete", KIND, "loomtune-mine"]


def test_why_there_are_no_logs_is_told_once(run: Path, kubectl: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    kubectl.answer("logs", says="Error from server (BadRequest): container is waiting to start: ErrImagePull", code=1)
    asked = launcher()
    assert [*asked.logs(run), *asked.logs(run)] == []
    assert capsys.readouterr().err.count("ErrImagePull") == 1


def test_what_kubectl_refuses_is_told_in_its_words(tmp_path: Path, kubectl: Tool) -> None:
    kubectl.answer("create", says='error: namespaces "team" not found', code=1)
    with pytest.raises(UserError, match='namespaces "team" not found'):
        launcher(namespace="team").submit(launcher().spec(tmp_path / "mine", 2))
    assert not (tmp_path / "mine" / "launcher.json").exists(), "no job, no record"


def test_a_missing_kubectl_is_told_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install kubectl"):
        launcher().submit(launcher().spec(tmp_path / "mine", 2))


def test_a_run_of_another_launcher_is_refused(tmp_path: Path, kubectl: Tool) -> None:
    with pytest.raises(UserError, match="was not started by launcher=kubernetes"):
        launcher().status(tmp_path)
