"""`loomtune doctor` on three nodes: what is wrong with one of them is named with its name, and the others are not."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from labs.netns import Nodes, nodes, wait_for
from labs.test_ssh import listed, servers

COUNT = 3
PREFIX, NET = "labg", "10.87.0"
PORT = "29511"
MODULE = "loomtune_plugins.commands.doctor.rank"
SLOW = 50e6 / 8
"""Bytes a second of the limited node's link."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Nodes]:
    with nodes(COUNT, PREFIX, NET) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_stays(lab: Nodes) -> Iterator[None]:
    yield
    assert lab.left(patience=20) == {}


def start(lab: Nodes, rank: int, folder: Path, *words: str, mounted: bool = False, **environment: str) -> Any:
    """A rank as a scheduler without torchrun would start it. mounted: over the folder lies one of the node's own."""
    who = {"RANK": str(rank), "WORLD_SIZE": str(COUNT), "LOCAL_RANK": "0", "GROUP_RANK": str(rank)}
    command = [sys.executable, "-m", MODULE, str(folder), "quick", *words]
    if mounted:
        command = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder), *command]
    meeting = {"MASTER_ADDR": lab.host(0), "MASTER_PORT": PORT}
    return lab.run(rank, command, {**who, **meeting, **environment}, folder.with_suffix(f".{rank}.log"))


def answer(folder: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((folder / "doctor.json").read_text())
    return said


def faults(said: Mapping[str, Any]) -> list[str]:
    return [finding["what"] for finding in said["findings"] if finding["level"] == "fault"]


def torchrun(lab: Nodes, folder: Path, count: int, *words: str) -> list[int]:
    """Plain torchrun on so many nodes, which begins without those that do not come; exit codes."""
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint={lab.host(0)}:{PORT}", f"--rdzv-id={folder.name}")
    group = (f"--nnodes=1:{COUNT}", "--nproc-per-node=1", *rendezvous, "--rdzv-conf=last_call_timeout=15")
    command = [sys.executable, "-m", "torch.distributed.run", *group, "-m", MODULE, str(folder), "quick", *words]
    started = [lab.run(i, command, log=folder.with_suffix(f".{i}.log")) for i in range(count)]
    return wait_for(*started)


def test_of_three_nodes_the_slow_one_is_named_and_a_fault(lab: Nodes, tmp_path: Path) -> None:
    lab.limit(2, "50mbit")
    try:
        codes = torchrun(lab, tmp_path / "doctor", COUNT)
    finally:
        lab.unlimit(2)
    said = answer(tmp_path / "doctor")
    (fault,) = faults(said)
    assert fault.startswith(f"slow network: {lab.host(2)} (")
    assert codes[0] == 1
    assert sorted(line["nodes"] for line in said["pairs"]) == [[0, 1], [0, 2], [1, 2]]
    assert said["nodes"][lab.host(2)]["bandwidth"] == pytest.approx(SLOW, rel=0.6)
    assert said["nodes"][lab.host(0)]["bandwidth"] > 3 * SLOW
    assert said["nodes"][lab.host(1)]["bandwidth"] > 3 * SLOW


def test_another_plugin_and_another_folder_are_named_with_their_nodes(lab: Nodes, tmp_path: Path) -> None:
    folder, site = tmp_path / "doctor", tmp_path / "site"
    folder.mkdir()
    about = site / "acme_tuner-1.2.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-tuner\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text("[loomtune]\nacme = acme_tuner\n")
    (site / "acme_tuner.py").write_text('"""A plugin that offers nothing."""\n')
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    ranks = [
        start(lab, 0, folder),
        start(lab, 1, folder, PYTHONPATH=path),
        start(lab, 2, folder, mounted=True),
    ]
    assert wait_for(*ranks)[0] == 1
    plugin, apart = sorted(faults(answer(folder)))
    assert plugin == f"plugin acme is absent on most ranks, but acme-tuner 1.2 on {lab.host(1)}"
    assert f"one folder for all: {lab.host(2)} and the other nodes" in apart


def test_a_sound_cluster_is_sound_and_its_clocks_agree(lab: Nodes, tmp_path: Path) -> None:
    folder = tmp_path / "doctor"
    assert wait_for(*(start(lab, rank, folder) for rank in range(COUNT))) == [0, 0, 0]
    said = answer(folder)
    assert said["sound"]
    for offset, uncertainty in (of["clock"] for of in said["nodes"].values()):  # one machine's clock
        assert abs(offset) <= 2 * uncertainty + 1e-4


def test_a_rank_that_does_not_come_is_named_and_the_others_are_examined(lab: Nodes, tmp_path: Path) -> None:
    folder = tmp_path / "doctor"
    codes = wait_for(*(start(lab, rank, folder, "seconds=60") for rank in range(COUNT - 1)))
    assert codes == [1, 0]
    said = answer(folder)
    assert faults(said) == ["rank 2 of node 2 did not come: not there after 15 s"]
    assert [line["nodes"] for line in said["pairs"]] == [[0, 1]]


def test_a_node_that_torchrun_did_not_wait_for_is_counted(lab: Nodes, tmp_path: Path) -> None:
    torchrun(lab, tmp_path / "doctor", COUNT - 1, f"nodes={COUNT}", "procs=1")
    assert faults(answer(tmp_path / "doctor")) == [f"2 of 3 nodes came: {lab.host(0)}, {lab.host(1)}"]


def test_a_node_that_is_cut_off_midway_is_named_in_time(lab: Nodes, tmp_path: Path) -> None:
    folder = tmp_path / "doctor"
    ranks = [start(lab, rank, folder, "seconds=40") for rank in range(COUNT)]
    log = folder.with_suffix(".0.log")
    while "clocks" not in log.read_text():
        assert ranks[0].poll() is None
        time.sleep(0.05)
    lab.drop(2)
    try:
        assert wait_for(*ranks, patience=120)[0] == 1
    finally:
        lab.undrop(2)
    told = faults(answer(folder))
    assert f"rank 2 ({lab.host(2)}): said nothing any more" in told[0]


def over_ssh(lab: Nodes, keys: Path, folder: Path) -> tuple[int, dict[str, Any]]:
    """`loomtune doctor launcher=ssh` of two hosts, from the first of them: exit code and what it printed."""
    known = ("-F", "/dev/null", "-i", f"{keys}/key", f"-oUserKnownHostsFile={keys}/known", "-oIdentitiesOnly=yes")
    hosts = (f"launcher.hosts=[{lab.host(0)},{lab.host(1)}]", "launcher.procs=1", "launcher.patience=10")
    words = ["launcher=ssh", *hosts, f"launcher.options={listed(known)}", "--quick", "--json", "--out", str(folder)]
    printed, log = folder.with_suffix(".json"), folder.with_suffix(".log")
    command = ["sh", "-c", 'exec "$@" > "$0"', str(printed), sys.executable, "-m", "loomtune.cli", "doctor", *words]
    (code,) = wait_for(lab.run(0, command, log=log))
    return code, json.loads(printed.read_text())


def test_over_ssh_both_hosts_are_examined_and_one_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with nodes(2, f"{PREFIX}s", NET) as lab, servers(lab, tmp_path):
        code, said = over_ssh(lab, tmp_path, tmp_path / "doctor")
        assert (code, faults(said), sorted(said["nodes"])) == (0, [], [lab.host(0), lab.host(1)])
        lab.cut(1)
        code, said = over_ssh(lab, tmp_path, tmp_path / "again")
        assert code == 1
        assert lab.host(1) in faults(said)[0]
