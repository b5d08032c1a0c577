"""Plain torchrun over a real network: two hosts in namespaces, with links that are cut and nodes that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from labs.netns import Nodes, nodes, wait_for
from loomtune_plugins.trackers import metrics
from runs.worlds import Outcome
from support import SHAPE, byte_tokenizer, write_rows

LOSS = 2e-6
LIMIT = 15.0
"""Seconds after which a collective gives up, where a test waits for that."""

PATIENCE = 240.0

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MODULE = ["-m", "loomtune.train"]
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

Command = Callable[[int], list[str]]
Alone = Callable[..., Outcome]


@pytest.fixture(scope="module")
def lab() -> Iterator[Nodes]:
    with nodes(2, os.environ.get("LAB_PREFIX", "labh"), os.environ.get("LAB_NET", "10.88.0")) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(lab: Nodes) -> Iterator[None]:
    yield
    for i in range(lab.count):
        lab.heal(i)
        lab.undrop(i)
        lab.kill(i)


def c10d(lab: Nodes, procs: int, number: str = "2") -> list[str]:
    group = [f"--nnodes={number}", f"--nproc-per-node={procs}", f"--rdzv-endpoint={lab.host(0)}:29500"]
    return [*TORCHRUN, *group, "--rdzv-backend=c10d", "--rdzv-id=mine"]


def both(lab: Nodes, command: Command, folder: Path, **environment: str) -> list[subprocess.Popen[bytes]]:
    """Starts a command on both nodes; `<folder>-<node>.log` gets what it says."""
    return [
        lab.run(i, command(i), environment, folder.with_name(f"{folder.name}-{i}.log"), folder.parent) for i in (0, 1)
    ]


def logs(folder: Path) -> str:
    return "\n".join(folder.with_name(f"{folder.name}-{i}.log").read_text() for i in (0, 1))


def reached(folder: Path, step: int, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + PATIENCE
    while not any(line["step"] >= step for line in metrics.read(folder)):
        assert time.monotonic() < until, f"step {step} was not reached\n{logs(folder)}"
        assert all(process.poll() is None for process in processes), logs(folder)
        time.sleep(0.05)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(folder)]


def result(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "result.json").read_text())
    return found


@pytest.mark.parametrize(
    ("way", "procs", "sharding"),
    [("c10d", 1, "fsdp"), ("c10d", 2, "fsdp"), ("static", 1, "ddp"), ("static", 2, "fsdp"), ("PET", 2, "ddp")],
)
def test_two_hosts_by_plain_torchrun_give_the_losses_of_one_process(
    lab: Nodes, tiny: list[str], alone: Alone, tmp_path: Path, way: str, procs: int, sharding: str
) -> None:
    settings, folder = [*tiny, "steps=12"], tmp_path / "run"
    script, environment = [*MODULE, *settings, f"sharding={sharding}", f"run.dir={folder}"], {}
    if way == "PET":
        names = {"NNODES": "2", "NPROC_PER_NODE": str(procs), "RDZV_BACKEND": "c10d", "RDZV_ID": "pet"}
        environment = {f"PET_{name}": value for name, value in names.items()}
        environment["PET_RDZV_ENDPOINT"] = f"{lab.host(0)}:29500"

    def command(i: int) -> list[str]:
        static = [f"--node-rank={i}", "--nnodes=2", f"--nproc-per-node={procs}", f"--master-addr={lab.host(0)}"]
        return [*{"c10d": c10d(lab, procs), "static": [*TORCHRUN, *static], "PET": TORCHRUN}[way], *script]

    processes = both(lab, command, folder, **environment)
    assert wait_for(*processes, patience=PATIENCE) == [0, 0], logs(folder)
    assert losses(folder) == pytest.approx(alone(*settings).series("loss"), rel=LOSS)
    assert len(losses(folder)) == 12 and lab.left(10) == {}


def test_an_elastic_run_goes_on_without_a_node_that_died_and_takes_in_the_one_that_comes_back(
    lab: Nodes, tiny: list[str], alone: Alone, tmp_path: Path
) -> None:
    settings, folder = [*tiny, "steps=400", "checkpoint.every=5"], tmp_path / "run"
    group = [*c10d(lab, 1, "1:2"), "--max-restarts=3", "--rdzv-conf=last_call_timeout=10"]
    command = [*group, *MODULE, *settings, "sharding=fsdp", f"run.dir={folder}"]
    first, second = both(lab, lambda i: command, folder, LOGLEVEL="INFO", **OWN_STORE)
    reached(folder, 8, (first, second))
    lab.kill(1)
    second.wait()
    reached(folder, len(losses(folder)) + 30, (first,))
    again = lab.run(1, command, {"LOGLEVEL": "INFO", **OWN_STORE}, tmp_path / "again.log", tmp_path)
    assert wait_for(first, again, patience=PATIENCE) == [0, 0], logs(folder)
    assert losses(folder) == pytest.approx(alone(*settings).series("loss"), rel=LOSS)
    rounds = [line.rpartition("=")[2] for line in logs(folder).splitlines() if "group_world_size=" in line]
    assert rounds == ["2", "1", "2", "2"], "both; the first alone; both again (and what the dead node said)"
    assert "restarts mostly fail" not in logs(folder) and lab.left(10) == {}


def test_hybrid_sharding_sends_less_than_half_as_many_bytes_between_the_hosts(lab: Nodes, tmp_path: Path) -> None:
    """Each host holds all parameters: only gradients, each of half of them, cross the link."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        large = SHAPE | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
        LlamaForCausalLM(LlamaConfig(**large)).save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    rows = [{"prompt": f"what is {i}?", "completion": f"it is {i * 7}"} for i in range(64)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = [f"model.path={tmp_path / 'model'}", "data=jsonl", f"data.path={data}", "optimizer.lr=1e-3", "steps=10"]
    sent, curves = [], []
    for name, more in (("fsdp", []), ("hsdp", ["sharding.replicate=2"])):
        folder, before = tmp_path / name, lab.sent(0) + lab.sent(1)
        script = [*MODULE, *settings, "tracker=[jsonl]", "sharding=fsdp", *more, f"run.dir={folder}"]
        processes = both(lab, lambda i, script=script: [*c10d(lab, 2), *script], folder)
        assert wait_for(*processes, patience=PATIENCE) == [0, 0], logs(folder)
        sent.append(lab.sent(0) + lab.sent(1) - before)
        curves.append(losses(folder))
    print(f"between the hosts: FSDP {sent[0] / 1e6:.0f} MB, HSDP {sent[1] / 1e6:.0f} MB, {sent[0] / sent[1]:.2f}x")
    assert sent[0] / sent[1] >= 2.5
    assert curves[0] == pytest.approx(curves[1], rel=LOSS)


@pytest.mark.parametrize(("how", "procs"), [("cut", 1), ("cut", 2), ("drop", 1)])
def test_a_link_that_is_cut_ends_both_hosts_in_time_with_the_cause_named(
    lab: Nodes, tiny: list[str], tmp_path: Path, how: str, procs: int
) -> None:
    folder = tmp_path / "run"
    script = [*MODULE, *tiny, "steps=1000000", "sharding=fsdp", f"run.dir={folder}"]
    limit = {"LOOMTUNE_TIMEOUT_MINUTES": str(LIMIT / 60)}
    processes = both(lab, lambda i: [*c10d(lab, procs), *script], folder, **limit)
    reached(folder, 3, processes)
    getattr(lab, how)(1)
    began = time.monotonic()
    wait_for(*processes, patience=PATIENCE)
    assert lab.left(2) == {} and time.monotonic() - began < LIMIT + 30
    cause = f"on {lab.host(1)} ({lab.address(1)}), which cannot be reached: no answer within LOOMTUNE_TIMEOUT_MINUTES"
    assert cause in result(folder)["error"] and result(folder)["status"] == "failed"
    assert cause in folder.with_name("run-0.log").read_text().rpartition("Root Cause")[2], "torchrun names it too"
    assert f"on {lab.host(0)} ({lab.address(0)}), which cannot be reached" in folder.with_name("run-1.log").read_text()
    print(f"{how}: both ended {time.monotonic() - began:.0f} s after it")


def test_a_cut_link_ends_the_agents_of_launchers_too(lab: Nodes, tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    prepared = "import sys; from loomtune import api; api.prepare(api.compose(sys.argv[1:], processes=2))"
    settings = [*tiny, "steps=1000000", "sharding=fsdp", f"run.dir={folder}"]
    subprocess.run([sys.executable, "-c", prepared, *settings], check=True)
    agent = [sys.executable, "-m", "loomtune_launchers.agent", str(folder), "once"]
    command = [*agent, *c10d(lab, 1)[len(TORCHRUN) :], "-m", "loomtune.worker", str(folder)]
    limit = {"LOOMTUNE_TIMEOUT_MINUTES": str(LIMIT / 60)}
    processes = both(lab, lambda i: command, folder, **limit, **OWN_STORE)
    reached(folder, 3, processes)
    lab.cut(1)
    began = time.monotonic()
    wait_for(*processes, patience=PATIENCE)
    assert lab.left(5) == {} and time.monotonic() - began < LIMIT + 30
    named = [f"lost rank {i} on {lab.host(i)} ({lab.address(i)}), which cannot be reached" for i in (0, 1)]
    assert any(cause in result(folder)["error"] for cause in named), "the agent takes the word of who said it first"


def test_a_node_that_dies_is_named_at_once(lab: Nodes, tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = [*MODULE, *tiny, "steps=1000000", "sharding=ddp", f"run.dir={folder}"]
    processes = both(lab, lambda i: [*c10d(lab, 1), *script], folder)
    reached(folder, 3, processes)
    lab.kill(1)
    wait_for(*processes, patience=PATIENCE)
    assert f"lost rank 1 on {lab.host(1)} ({lab.address(1)}): its connection was closed" in result(folder)["error"]
    assert lab.left(2) == {}


def test_a_process_that_hangs_ends_the_others_with_the_time_out(lab: Nodes, tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = [*MODULE, *tiny, "steps=1000000", "sharding=ddp", f"run.dir={folder}"]
    limit = {"LOOMTUNE_TIMEOUT_MINUTES": str(LIMIT / 60)}
    processes = both(lab, lambda i: [*c10d(lab, 1), "--shutdown-timeout=5", *script], folder, **limit)
    reached(folder, 3, processes)
    (hung,) = (pid for pid in lab.pids(1) if psutil.Process(pid).ppid() == processes[1].pid)
    os.kill(hung, signal.SIGSTOP)
    wait_for(*processes, patience=PATIENCE)
    assert "every host can be reached: no answer within LOOMTUNE_TIMEOUT_MINUTES=0.25" in result(folder)["error"]
    assert lab.left(2) == {}


def test_a_folder_that_one_host_does_not_share_is_refused_before_training(
    lab: Nodes, tiny: list[str], tmp_path: Path
) -> None:
    """The second host has a disk of its own at that path."""
    folder = tmp_path / "mounted" / "run"
    folder.parent.mkdir()
    script = [*MODULE, *tiny, "steps=3", "sharding=ddp", f"run.dir={folder}"]
    hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder.parent)]

    def command(i: int) -> list[str]:
        return [*(hidden if i else []), *c10d(lab, 1), *script]

    processes = [
        lab.run(i, command(i), {"LOOMTUNE_TIMEOUT_MINUTES": "0.5"}, tmp_path / f"run-{i}.log", tmp_path) for i in (0, 1)
    ]
    wait_for(*processes, patience=PATIENCE)
    for i in (0, 1):
        said = (tmp_path / f"run-{i}.log").read_text()
        assert f"{lab.host(1)} does not see {folder} as other hosts do" in said, said
        assert "set run.dir to a folder that all nodes share" in said
    assert not (folder / "metrics.jsonl").exists() and lab.left(2) == {}
