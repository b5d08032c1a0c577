"""Every row is computed as often as it should be, on whatever processes, also where these change in the middle."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from loomtune import api
from runs.witness import computed, witnessed
from runs.worlds import Outcome, Worlds
from support import write_rows

ROWS, STEPS = 1000, 13
"""Two epochs in steps of 160 rows, the last of which is short; 7 steps end in the second epoch."""

SHARDING = {1: "sharding=single", 2: "sharding=ddp", 4: "sharding=fsdp"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Short rows, all different: 1,000 in one file, and as two sources of 700 and 300."""
    folder = tmp_path_factory.mktemp("visits")
    made = [{"prompt": f"{number:03}", "completion": "ab" * (1 + number % 4)} for number in range(ROWS)]
    parts = {"all": made, "a": made[:700], "b": made[700:]}
    return [write_rows(folder / f"{name}.jsonl", part) for name, part in parts.items()]


@pytest.fixture(scope="module")
def settings(tied_model: Path) -> list[str]:
    own = [f"model.path={tied_model}", "batch.size=160", "epochs=2", "max_length=16", "checkpoint.background=false"]
    return [*own, "optimizer.lr=1e-3", "evaluator=[]"]


def moved(worlds: Worlds, sizes: Sequence[int], settings: list[str], folder: Path, stop: int = 7) -> Outcome:
    """A run of several attempts, each but the first on other processes, which takes over after so many steps."""
    worlds.train(sizes[0], [*settings, SHARDING[sizes[0]], f"stop_after={stop}"], folder, witnessed)
    ended = None
    for size in sizes[1:]:
        plan = api.resumed(folder, [SHARDING[size], f"launcher.procs={size}", "stop_after=0"])
        api.check(plan)
        ended = worlds.of(size).run(api.prepare(plan), witnessed)
    assert ended and ended.result["status"] == "completed"
    return ended


def steps(folder: Path) -> dict[int, list[int]]:
    """The rows of each step, over all ranks and attempts."""
    found: dict[int, list[int]] = defaultdict(list)
    for step, rows in computed(folder):
        found[step] += rows
    return dict(found)


RARELY = [pytest.param(pair, marks=pytest.mark.slow) for pair in [(2, 1), (1, 4), (4, 2), (2, 4), (4, 1)]]
moves = pytest.mark.parametrize("sizes", [(1, 2), *RARELY])


@moves
def test_two_epochs_compute_each_row_exactly_twice(
    sizes: tuple[int, int], rows: list[Path], settings: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    moved(worlds, sizes, [*settings, "data=jsonl", f"data.path={rows[0]}"], tmp_path / "run")
    found = steps(tmp_path / "run")
    assert {step: len(rows) for step, rows in found.items()} == {**dict.fromkeys(range(1, STEPS), 160), STEPS: 80}
    each = Counter(row for rows in found.values() for row in rows)
    assert set(each) == set(range(ROWS)) and set(each.values()) == {2}
    first = [row for step in range(1, 7) for row in found[step]]
    assert len(set(first)) == 960, "no row comes again before the epoch ends"


@pytest.mark.parametrize("size", [pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 4)])
def test_without_a_change_of_processes_too(
    size: int, rows: list[Path], settings: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    settings = [*settings, "data=jsonl", f"data.path={rows[0]}", SHARDING[size]]
    worlds.train(size, settings, tmp_path / "run", witnessed)
    each = Counter(row for rows in steps(tmp_path / "run").values() for row in rows)
    assert set(each) == set(range(ROWS)) and set(each.values()) == {2}


@moves
def test_a_mix_holds_its_shares_in_every_epoch(
    sizes: tuple[int, int], rows: list[Path], settings: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    sources = [f"data.sources.a.path={rows[1]}", "data.sources.a.weight=3"]
    sources += [f"data.sources.b.path={rows[2]}", "data.sources.b.weight=7"]
    ended = moved(worlds, sizes, [*settings, "data=mix", *sources], tmp_path / "run")
    assert ended.result["sources"] == {"a": 700, "b": 300}
    found = steps(tmp_path / "run")
    each = Counter(row for rows in found.values() for row in rows)
    assert sum(count for row, count in each.items() if row < 700) == 600
    assert sum(count for row, count in each.items() if row >= 700) == 1400
    assert {each[row] for row in range(700)} == {0, 1}, "600 of 700 rows once"
    assert {each[row] for row in range(700, 1000)} == {4, 5}, "1,400 visits of 300 rows"
    first = [row for step in range(1, 7) for row in found[step]]  # 40 visits of the first epoch are left
    assert 260 <= sum(row < 700 for row in first) <= 300


@pytest.mark.parametrize("sizes", RARELY)
def test_packed_steps_compute_each_row_exactly_twice(
    sizes: tuple[int, int], rows: list[Path], settings: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    packed = ["batch.sampler=packed", "packing=true", "batch.size=50"]
    own = [text for text in settings if not text.startswith("batch.size")]
    ended = moved(worlds, sizes, [*own, *packed, "data=jsonl", f"data.path={rows[0]}"], tmp_path / "run")
    found = steps(tmp_path / "run")
    assert sorted(found) == list(range(1, ended.result["step"] + 1)), "as many steps as were counted before"
    each = Counter(row for rows in found.values() for row in rows)
    assert set(each) == set(range(ROWS)) and set(each.values()) == {2}
    assert max(map(len, found.values())) > 50, "more samples than rows"
