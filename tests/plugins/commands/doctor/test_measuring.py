"""How things are measured: schedules, arithmetic, folders, time-outs, and what nvidia-smi says."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from loomtune_plugins.commands.doctor import disks, graphics, seeing
from loomtune_plugins.commands.doctor.board import Board, within
from loomtune_plugins.commands.doctor.clocks import offset
from loomtune_plugins.commands.doctor.collectives import bus_factor
from loomtune_plugins.commands.doctor.pairs import rounds
from loomtune_plugins.commands.doctor.phases import named

SECOND = 1_000_000_000

SMI = """#!/bin/sh
case "$1" in
*index,name*) echo '0, NVIDIA H100 80GB HBM3, 570.86.15, 41, 1024'; echo '1, NVIDIA H100 80GB HBM3, 570.86.15, 90, 0';;
*ecc.errors*) echo 0; echo 7;;
*hw_thermal*) echo 'Not Active'; echo Active;;
*) echo 'Field is not a valid field to query.'; exit 2;;
esac
"""


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8, 13])
def test_every_pair_meets_once_and_no_node_has_two_partners_in_a_round(nodes: int) -> None:
    pairing = rounds(nodes)
    assert sorted(itertools.chain(*pairing)) == list(itertools.combinations(range(nodes), 2))
    assert len(pairing) == nodes - 1 + nodes % 2
    for together in pairing:
        met = list(itertools.chain(*together))
        assert len(met) == len(set(met))


def test_a_clock_s_offset_is_that_of_the_quickest_ping() -> None:
    slow = (0, 9 * SECOND, 9 * SECOND, 4 * SECOND)
    quick = (10 * SECOND, 15_200_000_000, 15_300_000_000, 10_500_000_000)  # 0.2 s there, 0.1 s of thought, 0.2 s back
    assert offset([slow, quick]) == {"offset": 5.0, "uncertainty": 0.2}


def test_an_uneven_way_stays_within_the_uncertainty() -> None:
    ahead, there, back = 3.0, 0.4, 0.1
    ping = (0, int((ahead + there) * SECOND), int((ahead + there) * SECOND), int((there + back) * SECOND))
    found = offset([ping])
    assert abs(found["offset"] - ahead) <= found["uncertainty"] == pytest.approx(0.25)


def test_the_bus_bandwidth_counts_as_nccl_tests_does() -> None:
    assert bus_factor("all-reduce", 8) == 2 * 7 / 8
    assert bus_factor("all-gather", 8) == 7 / 8


def test_files_of_others_are_seen_in_one_folder_and_not_in_another(tmp_path: Path) -> None:
    for rank in range(3):
        seeing.write(tmp_path / ("odd" if rank == 2 else "shared"), rank, "word")
    assert seeing.read(tmp_path / "shared", range(3), "word", 0.05)["unseen"] == [2]
    assert seeing.read(tmp_path / "odd", range(3), "word", 0.05)["unseen"] == [0, 1]
    assert seeing.read(tmp_path / "shared", range(2), "another word", 0.05)["unseen"] == [0, 1]


def test_the_delay_is_that_of_the_last_file(tmp_path: Path) -> None:
    late = threading.Timer(0.2, seeing.write, (tmp_path, 1, "word"))
    seeing.write(tmp_path, 0, "word")
    late.start()
    found = seeing.read(tmp_path, range(2), "word", 60)
    assert found["unseen"] == []
    assert found["delay"] > 0.1


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    found = disks.disk(tmp_path / "new", 0.05, 2 * disks.BLOCK)
    assert found["written"] > 0
    assert found["free"] <= found["total"]
    assert list((tmp_path / "new").iterdir()) == []
    assert disks.disk(tmp_path, 0.05, disks.BLOCK // 2)["written"] is None


def test_what_is_written_to_a_disk_goes_with_its_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr("os.fsync", lambda number: seen.extend([tmp_path, *tmp_path.iterdir()]))
    disks.disk(tmp_path, 0.01, disks.BLOCK)
    assert set(seen) == {tmp_path}, "a name would stay where the writer is killed"


def test_a_place_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOOMTUNE_CACHE", str(tmp_path / "file"))
    assert "exists" in disks.disks(tmp_path, 0.01, disks.BLOCK)["cache"]["error"]


def test_work_that_hangs_or_fails_is_told_in_time() -> None:
    forever = threading.Event()
    began = time.monotonic()
    assert within(0.1, lambda: forever.wait(600)) == {"late": "not done within 0 s"}
    assert time.monotonic() - began < 60
    assert within(60, lambda: 1 // 0) == {"error": "ZeroDivisionError: integer division or modulo by zero"}
    assert within(60, lambda: None) == {"value": None}
    forever.set()


def test_what_some_ranks_posted_is_heard_though_others_are_silent() -> None:
    store = dist.HashStore()
    for rank in (0, 2):
        Board(store, rank).post("facts", {"rank": rank})
    assert Board(store, 0).gather("facts", range(4), 0.2) == {0: {"rank": 0}, 2: {"rank": 2}}
    with pytest.raises(TimeoutError, match="rank 3 said nothing of facts"):
        Board(store, 0).hear("facts", 3, 0.1)


def test_nodes_have_host_names_and_numbers_where_these_are_the_same() -> None:
    came = {0: ["x", "0"], 1: ["x", "0"], 2: ["y", "1"], 3: ["x", "2"]}
    assert named(came) == {"x#0": [0, 1], "y": [2], "x#2": [3]}


def test_nvidia_smi_is_asked_for_each_field_that_a_driver_may_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    first, second = graphics.asked() or []
    assert (first["name"], first["driver_version"], first["temperature.gpu"]) == (
        "NVIDIA H100 80GB HBM3",
        "570.86.15",
        "41",
    )
    assert (second["index"], second["ecc.errors.uncorrected.volatile.total"]) == ("1", "7")
    assert second["clocks_throttle_reasons.hw_thermal_slowdown"] == "Active"
    assert not {"remapped_rows.pending"} & {*first, *second}


def test_reports_of_the_driver_are_found_in_the_kernel_s_log() -> None:
    log = "[1.0] usb 1-1: new device\n[2.0] NVRM: Xid (PCI:0000:05:00): 79, pid=1, GPU has fallen off the bus.\n"
    assert graphics.xid(log) == ["Xid (PCI:0000:05:00): 79, pid=1, GPU has fallen off the bus."]
