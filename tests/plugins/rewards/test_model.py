"""The reward that a network gives: of the very tokens that it was trained on, and only by one that was trained."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loomtune.contracts import Answer
from loomtune.errors import UserError
from loomtune.testing import toy
from loomtune.toolkit.network import Network
from loomtune_plugins.models import templates
from loomtune_plugins.models.tokenizer import HuggingFaceTokenizer
from loomtune_plugins.objectives.reward import RewardModel
from loomtune_plugins.objectives.reward_settings import RewardSettings
from loomtune_plugins.rewards.model import TOGETHER, RewardByModel, check_same, laid
from loomtune_plugins.rewards.model_settings import ModelSettings

TALK = [{"role": "user", "content": "What is a reed?"}]
ROWS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "What is a reed?", "chosen": " A comb.", "rejected": "Grass"},
    "conversation": {"messages": TALK, "chosen": "A comb.", "rejected": "Grass"},
    "messages": {"prompt": TALK, "chosen": [{"role": "assistant", "content": "A comb."}], "rejected": "Grass"},
}


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("template", ["chatml", "gemma", "llama3", "phi3", "plain", "qwen", "zephyr", "mistral"])
def test_an_answer_is_scored_behind_the_tokens_that_the_reward_model_was_trained_on(
    template: str, form: str, tiny_model: Path
) -> None:
    tokenizer = HuggingFaceTokenizer(tiny_model, template, new_tokens=templates.MARKS[template])
    prompt, chosen, _ = RewardModel(RewardSettings()).sample(ROWS[form], tokenizer, 1000).segments
    stop = next(i for i, token in enumerate(chosen.tokens) if int(token) in tokenizer.stops)
    written = chosen.tokens[: stop + 1].tolist()
    answer = Answer(ROWS[form], prompt.tokens.tolist(), written, "A comb.", True)
    run: Any = SimpleNamespace(tokenizer=tokenizer)
    tokens = RewardByModel(ModelSettings())._tokens(run, answer)
    (sample,) = laid([(answer.prompt, tokens)], tokenizer.eos_id)
    assert sample.segments[0].tokens.tolist() == prompt.tokens.tolist()
    assert sample.segments[1].tokens.tolist() == chosen.tokens.tolist()
    assert sample.segments[1].is_target.tolist() == chosen.is_target.tolist()


def test_an_answer_that_was_cut_is_scored_where_it_was_cut(tiny_model: Path) -> None:
    tokenizer = HuggingFaceTokenizer(tiny_model, "chatml", new_tokens=templates.MARKS["chatml"])
    run: Any = SimpleNamespace(tokenizer=tokenizer)
    answer = Answer(ROWS["conversation"], [5], [7, 8], "ab", False)
    assert RewardByModel(ModelSettings())._tokens(run, answer) == [7, 8]


def test_answers_to_one_prompt_are_laid_behind_it_so_many_at_a_time() -> None:
    texts = [([5, 6], [7])] * (TOGETHER + 1) + [([5], [])] + [([5, 6], [8, 9])]
    samples = laid(texts, 2)
    assert [len(sample.segments) - 1 for sample in samples] == [TOGETHER, 1, 1, 1]
    assert [sample.targets for sample in samples] == [TOGETHER, 1, 1, 1]
    assert samples[2].segments[1].tokens.tolist() == [2], "nothing was said: scored where the prompt ends"
    assert samples[3].segments[1].tokens.tolist() == [8, 9, 2]


class Told:
    """A run that gives each text the sum of its tokens."""

    tokenizer = SimpleNamespace(eos_id=2)
    model = SimpleNamespace(context=lambda: 10)
    virtual_tokens = 1

    def read(self, samples: Any, reader: Any) -> list[np.ndarray]:
        return [np.array([float(s.tokens[:-1].sum()) for s in one.segments[1:]], np.float32) for one in samples]


def scores(*answers: list[int], **settings: float) -> list[float]:
    run: Any = Told()
    given = [Answer({"prompt": ""}, [5], tokens, "", False) for tokens in answers]
    return RewardByModel(ModelSettings(**settings)).score(run, given)


def test_scores_are_shifted_scaled_and_clipped_in_this_order() -> None:
    assert scores([3], [4, 4]) == [3.0, 8.0]
    assert scores([3], [4, 4], shift=2.0, scale=0.5) == [0.5, 3.0]
    assert scores([3], [4, 4], shift=4.0, scale=-1.0, clip=2.0) == [1.0, -2.0]


def test_an_answer_behind_which_there_is_no_room_has_no_score() -> None:
    found = scores([1] * 7, [1] * 8, [1] * 7)
    assert found[0] == found[2] == 7.0 and math.isnan(found[1])


def test_a_frozen_network_whose_files_have_no_head_is_refused() -> None:
    frozen = Network(toy.spec(trained=False, heads=["reward"]))
    with pytest.raises(UserError, match=r"hold no heads\.reward\.weight: drawn at random"):
        frozen.initial("heads.reward.weight", None)
    drawn = Network(toy.spec(heads=["_value"])).initial("heads._value.weight", None)
    assert drawn.shape == (1, toy.WIDTH), "one that is trained begins anew"


class Valued(toy.Drawn):
    """Files of a run that trained a value."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(), "heads._value.weight": (1, toy.WIDTH)}


class ValuedModel(toy.ToyModel):
    def weights(self, seed: int) -> Any:
        return Valued(seed)


def test_a_value_is_no_reward() -> None:
    with pytest.raises(UserError, match=r"hold no heads\.reward\.weight"):
        Network(toy.spec(ValuedModel(), trained=False, heads=["reward"])).initial("heads.reward.weight", None)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [({"a": (3, 4)}, r"\(3, 4\) in it and \(2, 4\)"), ({}, "not there in it"), ({"a": (2, 4), "b": (1,)}, "'b'")],
)
def test_an_adapter_of_another_form_is_not_worn(theirs: dict[str, tuple[int, ...]], told: str) -> None:
    ours = {"a": (2, 4), "heads._value.weight": (1, 4)}
    check_same(ours, {"a": (2, 4), "heads.reward.weight": (1, 4)}, "x")
    with pytest.raises(UserError, match=told):
        check_same(ours, theirs, "x")


def test_who_lends_the_policys_network_asks_for_no_role() -> None:
    assert not RewardByModel(ModelSettings(adapter="runs/x")).roles()
    spec = RewardByModel(ModelSettings()).roles()["reward"]
    assert not spec.trained and spec.head == "reward" and spec.twin_of is None
