"""A model of this machine, asked as a service is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loomtune import api
from loomtune.errors import UserError
from loomtune_plugins.endpoint import Ask, Client, EndpointSettings, opened
from services import serving
from support import write_rows


def client(model: Path | str, folder: Path, **more: Any) -> Client:
    made = opened(EndpointSettings(model=str(model), cache=str(folder), **more), "stage.x")
    made.check()
    return made


def asks(**more: Any) -> list[Ask]:
    said = ("Hi", "What is a loom?", "Say something of cloth and of weaving.")
    return [Ask(messages=[{"role": "user", "content": one}], **{"max_tokens": 6, **more}) for one in said]


def test_what_is_drawn_hangs_on_the_question_alone(tiny_model: Path, tmp_path: Path) -> None:
    together = client(tiny_model, tmp_path / "1").answer([*asks(), *asks(draw=1)])
    alone = [client(tiny_model, tmp_path / "2", batch=1).answer([ask])[0] for ask in [*asks(), *asks(draw=1)]]
    assert together == alone
    assert together[:3] != together[3:], "another draw is another answer"
    assert all(reply.text and reply.tokens[1] <= 6 for reply in together)


def test_it_is_asked_once(tiny_model: Path, tmp_path: Path) -> None:
    first = client(tiny_model, tmp_path).answer(asks())
    again = client(tiny_model, tmp_path)
    assert again.answer(asks()) == first and again.asked == 0
    assert "_role" not in vars(again.source), "no weights are read for what is known"


def test_options_are_the_next_tokens_log_probabilities(tiny_model: Path, tmp_path: Path) -> None:
    made = client(tiny_model, tmp_path)
    ask = asks(options=("A", "B"))[0]
    (reply,) = made.answer([ask])
    source: Any = made.source
    with source._role.engine.gathered() as module, torch.no_grad():
        logits = module(input_ids=torch.tensor([source._tokens(ask)])).logits[0, -1]
    values = logits.log_softmax(-1)
    for letter in "AB":
        spelt = [n for n in range(len(values)) if source._tokenizer.decode([n]).strip() == letter]
        assert spelt
        assert reply.log_probs[letter] == pytest.approx(float(values[spelt].logsumexp(0)), rel=1e-5)


def test_a_prompt_that_leaves_no_room_is_refused_alone(tiny_model: Path, tmp_path: Path) -> None:
    long = Ask(messages=[{"role": "user", "content": "warp and weft " * 5000}], max_tokens=4)
    found = client(tiny_model, tmp_path).answer([asks()[0], long])
    assert [reply.refused for reply in found] == [False, True] and "no room" in found[1].failed


def test_a_run_is_asked_in_the_form_that_it_learned(tiny_model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "warp", "completion": "weft"}] * 4)
    words = [f"model.path={tiny_model}", "data=jsonl", f"data.path={rows}", "objective.separator='\n=> '", "steps=1"]
    words += ["batch.size=2", "tracker=[jsonl]", f"run.dir={tmp_path / 'run'}"]
    assert api.train(words).status == "completed"
    source: Any = client(tmp_path / "run", tmp_path).source
    one, other = (
        source._said(Ask(messages=[{"role": "user", "content": "warp"}], opening=opening)) for opening in ("", "(")
    )
    assert one.endswith("warp\n=> ") and other == f"{one}("


def test_without_a_template_it_is_plain_text(tiny_model: Path, tmp_path: Path) -> None:
    source: Any = client(tiny_model, tmp_path, api="completions").source
    assert source._said(asks()[0]).endswith("Human: Hi\n\nAssistant:")


def test_a_folder_that_is_none_is_told_with_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage\.x\.model=.*none") as raised:
        client(tmp_path / "none", tmp_path)
    assert "stage.x.url" in str(raised.value)


def test_a_service_and_a_model_here_answer_in_the_same_form(tiny_model: Path, tmp_path: Path) -> None:
    with serving() as service:
        there = client("m", tmp_path, url=service.url).answer(asks())
    here = client(tiny_model, tmp_path).answer(asks())
    assert [type(reply) for reply in there] == [type(reply) for reply in here] and len(there) == len(here)
