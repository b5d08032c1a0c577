"""acme keeps loomtune's contracts, and does what it says."""

from __future__ import annotations

import csv
from pathlib import Path

import loomtune_acme
import pytest
from loomtune_acme.csv_tracker import Csv
from loomtune_acme.focal import Focal
from loomtune_acme.settings import CsvSettings, FocalSettings

from loomtune.errors import UserError
from loomtune.testing import check_light, check_objective, check_offer, check_tracker

ROWS = [{"prompt": "a loom ", "completion": "weaves"}, {"prompt": "warp ", "completion": "and weft, over and under"}]


def test_offers_are_whole_and_cheap_to_import() -> None:
    for offer in loomtune_acme.objectives():
        check_offer("objective", offer)
    for offer in loomtune_acme.trackers():
        check_offer("tracker", offer)
    check_light(["loomtune_acme"])


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_keeps_the_contract(gamma: float) -> None:
    check_objective(Focal(FocalSettings(gamma)), ROWS)


def test_focal_without_gamma_is_cross_entropy() -> None:
    from loomtune.batching import collate
    from loomtune.testing import toy
    from loomtune.toolkit import log_probs

    focal, plain = Focal(FocalSettings(2.0)), Focal(FocalSettings(0.0))
    tokenizer = toy.ToyTokenizer()
    batch = collate([plain.sample(row, tokenizer, 100) for row in ROWS], [0, 1], tokenizer.pad_id)
    roles = toy.roles(plain)
    log_p = log_probs(roles["policy"], batch).detach()
    assert float(plain.loss(roles, batch, {}, {}).terms["loss"].detach()) == pytest.approx(float(-log_p.sum()))
    weighed = -((1 - log_p.exp()).square() * log_p).sum()
    assert float(focal.loss(roles, batch, {}, {}).terms["loss"].detach()) == pytest.approx(float(weighed))


def test_a_gamma_whose_gradient_can_be_infinite_is_refused() -> None:
    with pytest.raises(UserError, match="neither 0 nor at least 1"):
        Focal(FocalSettings(0.5))


def test_csv_keeps_the_contract(tmp_path: Path) -> None:
    check_tracker(lambda: Csv(CsvSettings(";")), tmp_path)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open(), delimiter=";"))
    assert [row["step"] for row in rows] == ["1", "2"], "a resumed run goes on after the committed step"
