"""What is wrong with a cluster, from what its ranks answered: who is named, who is not, and how gravely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from loomtune_plugins.commands.doctor import report
from loomtune_plugins.commands.doctor.cluster import clocks, cluster, links, lost, scores
from loomtune_plugins.commands.doctor.findings import FAULT, WARNING, Answers, Finding, odd_ones
from loomtune_plugins.commands.doctor.machines import cores, machines
from loomtune_plugins.commands.doctor.pairs import rounds

GIB = 1 << 30
FACTS: Mapping[str, Any] = {
    "versions": {"torch": "2.13.0", "plugin acme": "acme 1.0"},
    "sources": "abc",
    "environment": {"NCCL_DEBUG": "WARN"},
    "limits": {"open files": 65536, "locked memory": -1, "infiniband": 1},
    "affinity": "ff",
    "quota": None,
    "threads": 4,
    "memory": {"total": 64 * GIB, "available": 60 * GIB, "swap": 0},
    "interface": {"gloo": "eth0", "named": False, "loopback": False, "towards rank 0": "eth0"},
}
PLACE = {"path": "/runs", "free": 900 * GIB, "written": 1e9, "opened": 1e-3}
DISKS = {"run folder": PLACE, "cache": PLACE, "shared memory": {**PLACE, "free": 32 * GIB}}
GPU = {
    "index": "3",
    "name": "H100",
    "driver_version": "570.1",
    "temperature.gpu": "40",
    "ecc.errors.uncorrected.volatile.total": "0",
    "clocks_throttle_reasons.hw_slowdown": "Not Active",
}
GRAPHICS = {"gpus": [GPU], "xid": [], "peers": [], "count": 1, "flops": 7e14}
SEEN = {"delay": 0.01, "unseen": []}


def answers(nodes: int = 4, **changed: Mapping[int, Any]) -> Answers:
    """Sound nodes a, b, c, ... of a rank each; with what some ranks answered otherwise, by phase."""
    names = [chr(ord("a") + number) for number in range(nodes)]
    usual = {"facts": FACTS, "disks": DISKS, "seeing": SEEN, "graphics": GRAPHICS}
    said = {phase: {rank: {**of, **changed.get(phase, {}).get(rank, {})} for rank in range(nodes)}
            for phase, of in usual.items()}  # fmt: skip
    said["clocks"] = {rank: {"offset": 0.0, "uncertainty": 1e-4} for rank in range(1, nodes)}
    return Answers({name: [rank] for rank, name in enumerate(names)}, said)


def paired(nodes: int, slow: Mapping[int, float], usual: float = 1e9, latency: float = 2e-5) -> Answers:
    """Pairs of nodes whose bandwidth is that of the slower one."""
    pairs = [pair for pairing in rounds(nodes) for pair in pairing]
    lines = [
        {"nodes": list(pair), "latency": latency, "bandwidth": min(slow.get(node, usual) for node in pair)}
        for pair in pairs
    ]
    made = answers(nodes)
    return replace(made, said={**made.said, "pairs": {0: lines[::2], 1: lines[1::2]}})


def findings(made: Answers) -> list[Finding]:
    return [*machines(made), *cluster(made)]


def only(made: Answers) -> Finding:
    (finding,) = findings(made)
    assert finding.cure
    return finding


def test_a_sound_cluster_has_no_finding() -> None:
    assert findings(paired(4, {})) == []


@pytest.mark.parametrize(
    ("phase", "changed", "level", "said"),
    [
        ("facts", {"versions": {"torch": "2.12.0", "plugin acme": "acme 1.0"}}, FAULT,
         "torch is 2.13.0 on most ranks, but 2.12.0 on c"),
        ("facts", {"versions": {"torch": "2.13.0"}}, FAULT, "plugin acme is acme 1.0 on most ranks, but absent on c"),
        ("facts", {"sources": "abd"}, FAULT, "own files differ on c"),
        ("facts", {"environment": {"NCCL_DEBUG": "INFO"}}, WARNING, "NCCL_DEBUG is WARN on most ranks, but INFO on c"),
        ("facts", {"limits": {**FACTS["limits"], "open files": 1024}}, WARNING, "at most 1024 open files on c"),
        ("facts", {"limits": {**FACTS["limits"], "locked memory": 65536}}, FAULT, "of locked memory on c"),
        ("facts", {"threads": 9}, WARNING, "9 threads of 1 processes on 8 cores"),
        ("facts", {"affinity": "f"}, WARNING, "8 cores on most nodes, but 4 on c"),
        ("facts", {"memory": {"total": 64 * GIB, "available": 5 * GIB, "swap": 0}}, WARNING, "memory is free on c"),
        ("facts", {"memory": {"total": 64 * GIB, "available": 60 * GIB, "swap": 3 * GIB}}, WARNING, "swap in use on c"),
        ("facts", {"memory": {"total": 32 * GIB, "available": 30 * GIB, "swap": 0}}, WARNING, "32 GiB of memory on c"),
        ("facts", {"interface": {**FACTS["interface"], "loopback": True}}, FAULT, "name of c resolves to the loopback"),
        ("facts", {"interface": {**FACTS["interface"], "gloo": "docker0"}}, WARNING, "most nodes, but docker0 on c"),
        ("disks", {"cache": {"path": "/cache", "error": "Permission denied"}}, FAULT, "cannot be written to on c"),
        ("disks", {"run folder": {**PLACE, "free": GIB // 2}}, FAULT, "512 MiB free for the run folder /runs on c"),
        ("disks", {"run folder": {**PLACE, "free": 9 * GIB}}, WARNING, "9.0 GiB free for the run folder /runs on c"),
        ("disks", {"cache": {**PLACE, "written": 1e8}}, WARNING, "the cache takes 100 MB/s on c, 1000 on others"),
        ("disks", {"run folder": {**PLACE, "opened": 0.4}}, WARNING, "takes 400 ms to make on c"),
        ("disks", {"shared memory": {**PLACE, "free": 64 << 20}}, WARNING, "/dev/shm on c"),
        ("graphics", {"count": 0}, FAULT, "GPUs: 1, but none on c"),
        ("graphics", {"gpus": [{**GPU, "name": "A100"}]}, WARNING, "kinds of GPU: H100, but A100 on c"),
        ("graphics", {"gpus": [{**GPU, "driver_version": "550.2"}]}, WARNING, "driver 570.1, but 550.2 on c"),
        ("graphics", {"gpus": [{**GPU, "ecc.errors.uncorrected.volatile.total": "2"}]}, FAULT, "GPU 3 of c has"),
        ("graphics", {"gpus": [{**GPU, "remapped_rows.failure": "Yes"}]}, FAULT, "GPU 3 of c has no spare memory rows"),
        ("graphics", {"gpus": [{**GPU, "remapped_rows.pending": "Yes"}]}, WARNING, "GPU 3 of c will put aside"),
        ("graphics", {"gpus": [{**GPU, "temperature.gpu": "91"}]}, WARNING, "GPU 3 of c is at 91 °C"),
        ("graphics", {"gpus": [{**GPU, "clocks_throttle_reasons.hw_slowdown": "Active"}]}, WARNING, "hw_slowdown"),
        ("graphics", {"xid": ["Xid (PCI:0000:05:00): 79, GPU has fallen off the bus."]}, WARNING, "79, GPU has fallen"),
        ("graphics", {"peers": [[0, 1]]}, WARNING, "GPUs of c cannot read each other's memory"),
        ("graphics", {"flops": 4e14}, FAULT, "rank 2's GPU on c multiplies at 400 TFLOP/s, others at 700"),
        ("graphics", {"flops": 5.5e14}, WARNING, "rank 2's GPU on c multiplies at 550 TFLOP/s"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_node_names_that_node(phase: str, changed: Any, level: str, said: str) -> None:
    finding = only(answers(**{phase: {2: changed}}))
    assert finding.level == level
    assert said in finding.what


def test_little_locked_memory_is_no_matter_without_infiniband() -> None:
    bare = {"limits": {"open files": 65536, "locked memory": 65536, "infiniband": 0}}
    assert findings(answers(facts=dict.fromkeys(range(4), bare))) == []


def test_what_is_not_told_of_a_gpu_is_no_finding() -> None:
    unknown = dict.fromkeys([name for name in GPU if "." in name], "[N/A]")
    assert findings(answers(graphics={rank: {"gpus": [GPU | unknown], "xid": None} for rank in range(4)})) == []


def test_ranks_bound_to_cores_of_their_own_have_the_cores_of_all() -> None:
    bound = {rank: {"affinity": f"{0xF << 4 * rank:x}", "quota": None} for rank in range(2)}
    assert cores(bound) == 8
    assert cores({0: {"affinity": "ff", "quota": 2.5}}) == 2.5


def test_a_node_with_another_folder_is_named_and_the_others_are_not() -> None:
    unseen = {0: {"unseen": [1]}, 1: {"unseen": [0, 2, 3]}, 2: {"unseen": [1]}, 3: {"unseen": [1]}}
    finding = only(answers(seeing=unseen))
    assert finding.level == FAULT
    assert "one folder for all: b and the other nodes" in finding.what


def test_a_node_that_reads_old_content_is_named() -> None:
    made = answers()
    made = replace(
        made, said={**made.said, "seeing again": {0: SEEN, 1: SEEN, 2: {"delay": 0.0, "unseen": [0]}, 3: SEEN}}
    )
    assert only(made).level == FAULT
    assert only(made).what.startswith("c still read old content")


@pytest.mark.parametrize(("nodes", "slow"), [(3, [2]), (4, [0]), (5, [1, 3]), (8, [0, 1, 2]), (9, [2, 5, 7])])
def test_a_minority_of_slow_nodes_is_named_and_no_other(nodes: int, slow: list[int]) -> None:
    made = paired(nodes, dict.fromkeys(slow, 2e8))
    (finding,) = links(made)
    assert finding.level == FAULT
    told = finding.what.partition(";")[0]
    assert [name for name in made.nodes if f"{name} (" in told] == [chr(ord("a") + node) for node in slow]


def test_a_node_somewhat_slower_than_the_others_is_a_warning_and_a_slow_network_too() -> None:
    (finding,) = links(paired(4, {1: 6e8}))
    assert (finding.level, "slow network: b" in finding.what) == (WARNING, True)
    (finding,) = links(paired(4, {}, usual=1e7))
    assert (finding.level, "10.0 MB/s between nodes" in finding.what) == (WARNING, True)


def test_a_far_node_is_named() -> None:
    made = paired(4, {})
    lines = [
        {**line, "latency": 1e-3 if 3 in line["nodes"] else 2e-5} for of in made.said["pairs"].values() for line in of
    ]
    (finding,) = links(replace(made, said={**made.said, "pairs": {0: lines}}))
    assert "to d" in finding.what
    assert scores(replace(made, said={"pairs": {0: lines}}), "latency", min)["a"] == 2e-5


@pytest.mark.parametrize(
    ("offset", "uncertainty", "level"),
    [(2.0, 0.01, FAULT), (-2.0, 0.01, FAULT), (0.3, 0.01, WARNING), (0.05, 0.01, None), (1.2, 1.15, None)],
)
def test_clocks_that_are_surely_apart_are_named(offset: float, uncertainty: float, level: str | None) -> None:
    made = answers()
    apart = {**made.said["clocks"], 2: {"offset": -offset, "uncertainty": uncertainty}}  # rank 0's against the node's
    found = list(clocks(replace(made, said={"clocks": apart})))
    assert [finding.level for finding in found] == ([level] if level else [])
    if level:
        way = "ahead of" if offset > 0 else "behind"
        assert f"the clock of c is {abs(offset):.3f} s (± {uncertainty:.3f}) {way} the others" in found[0].what


def test_where_rank_0_has_the_odd_clock_it_is_named_itself() -> None:
    odd = {rank: {"offset": 5.0, "uncertainty": 1e-4} for rank in range(1, 4)}
    (finding,) = clocks(replace(answers(), said={"clocks": odd}))
    assert "the clock of a is 5.000 s" in finding.what
    assert "ahead of" in finding.what


def test_ranks_and_nodes_that_did_not_come_are_named() -> None:
    made = Answers({"a": [0, 1], "b": [2]})
    absent = {"phase": "coming", "ranks": [3, 4, 5], "error": "not there after 10 s"}
    found = [finding.what for finding in lost(made, [absent], {"nodes": 3, "procs": 2})]
    assert found == [
        "2 of 3 nodes came: a, b",
        "1 of 2 ranks came on b",
        "rank 3, 4, 5 of b, node 2 did not come: not there after 10 s",
    ]


def test_who_fell_silent_is_told_before_who_waited_for_it() -> None:
    waited = {"phase": "pairs", "ranks": [0, 1], "error": "not done within 30 s"}
    silent = {"phase": "pairs", "ranks": [2], "error": "said nothing any more"}
    first, second = lost(answers(), [waited, silent], {})
    assert first.what == "pairs: rank 2 (c): said nothing any more"
    assert second.what == "pairs: rank 0 (a), rank 1 (b): not done within 30 s"


def test_odd_ones_differ_from_most_or_from_the_first() -> None:
    assert odd_ones({"a": 1, "b": 2, "c": 2}) == {"a": 1}
    assert odd_ones({"a": 1, "b": 2}) == {"b": 2}
    assert odd_ones({"a": 1, "b": 1}) == {}


def test_warnings_do_not_make_a_cluster_unsound_and_faults_come_first() -> None:
    warned = report.made(answers(facts={1: {"threads": 9}}), [], size=4, expected={"nodes": 4, "procs": 1})
    assert (warned["sound"], [finding["level"] for finding in warned["findings"]]) == (True, [WARNING])
    faulty = report.concluded(warned, [Finding(FAULT, "what", "cure")])
    assert (faulty["sound"], [finding["level"] for finding in faulty["findings"]]) == (False, [FAULT, WARNING])
