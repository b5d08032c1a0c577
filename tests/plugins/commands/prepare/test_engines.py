"""Where preparing runs: processes of its own that end with it, killed and begun again, and those of a Ray cluster."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from loomtune.errors import RunFailed, UserError
from loomtune_plugins.commands.prepare import engines
from loomtune_plugins.commands.prepare.command import prepare

WORDS = [f"{number:x}" for number in random.Random(0).sample(range(1 << 40), 4000)]


def row(draw: random.Random) -> dict[str, str]:
    return {"prompt": " ".join(draw.choices(WORDS, k=30)), "completion": " ".join(draw.choices(WORDS, k=60))}


def generated(path: Path, size: int, seed: int = 0) -> Path:
    """A file of so many bytes; of its rows, a twentieth is there twice, and another with a word changed."""
    draw, said, written = random.Random(seed), [row(random.Random(seed))], 0
    with path.open("w") as file:
        while written < size:
            kind = draw.random()
            made = row(draw) if kind > 0.1 else dict(draw.choice(said))
            if 0.05 < kind <= 0.1:
                made["completion"] = made["completion"].replace(" ", " changed ", 1)
            if len(said) < 1000:
                said.append(made)
            written += file.write(json.dumps(made) + "\n")
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Several files, so that there are several tasks."""
    folder = tmp_path_factory.mktemp("inputs")
    return [str(generated(folder / f"{number}.jsonl", 25_000, number)) for number in range(4)]


@pytest.fixture(scope="module")
def undisturbed(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What they become."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert prepare([*inputs, "--out", str(out), "--workers", "2", "--dropped"]) == 0
    return written(out)


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def started(words: Sequence[str], out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loomtune.cli", "prepare", *words, "--out", str(out), "--workers", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(there: Path, pattern: str, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Waits for a file of the work; gives the processes that work."""
    while not any(there.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return psutil.Process(process.pid).children(recursive=True)


PLACES = ["rows-0/done.json", "equal-1/done.json", "decide-2/done.json", "files/done.json"]


def test_killed_it_leaves_nobody_behind_and_another_goes_on(
    inputs: list[str], tmp_path: Path, here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*inputs, "stage=[exact]"]
    process = started(words, tmp_path / "out")
    others = until(tmp_path / "out", ".work/*/rows-0/done.json", process)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(others, timeout=20)[1]
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setitem(engines.ENGINES, "local", lambda count: here())
    for out in ("out", "whole"):
        assert prepare([*words, "--out", str(tmp_path / out)]) == 0
    assert written(tmp_path / "out") == written(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_killed_it_leaves_nobody_behind_and_goes_on_to_the_same_bytes(
    inputs: list[str], undisturbed: dict[str, bytes], tmp_path: Path, place: str
) -> None:
    words = [*inputs, "--dropped"]
    process = started(words, tmp_path / "out")
    others = until(tmp_path / "out", f".work/*/{place}", process)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(others, timeout=20)[1]
    again = started(words, tmp_path / "out")
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert written(tmp_path / "out") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_leave_it_does_so_at_once(inputs: list[str], tmp_path: Path, number: int) -> None:
    process = started(inputs, tmp_path / "out")
    others = until(tmp_path / "out", ".work/*/rows-0/done.json", process)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert not psutil.wait_procs(others, timeout=20)[1]


def test_a_process_that_ends_is_told_of_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_begin", partial(os._exit, 9))
    engine = engines.Local(1)
    try:
        with pytest.raises(RunFailed, match="--workers N asks for fewer"):
            list(engine.carry_out([{}]))
    finally:
        engine.close()


def test_there_are_as_many_processes_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    room = psutil.virtual_memory().available
    assert engines.workers(0, room // 4) == 2
    assert engines.workers(0, 2 * room) == 1
    assert engines.workers(9, 2 * room) == 9


def test_without_ray_the_engine_says_what_to_install(inputs: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'loomtune\[ray\]'"):
        prepare([*inputs, "--out", str(tmp_path / "out"), "--engine", "ray"])


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A Ray cluster of two workers, each a node of its own, that only this machine reaches; the engines used on it."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'loomtune[ray]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    node = {"node_ip_address": "127.0.0.2", "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **node})
    made: list[Any] = []
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, **node)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        monkeypatch.setitem(engines.ENGINES, "ray", lambda count: made.append(engines.Ray(count)) or made[-1])
        yield made
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_two_workers_of_a_ray_cluster_make_the_same_bytes(
    inputs: list[str], undisturbed: dict[str, bytes], tmp_path: Path, two_nodes: list[Any]
) -> None:
    assert prepare([*inputs, "--out", str(tmp_path / "out"), "--engine", "ray", "--dropped"]) == 0
    assert written(tmp_path / "out") == undisturbed
    (engine,) = two_nodes
    assert len(engine.nodes) == 2
    assert min(engine.nodes.values()) > 5


def peak(words: Sequence[str], out: Path, killed: str = "") -> int:
    """Bytes that preparing takes at most, over all its processes. killed: it is killed when this file is there."""
    process, most = started(words, out), 0
    while process.poll() is None:
        total = 0
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                total += one.memory_full_info().pss
            except psutil.Error:  # it has just ended
                continue
        most = max(most, total)
        if killed and any(out.glob(f".work/*/{killed}")):
            process.kill()
        time.sleep(0.2)
    _, said = process.communicate()
    assert killed or process.returncode == 0, said
    return most


def above_imports(words: Sequence[str], large: Path, folder: Path) -> int:
    small = generated(folder / "small.jsonl", 100_000)
    return peak([str(large), *words], folder / "out") - peak([str(small), *words], folder / "small")


@pytest.mark.slow
def test_memory_stays_where_it_is_while_the_input_grows(tmp_path: Path) -> None:
    large, text = tmp_path / "large.jsonl", " ".join(WORDS[:60])
    large.write_text("".join(f'{{"prompt": "{number}", "completion": "{text}"}}\n' for number in range(50_000)))
    assert large.stat().st_size > 30 << 20
    assert above_imports(["stage=[clean,exact]"], large, tmp_path) < 150 << 20


@pytest.mark.slow
def test_a_gigabyte_takes_less_than_600_mb_and_killed_in_the_middle_ends_the_same(tmp_path: Path) -> None:
    large = generated(tmp_path / "large.jsonl", 1000 << 20)
    assert above_imports([], large, tmp_path) < 600 << 20
    peak([str(large)], tmp_path / "killed", "meet-1/done.json")
    assert not (tmp_path / "killed" / "manifest.json").exists()
    peak([str(large)], tmp_path / "killed")
    assert written(tmp_path / "killed") == written(tmp_path / "out")
