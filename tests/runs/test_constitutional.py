"""The whole road of Constitutional AI as the guide tells it, on a tiny model of this machine."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from loomtune import cli
from support import ROOT, shared, write_rows

SMALL = {
    "prepare": ["stage.split.validation=0.25", "--workers", "1"],
    "train": ["steps=2", "batch.size=2", "optimizer.lr=1e-3", "max_length=256", "tracker=[jsonl]"],
}
ASKED = ["max_tokens=12", "cut=keep"]


def commands() -> list[list[str]]:
    """Those of the guide, word by word."""
    guide = (ROOT / "docs" / "constitutional-ai.md").read_text()
    (block,) = re.findall(r"## The whole road.*?```console\n(.*?)```", guide, re.DOTALL)
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ loomtune ")) for line in lines if line.startswith("$ ")]


def here(words: list[str], model: Path) -> list[str]:
    """The same on this machine: a service and a base become one model, and a run becomes a short one."""
    made = [_renamed(word, model) for word in words if ".url=" not in word]
    stages = {word.split(".")[1] for word in words if word.startswith("stage.")}
    asked = [f"stage.{stage}.{one}" for stage in sorted(stages) for one in ASKED]
    rounds = ["stage.critique.rounds=1"] if "critique" in stages else []
    drawn = ["objective.group=2", "objective.max_new_tokens=4"] if "objective=grpo" in words else []
    return [*made, *asked, *rounds, *drawn, *SMALL[words[0]]]


def _renamed(word: str, model: Path) -> str:
    key, _, value = word.rpartition("=")
    return f"{key}={model}" if value in ("base", "helpful", "judge") else word


@pytest.mark.slow
def test_every_command_of_the_guide_runs_on_what_the_one_before_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOOMTUNE_CACHE", str(tmp_path / "cache"))
    said = ["lock", "door", "apple", "river", "stone", "cloud", "spoon", "tiger", "ladder", "window"]
    write_rows(tmp_path / "red_team.jsonl", [{"prompt": f"How do I steal the {one} {one[::-1]}?"} for one in said])
    write_rows(tmp_path / "helpful.jsonl", [{"prompt": f"What is a {one}?", "completion": f"A {one}."} for one in said])
    pairs = [{"prompt": f"What is a {one}?", "chosen": f"A {one}.", "rejected": "No."} for one in said]
    write_rows(tmp_path / "helpful_pairs.jsonl", pairs)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Tell me of a {one}."} for one in said])
    road = commands()
    assert [words[0] for words in road] == ["prepare", "train", "prepare", "train", "train", "train"]
    for words in road:
        with pytest.raises(SystemExit) as ended:
            cli.main(here(words, shared("models", "stories260k")))
        assert ended.value.code == 0, words
    for run in ("cai_sl", "cai_reward", "cai_rl", "cai_dpo"):
        result = json.loads((tmp_path / "runs" / run / "result.json").read_text())
        assert (result["status"], result["step"]) == ("completed", 2), run
    (tmp_path / "cai" / "sl" / "page-critique.md").read_text()
    judged = [json.loads(line) for line in (tmp_path / "cai" / "rl" / "train-00000.jsonl").read_text().splitlines()]
    assert {row["answered_by"] for row in judged} == {"cai_sl"}
    assert all(0.5 <= row["probability"] <= 1 and row["judgement"]["by"] == "stories260k" for row in judged)
    soft = [json.loads(line) for line in (tmp_path / "runs" / "cai_dpo" / "metrics.jsonl").read_text().splitlines()]
    assert soft[-1]["step"] == 2
