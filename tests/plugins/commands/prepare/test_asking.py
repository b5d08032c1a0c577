"""Preparing with stages that ask a model: what they leave, and going on after a kill."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune.testing.recorded import built
from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.commands.prepare import engines
from loomtune_plugins.commands.prepare.command import prepare
from loomtune_plugins.commands.prepare.job import opened
from services import FAILURES, Service, serving
from support import write_rows

DRAW = random.Random(5)
PROMPTS = [{"prompt": f"How do I {DRAW.getrandbits(200):x} a {DRAW.getrandbits(99):x}?"} for n in range(8)]
QUICK = {"first_wait": 0.01, "longest_wait": 0.1, "silent_seconds": 2.0}


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, here: Callable[..., Any]) -> None:
    """In this process, which builds the stages of a folder anew each time, as another process would."""
    monkeypatch.setitem(engines.ENGINES, "local", lambda count: opened.cache_clear() or here())


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "red.jsonl", PROMPTS)


def words(kind: str, service: Service, folder: Path, **more: Any) -> list[str]:
    """Settings of every stage of a recipe that asks."""
    asking = {"sl": ["critique"], "rl": ["answer", "principled"]}[kind]
    given = {"url": service.url, "model": "m", "cache": str(folder / "answers"), **QUICK, **more}
    shares = ["stage.split.validation=0.25"]
    return [
        f"recipe=cai_{kind}",
        *shares,
        *(f"stage.{one}.{key}={value}" for one in asking for key, value in given.items()),
    ]


def rows(out: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{split}-00000.jsonl").read_text().splitlines()]


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.mark.usefixtures("real")
def test_the_first_stage_leaves_rows_to_learn_and_a_page_to_read(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOMTUNE_API_KEY", "sk-secret-7")
    out = tmp_path / "out"
    with serving() as service:
        assert prepare([str(prompts), "--out", str(out), *words("sl", service, tmp_path, rounds=1)]) == 0
        asked = service.answered
        before = files(out)
        (out / "page-critique.md").write_text("changed")
        # The same but for patience: what is not as it was is made good, and nothing is asked again.
        assert prepare([str(prompts), "--out", str(out), *words("sl", service, tmp_path, rounds=1, concurrency=2)]) == 0
        assert files(out) == before and service.answered == asked == 3 * len(PROMPTS)
    manifest = json.loads((out / "manifest.json").read_text())
    assert [one["name"] for one in manifest["pages"]] == ["page-critique.md"]
    every = [*rows(out), *rows(out, "validation")]
    page = (out / "page-critique.md").read_text()
    assert len(every) == len(PROMPTS) and all(row["critiques"]["draft"] in page for row in every)
    read = installed().build("data", "prepared", {"path": str(out)})
    for row in read.rows("train"):
        assert built("sft", {}).sample(row, ToyTokenizer(), 10_000).targets == len(row["completion"]) + 1
    kept = (tmp_path / "answers" / "answers.jsonl").read_bytes()
    assert not any(b"sk-secret" in content for content in [*files(out).values(), kept])


@pytest.mark.usefixtures("real")
def test_the_second_stage_leaves_pairs_with_probabilities(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving() as service:
        assert prepare([str(prompts), "--out", str(out), *words("rl", service, tmp_path)]) == 0
    read = installed().build("data", "prepared", {"path": str(out)})
    objective = built("reward", {"probability": "probability"})
    found = [objective.sample(row, ToyTokenizer(), 10_000).numbers["probability"] for row in read.rows("train")]
    assert found == [row["probability"] for row in rows(out)] and len(set(found)) > 1
    assert (out / "page-principled.md").read_text().count("**chosen**") == len(PROMPTS)


@pytest.mark.usefixtures("real")
def test_the_cap_ends_it_and_more_money_goes_on(prompts: Path, tmp_path: Path) -> None:
    out, prices = tmp_path / "out", {"input_price": 1000.0, "output_price": 10_000.0, "rounds": 1, "concurrency": 1}
    with serving() as service:
        with pytest.raises(UserError, match=r"stage\.critique\.max_cost=1 is reached"):
            prepare([str(prompts), "--out", str(out), *words("sl", service, tmp_path, max_cost=1, **prices)])
        assert service.answered == 5
        prepare([str(prompts), "--out", str(out), *words("sl", service, tmp_path, max_cost=100, **prices)])
        assert service.answered == 3 * len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sl", "rl"])
def test_killed_three_times_on_a_service_that_misbehaves_it_ends_with_the_same_bytes(
    kind: str, prompts: Path, tmp_path: Path
) -> None:
    """By SIGKILL, its processes with it; every answer that was kept is asked for once."""
    kinds = cycle([*FAILURES, "slow 0.1", "well", "slow 0.2", "well"])
    with serving() as service:
        port = service.port
        prepare([str(prompts), "--out", str(tmp_path / "well"), *words(kind, service, tmp_path / "well-answers")])
        calls = service.answered
    with serving(lambda number, body: next(kinds), port) as service:
        typed = [
            str(prompts),
            "--out",
            str(tmp_path / "ill"),
            *words(kind, service, tmp_path, retries=60, concurrency=2),
        ]
        kept = tmp_path / "answers" / "answers.jsonl"
        for share in (0.2, 0.5, 0.8):
            process = started(typed)
            while process.poll() is None and (not kept.exists() or kept.read_bytes().count(b"\n") < share * calls):
                time.sleep(0.05)
            assert process.poll() is None, "it was done before it could be killed"
            process.kill()
            process.communicate()
        process = started(typed)
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert files(tmp_path / "ill") == files(tmp_path / "well")
    keys = [json.loads(line)["key"] for line in kept.read_text().splitlines()]
    assert len(set(keys)) == calls, "nothing was lost"
    assert len(keys) == calls, "and nothing was paid twice"


def started(typed: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loomtune.cli", "prepare", *typed, "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
