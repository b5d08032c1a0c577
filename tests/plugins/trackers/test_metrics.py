"""metrics.jsonl: exact numbers, lines that a kill cannot lose, and a clean cut on resume."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loomtune_plugins.trackers.metrics import MetricsLog, read

KILLED = """
import os, signal, sys
from pathlib import Path
from loomtune_plugins.trackers.metrics import MetricsLog
log = MetricsLog(Path(sys.argv[1]))
for step in range(1, 4):
    log.append({"step": step, "loss": 1 / step})
log.amend({"heldout_loss": 0.5})
os.kill(os.getpid(), signal.SIGKILL)
"""


def three_steps(folder: Path) -> MetricsLog:
    log = MetricsLog(folder)
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 1 / step})
    return log


def test_floats_come_back_to_the_last_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, math.pi * 1e17, 2.0**-1074]
    MetricsLog(tmp_path).append({"step": 1} | {f"v{i}": value for i, value in enumerate(values)})
    (line,) = read(tmp_path)
    assert [line[f"v{i}"] for i in range(4)] == values


def test_what_is_not_finite_is_null_and_named_and_the_file_stays_json(tmp_path: Path) -> None:
    MetricsLog(tmp_path).append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5, "nonfinite": ["loss", "grad_norm"]}


def test_an_evaluation_joins_the_last_line(tmp_path: Path) -> None:
    log = three_steps(tmp_path)
    log.amend({"heldout_loss": 0.25})
    log.append({"step": 4, "loss": 0.2})
    assert read(tmp_path)[2:] == [{"step": 3, "loss": 1 / 3, "heldout_loss": 0.25}, {"step": 4, "loss": 0.2}]


def test_a_shorter_amended_line_leaves_no_rest_of_the_old_one(tmp_path: Path) -> None:
    log = three_steps(tmp_path)
    log.amend({"loss": 1.0})
    assert read(tmp_path)[2] == {"step": 3, "loss": 1.0}
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


def test_a_cut_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    three_steps(tmp_path).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    MetricsLog(tmp_path).cut(2)
    assert [line["step"] for line in read(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_that_parses_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n12')
    assert read(tmp_path) == [{"step": 1, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    assert read(tmp_path) == []


def test_after_a_cut_lines_are_added_and_amended_as_before(tmp_path: Path) -> None:
    three_steps(tmp_path).close()
    log = MetricsLog(tmp_path)
    log.cut(2)
    log.amend({"heldout_loss": 9.0})
    log.append({"step": 3, "loss": 0.0})
    assert [line.get("heldout_loss") for line in read(tmp_path)] == [None, 9.0, None]


def test_amending_a_line_read_back_keeps_its_names_of_what_was_not_finite(tmp_path: Path) -> None:
    MetricsLog(tmp_path).append({"step": 1, "loss": math.nan})
    log = MetricsLog(tmp_path)
    log.cut(1)
    log.amend({"heldout_loss": 2.0})
    assert read(tmp_path) == [{"step": 1, "loss": None, "heldout_loss": 2.0, "nonfinite": ["loss"]}]


def test_a_cut_before_everything_empties_the_file(tmp_path: Path) -> None:
    three_steps(tmp_path)
    MetricsLog(tmp_path).cut(-1)
    assert read(tmp_path) == [] and (tmp_path / "metrics.jsonl").exists()


def test_a_killed_process_has_left_every_line_that_it_wrote(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False, env=os.environ)
    assert ended.returncode == -signal.SIGKILL
    assert read(tmp_path)[2] == {"step": 3, "loss": 1 / 3, "heldout_loss": 0.5}
    assert len(read(tmp_path)) == 3


def test_a_folder_without_a_file_has_no_lines(tmp_path: Path) -> None:
    assert read(tmp_path) == []
