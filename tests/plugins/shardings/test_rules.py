"""Combinations that set values make impossible are refused before any process exists, each with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from loomtune import api, cli
from loomtune.errors import UserError

LORA = ["adapter=lora"]

REFUSED = [
    (
        [*LORA, "sharding=fsdp", "sharding.tensor=2"],
        2,
        "sharding.tensor=2 cuts linear layers, which adapter=lora",
    ),
    (["sharding=single"], 2, "sharding=single runs on one process, not on 2"),
    (["sharding=fsdp", "sharding.replicate=2"], 3, "3 processes cannot be divided by sharding.replicate=2"),
    (["sharding=fsdp", "sharding.tensor=2"], 3, "3 processes cannot be divided by sharding.tensor=2"),
    (["sharding=ddp", "sharding.sequence=2"], 3, "3 processes cannot be divided by sharding.sequence=2"),
    (["sharding=zero", "sharding.stage=0", "precision=bf16"], 2, "in bf16 DeepSpeed's Adam takes one step too many"),
    (["sharding=zero", "sharding.stage=0"], 2, "sharding.stage=0 partitions nothing"),
    (["sharding=zero", "sharding.stage=4"], 2, "ZeRO has no stage 4"),
    (["sharding=ddp", "sharding.bucket_mb=-1"], 2, "sharding.bucket_mb=-1 holds nothing"),
    (["sharding=zero", "sharding.stage=1", "sharding.offload=all"], 2, "sharding.offload=all moves parameters"),
]


@pytest.mark.parametrize(("settings", "processes", "reason"), REFUSED, ids=[reason for _, _, reason in REFUSED])
def test_what_is_known_to_be_wrong_is_refused_with_its_reason_and_exit_code_2(
    settings: list[str], processes: int, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *settings, f"launcher.procs={processes}", f"run.dir={tmp_path / 'run'}"])
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    (line, cure) = [text for text in said.splitlines() if text]
    assert reason in line and cure.strip().startswith("cure: set ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        [*LORA, "sharding=fsdp", "sharding.tensor=1"],
        ["adapter=full", "sharding=fsdp", "sharding.tensor=2"],
        ["sharding=zero", "sharding.stage=1", "precision=bf16"],
    ],
    ids=" ".join,
)
def test_what_is_near_to_it_is_let_through(settings: list[str]) -> None:
    try:
        api.check(api.compose(settings, processes=2))
    except UserError as error:
        pytest.fail(str(error))
