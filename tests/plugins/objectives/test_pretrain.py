"""Plain text: every token once, however long a document is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from loomtune import api
from loomtune.errors import UserError
from loomtune.testing import check_objective
from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.objectives.pretrain import Pretrain
from loomtune_plugins.objectives.pretrain_settings import PretrainSettings
from runs.curves import agree
from runs.worlds import Outcome, Worlds
from support import write_rows

TEXT = "over and under, over and under"


def test_it_keeps_the_contract() -> None:
    check_objective(Pretrain(PretrainSettings()), [{"text": TEXT}, {"text": "x"}, {"text": "warp and weft"}])


@pytest.mark.parametrize("length", [2, 3, 7, 8, 31, 32, 33, 100])
def test_every_token_but_the_first_is_learned_once(length: int) -> None:
    tokenizer = ToyTokenizer()
    whole = [tokenizer.bos_id, *tokenizer.encode(TEXT), tokenizer.eos_id]
    samples = Pretrain(PretrainSettings()).samples({"text": TEXT}, tokenizer, length)
    pieces = [sample.segments[0] for sample in samples]
    learned = [int(token) for piece in pieces for token in piece.tokens[piece.is_target]]
    assert learned == whole[1:]
    assert {len(piece.tokens) for piece in pieces[:-1]} <= {length} and 2 <= len(pieces[-1].tokens) <= length
    for before, after in pairwise(pieces):
        assert after.tokens[0] == before.tokens[-1] and not after.is_target[0]


def test_a_beginning_token_can_be_left_out() -> None:
    (sample,) = Pretrain(PretrainSettings(bos="never")).samples({"text": "ab"}, ToyTokenizer(), 100)
    assert sample.segments[0].tokens.tolist() == [*ToyTokenizer().encode("ab"), 2]
    with pytest.raises(UserError, match=r"objective\.bos=allways.*'always'"):
        Pretrain(PretrainSettings(bos="allways"))


@pytest.mark.parametrize("row", [{"text": ""}, {"text": None}, {"prompt": "a", "completion": "b"}])
def test_a_row_without_text_is_refused(row: dict[str, str]) -> None:
    told = "text" if "text" in row else "it has prompt, completion: set data.text="
    with pytest.raises(ValueError, match=told):
        Pretrain(PretrainSettings()).sample(row, ToyTokenizer(), 100)


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "packed": (1, ["sharding=single", "packing=true"]),
    "fsdp on 2, packed": (2, ["sharding=fsdp", "packing=true"]),
    "fsdp on 2": (2, ["sharding=fsdp", "batch.micro=1"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3"]),
}


@pytest.fixture(scope="module")
def tiny(tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rows = [{"text": "the loom weaves " * (1 + i % 9)} for i in range(24)]
    path = write_rows(tmp_path_factory.mktemp("texts") / "rows.jsonl", rows)
    learned = ["objective=pretrain", "max_length=40", "optimizer.lr=3e-3", "steps=4"]
    data = [f"model.path={tied_model}", "data=jsonl", f"data.path={path}"]
    return [*data, *learned, "tracker=[jsonl]", "checkpoint.background=false"]


@pytest.fixture(scope="module")
def alone(worlds: Worlds, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return worlds.train(1, [*tiny, "sharding=single"], tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name == "fsdp on 2, packed" else pytest.mark.slow) for name in LAYOUTS]
)
def test_one_curve_in_every_layout(
    layout: str, worlds: Worlds, alone: Outcome, tiny: list[str], tmp_path: Path
) -> None:
    size, how = LAYOUTS[layout]
    agree(worlds.train(size, [*tiny, *how], tmp_path / "run"), alone)
    assert alone.series("loss")[-1] < alone.series("loss")[0]


def test_an_epoch_visits_every_piece_of_every_document(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from loomtune.assembly import assemble
    from loomtune.catalogue import installed
    from loomtune.lease import Lease
    from loomtune.testing import toy

    given = [*(text for text in tiny if not text.startswith("steps=")), "sharding=single", f"run.dir={tmp_path / 'r'}"]
    plan = api.compose(given)
    folder = api.prepare(plan)
    run = assemble(plan, folder, installed(), toy.world(), Lease(folder, "here")).run
    samples = run.splits["train"]
    documents = {samples.origin(i) for i in range(len(samples))}
    assert len(documents) == 24 < len(samples) == run.sampler.end
    assert max(samples.lengths) == 40 and samples.cut == 0
    assert "lose" not in capsys.readouterr().err


def test_data_without_plain_text_are_refused() -> None:
    with pytest.raises(UserError, match="objective=pretrain needs `texts`"):
        api.check(api.compose(["objective=pretrain", "sharding=single"]))
