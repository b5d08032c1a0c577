"""Models that are not at hand are planned by a shape that is shipped, or by what was downloaded before."""

from __future__ import annotations

from pathlib import Path

import pytest

from loomtune import api
from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune_plugins.commands.plan.shapes import shaped, shipped


def test_a_shape_that_begins_with_another_has_all_of_it() -> None:
    plan = api.compose(["model.path=meta-llama/Llama-3.1-70B-Instruct"], processes=1)
    found = shaped(plan, installed())
    shape = found.plan.chosen("model")["shape"]
    assert found.shape == "llama31_70b"
    assert shape == api.compose(["model=llama31_70b"], processes=1).chosen("model")["shape"]
    assert shape["num_hidden_layers"] == 80 and shape["max_position_embeddings"] == 131072


def test_every_origin_is_that_of_one_shape() -> None:
    origins = [origin for _, said in shipped() for origin in said.get("origin", ())]
    assert len(origins) == len(set(origins)) > 20


def test_a_model_at_hand_stays_what_it_is(tiny_model: Path) -> None:
    plan = api.compose([f"model.path={tiny_model}"], processes=1)
    found = shaped(plan, installed())
    assert (found.plan.chosen("model"), found.shape, found.notes) == (plan.chosen("model"), "", ())


def test_roles_follow_the_policy_s_shape() -> None:
    teacher = "roles.teacher.model.path=Qwen/Qwen2.5-72B"
    plan = api.compose(["objective=distill", "model.path=Qwen/Qwen2.5-7B", teacher], processes=1)
    found = shaped(plan, installed())
    assert found.shape == "qwen2_5_7b" and len(found.notes) == 2
    assert found.plan.root.roles["teacher"]["model"]["shape"]["num_hidden_layers"] == 80


def test_what_is_neither_here_nor_shipped_is_refused_naming_what_is() -> None:
    with pytest.raises(UserError, match="no shape of that origin is shipped") as refused:
        shaped(api.compose(["model.path=nobody/knows-it"], processes=1), installed())
    assert "llama3_70b" in str(refused.value)


def test_a_hub_s_cache_counts_as_at_hand(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    config = str(tiny_model / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: config)
    found = shaped(api.compose(["model.path=meta-llama/Meta-Llama-3-8B"], processes=1), installed())
    assert found.plan.chosen("model")["path"] == str(tiny_model) and not found.notes
