"""What was planted in GSM8K is found, and next to nothing else; every row is accounted for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from loomtune.cli import main
from loomtune.contracts import Row
from loomtune_plugins.stages.decontaminate import Decontaminate
from loomtune_plugins.stages.exact import Exact
from loomtune_plugins.stages.near import Near
from loomtune_plugins.stages.settings import DecontaminateSettings, ExactSettings, NearSettings
from planting import Planted, another_problem, planted, run
from support import shared, write_rows

HELD_OUT = 50
STAGES = ("exact", "near", "decontaminate")


def gsm8k(most: int) -> list[dict[str, str]]:
    with shared("data", "gsm8k", "train.jsonl").open() as lines:
        read = [json.loads(line) for line, _ in zip(lines, range(most), strict=False)]
    return [{"prompt": row["question"], "completion": row["answer"]} for row in read]


def truly(one: Row, other: Row) -> float:
    """Exact Jaccard similarity of the sets of five neighbouring characters; the smaller of both sides'."""
    return min(_jaccard(one[side], other[side]) for side in ("prompt", "completion"))


def _jaccard(one: str, other: str) -> float:
    texts = [" ".join(text.casefold().split()) for text in (one, other)]
    first, second = ({text[start : start + 5] for start in range(len(text))} for text in texts)
    return len(first & second) / len(first | second)


def check_found(was: Planted, exact: set[str], near: dict[str, str], leaked: set[str], threshold: float = 0.75) -> None:
    """near: origin of what went to that of the row that stays in its place."""
    rows = {str(row["origin"]): row for row in was.rows}
    assert exact == was.exact, "exact duplicates are found, and nothing else is"
    assert len(was.near & near.keys()) >= 0.95 * len(was.near), f"not found: {sorted(was.near - near.keys())}"
    false = [one for one in near.keys() - was.near if truly(rows[one], rows[near[one]]) < threshold]
    assert len(false) <= 0.01 * len(near), f"not alike: {false}"
    assert leaked == was.contaminated, "what was held out is found, and nothing else is"


@pytest.mark.parametrize("seed", range(3))
def test_what_is_planted_among_1500_rows_is_found(seed: int, tmp_path: Path) -> None:
    rows = gsm8k(1500 + HELD_OUT)
    was = planted(rows[HELD_OUT:], rows[:HELD_OUT], seed)
    evaluation = write_rows(tmp_path / "held_out.jsonl", rows[:HELD_OUT])
    kept, same = run(Exact(ExactSettings()), was.rows)
    kept, alike = run(Near(NearSettings()), kept)
    kept, leaked = run(Decontaminate(DecontaminateSettings(against=[str(evaluation)])), kept)
    near = {one.origin: one.detail.split(" like ")[1] for one in alike}
    check_found(was, {one.origin for one in same}, near, {one.origin for one in leaked})
    assert len(kept) + len(same) + len(alike) + len(leaked) == len(was.rows)


def test_no_problem_with_another_number_goes() -> None:
    draw = random.Random(0)
    rows = [{**row, "origin": f"train.jsonl:{place}"} for place, row in enumerate(gsm8k(1000))]
    asked = [row for row in rows if any(map(str.isdigit, row["prompt"]))][:500]
    others = [{**another_problem(row, draw), "origin": f"other:{place}"} for place, row in enumerate(asked)]
    kept, gone = run(Near(NearSettings()), [*rows, *others])
    assert not gone and len(kept) == len(rows) + 500
    _, gone = run(Near(NearSettings(numbers=True)), [*rows, *others])
    assert len(gone) > 450, "by their words they are alike"


@pytest.mark.slow
def test_all_of_gsm8k_is_prepared_and_the_manifest_accounts_for_every_row(tmp_path: Path) -> None:
    rows = gsm8k(8000)
    was = planted(rows[:-HELD_OUT], rows[-HELD_OUT:])
    source = write_rows(tmp_path / "rows.jsonl", ({**row, "planted": row["origin"]} for row in was.rows))
    evaluation = write_rows(tmp_path / "held_out.jsonl", rows[-HELD_OUT:])
    stages = ["stage=[clean,exact,near,decontaminate,split]", f"stage.decontaminate.against=[{evaluation}]"]
    with pytest.raises(SystemExit) as left:
        main(["prepare", str(source), "--out", str(tmp_path / "out"), "--dropped", "--workers", "2", *stages])
    assert left.value.code == 0
    names = {f"rows.jsonl:{line}": str(row["origin"]) for line, row in enumerate(was.rows, 1)}
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.ndjson").read_text().splitlines()]
    went = {
        stage: {names[one["origin"]]: one["detail"] for one in dropped if one["stage"] == stage} for stage in STAGES
    }
    near = {origin: names[detail.split(" ")[0]] for origin, detail in went["near"].items()}
    check_found(was, {*went["exact"]}, near, {*went["decontaminate"]})
    check_manifest(json.loads((tmp_path / "out" / "manifest.json").read_text()), len(was.rows), len(dropped))


def check_manifest(manifest: dict[str, Any], records: int, dropped: int) -> None:
    count = manifest["read"]["records"]
    assert count == manifest["read"]["rows"] == records
    for stage in manifest["stages"]:
        reasons = sum(reason["rows"] for reason in stage["dropped"].values())
        assert stage["in"] == count and stage["out"] == count - reasons
        count = stage["out"]
    assert records - dropped == count == sum(file["rows"] for file in manifest["files"])
    assert {"rensa", "unicode"} <= manifest["versions"].keys()
