"""Rows are nearly the same where both their sides are, and what must not differ does not."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from loomtune.errors import UserError
from loomtune_plugins.stages.minhash import bands, similarity
from loomtune_plugins.stages.near import Near, apart
from loomtune_plugins.stages.settings import NearSettings
from loomtune_plugins.stages.shingles import characters_of, runs, words, words_of

LOOM = (
    "A loom is a device on which cloth is woven: it holds the warp threads under tension while the weft goes through."
)
REED = (
    "The reed keeps the warp threads apart and pushes each weft thread against the cloth that is already woven there."
)
CLOTH = "Cloth is what weavers make of warp and weft, and the loom is the frame that holds the warp tight for them."


def alike(one: dict[str, Any], other: dict[str, Any], **settings: Any) -> float:
    stage = Near(NearSettings(**settings))
    return float(stage.alike(stage.describe([one]), stage.describe([other]))[0])


def meet(one: dict[str, Any], other: dict[str, Any]) -> bool:
    stage = Near(NearSettings())
    return bool((stage.keys(stage.describe([one])) == stage.keys(stage.describe([other]))).any())


def edited(text: str) -> str:
    return text.replace("woven", "made")


def test_a_small_edit_leaves_rows_alike_and_they_meet() -> None:
    row = {"prompt": LOOM, "completion": REED}
    for side, text in row.items():
        other = {**row, side: edited(text)}
        assert 0.75 < alike(row, other) < 1 and meet(row, other)


def test_capitals_and_blanks_of_prompts_do_not_count() -> None:
    assert (
        alike({"prompt": "The  Loom\nweaves", "completion": REED}, {"prompt": "the loom weaves", "completion": REED})
        == 1
    )


CODE = "def thread(loom):\n    for warp in loom:\n        warp.lift()\n    return loom\n"


@pytest.mark.parametrize(
    "other",
    [
        CODE.replace("    return", "        return"),
        CODE.replace("loom", "Loom"),
        CODE.replace("\n", " "),
        "\uff44" + CODE[1:],
    ],
)
def test_answers_are_compared_as_they_are_laid_out(other: str) -> None:
    row = {"prompt": LOOM, "completion": CODE}
    assert alike(row, {**row, "completion": other}) < 1
    assert alike({"text": CODE}, {"text": other}) < 1
    assert alike(row, {**row, "completion": CODE.replace("for warp in", "for  warp in ") + " "}) == 1


@pytest.mark.parametrize("side", ["prompt", "completion"])
@pytest.mark.parametrize(("one", "other"), [(" 12", " 13"), ("x²", "x2"), (" 1 2", " 2 1"), ("٣", "٤")])
def test_with_other_numbers_it_is_another_row(side: str, one: str, other: str) -> None:
    row = {"prompt": LOOM, "completion": REED}
    rows = [{**row, side: row[side] + number} for number in (one, other)]
    assert alike(*rows) == 0
    assert alike(*rows, numbers=True) > 0.75


def test_one_number_asked_and_answered_is_not_another_number() -> None:
    row = {"prompt": LOOM + " 7", "completion": REED + " 8"}
    assert alike(row, {**row, "prompt": edited(LOOM) + " 7"}) > 0.75


def test_a_long_instruction_does_not_make_different_questions_alike() -> None:
    def reading(question: str, answer: str) -> dict[str, Any]:
        return {"prompt": f"{context}\n\nQuestion: {question}", "completion": answer}

    draw = random.Random(4)
    context = " ".join("".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(150))

    asked = "What is it that holds the warp threads under tension while it weaves?"
    rows = [reading(asked, REED), reading("Which part pushes the weft against the cloth, and how often?", REED)]
    assert alike(*rows) == 0 and alike(*rows, differ=0) > 0.75
    assert alike(rows[0], reading(asked.replace("weaves", "is weaving"), REED)) > 0.75
    texts = [{"text": row["prompt"]} for row in rows]
    assert alike(*texts) > 0.75, "plain text has no instruction"


def test_a_short_answer_is_equal_by_chance() -> None:
    one, other = {"prompt": LOOM, "completion": "yes"}, {"prompt": edited(LOOM), "completion": "yes"}
    assert alike(one, other) == 0 and alike(one, other, short=0) > 0.75
    assert alike(one, {**one, "prompt": LOOM.upper().replace(":", " -")}) > 0.75, "the words are the same"


def test_what_columns_name_must_be_equal() -> None:
    one, other = {"prompt": LOOM, "gold": "frame"}, {"prompt": LOOM, "gold": "reed"}
    assert alike(one, other) == 1 and alike(one, other, columns=["gold"]) == 0
    assert alike({"prompt": LOOM, "gold": None}, {"prompt": LOOM, "gold": None}, columns=["gold"]) == 1
    with pytest.raises(UserError, match="has no column gold") as refused:
        alike({"prompt": LOOM}, {"prompt": LOOM}, columns=["gold"])
    assert "stage.near.columns" in refused.value.faults[0].cure


@pytest.mark.parametrize(("length", "error"), [(300, 8), (1000, 16), (4000, 31)])
def test_the_estimate_of_what_differs_is_as_wrong_as_it_says(length: int, error: float) -> None:
    draw, near = random.Random(5), Near(NearSettings())
    estimates = []
    for _ in range(120):
        text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=length))
        cut = draw.randrange(length - 26)
        changed = text[:cut] + "".join(draw.choices("+-*/!?%&", k=26)) + text[cut + 26 :]
        one, other = (near.describe([{"prompt": made}]) for made in (text, changed))
        estimates.append(apart(similarity(one["signature"], other["signature"]), one["size"], other["size"])[0, 0])
    assert abs(np.mean(estimates) - 60) < 3 * error / 120**0.5 + 1
    assert np.std(estimates) == pytest.approx(error, rel=0.25)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": LOOM, "completion": REED}, {"prompt": LOOM, "completion": CLOTH}),
        ({"prompt": LOOM, "completion": REED}, {"prompt": CLOTH, "completion": REED}),
        ({"prompt": LOOM, "completion": REED, "label": True}, {"prompt": LOOM, "completion": REED, "label": False}),
        ({"prompt": LOOM, "completion": REED}, {"prompt": LOOM}),
        ({"prompt": LOOM, "completion": ""}, {"prompt": "", "completion": LOOM}),
        ({"prompt": LOOM, "completion": REED}, {"prompt": LOOM, "completion": REED, "tools": [{"name": "f"}]}),
        (
            {"prompt": LOOM, "answers": [REED, CLOTH], "ranks": [1, 2]},
            {"prompt": LOOM, "answers": [REED, CLOTH], "ranks": [2, 1]},
        ),
    ],
)
def test_rows_that_teach_something_else_are_not_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert alike(one, other) < 0.5


@pytest.mark.parametrize("rejected", [CLOTH, edited(REED), REED.replace("apart", "together"), REED + "!"])
def test_a_pair_with_its_sides_swapped_is_another_row_however_like_they_are(rejected: str) -> None:
    pair = {"prompt": LOOM, "chosen": REED + " Always.", "rejected": rejected}
    swapped = {"prompt": LOOM, "chosen": rejected, "rejected": REED + " Always."}
    assert alike(pair, swapped) < 0.5
    assert alike(pair, {**pair, "prompt": edited(LOOM)}) > 0.75


def test_a_ranking_in_another_order_is_another_row() -> None:
    assert alike({"prompt": LOOM, "answers": [REED, CLOTH]}, {"prompt": LOOM, "answers": [CLOTH, REED]}) < 0.5


def test_a_long_system_prompt_does_not_make_short_questions_alike() -> None:
    def chat(system: str, question: str) -> dict[str, Any]:
        turns = [("system", system), ("user", question), ("assistant", "Yes, it is, I think so.")]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    assert alike(chat(LOOM * 5, "Is it a loom?"), chat(LOOM * 5, "Are those my shoes?")) < 0.5
    assert alike(chat(LOOM * 5, "Is it a loom that you have?"), chat(LOOM * 5, "Is it a loom that you have??")) > 0.7
    assert alike(chat(LOOM, "Is it a loom?"), chat(REED, "Is it a loom?")) == 0


def test_texts_shorter_than_a_shingle_and_empty_ones_are_compared() -> None:
    assert alike({"text": "ab"}, {"text": "ab "}) == 1 and alike({"text": "ab"}, {"text": "cd"}) == 0
    assert alike({"text": "a"}, {"text": "b"}) == 0
    assert alike({"prompt": "", "completion": ""}, {"text": ""}) == 1 and alike({"text": ""}, {"text": "a"}) == 0


@pytest.mark.parametrize("shingle", ["characters", "words"])
def test_scripts_without_blanks_are_compared(shingle: str) -> None:
    text = "织布机是一种织造布料的装置，它在纬纱穿过时使经纱保持张紧，布料就这样一寸一寸地织成。"
    like, unlike = (
        text.replace("装置", "机器"),
        "今天天气很好，我们一起去公园散步，然后在湖边的小店里喝茶聊天，直到太阳下山。",
    )
    settings = {"shingle": shingle, "size": 2, "threshold": 0.5}
    assert alike({"text": text}, {"text": like}, **settings) > 0.7
    assert alike({"text": text}, {"text": unlike}, **settings) < 0.2


def test_words_are_those_of_their_script() -> None:
    assert words("It's 48/2 — Straße, 布料ok!") == ["it", "s", "48", "2", "strasse", "布", "料", "ok"]


def test_shingles_are_runs_of_neighbours_each_text_by_itself() -> None:
    texts = ["abcabc", "", "abc", "bca"]
    (numbers, offsets), *_ = runs(texts, characters_of, 3)
    assert offsets.tolist() == [0, 6, 6, 9, 12]
    first, third, fourth = set(numbers[:6].tolist()), set(numbers[6:9].tolist()), set(numbers[9:].tolist())
    assert len(first) == 5, "abc, bca, cab, and what reaches over the end"
    assert first > third, "abc, bc, c"
    assert len(first & fourth) == 1, "bca; its end is another"


def jaccard(one: str, other: str) -> float:
    sets = [{tuple(text[start : start + 5]) for start in range(len(text))} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_the_estimate_is_the_jaccard_similarity_up_to_its_error() -> None:
    draw = random.Random(3)
    errors = []
    for _ in range(200):
        text = "".join(draw.choices("abcdefghij ", k=300)).strip()
        cut = draw.randrange(len(text))
        other = text[:cut] + "".join(draw.choices("klmnop", k=draw.randrange(60))) + text[cut + draw.randrange(60) :]
        one, two = " ".join(text.split()), " ".join(other.split())
        errors.append(alike({"text": text}, {"text": other}) - jaccard(one, two))
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.5 / 256**0.5


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.75, 0.8, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("recall", [0.9, 0.99])
def test_bands_find_what_they_promise_and_longer_ones_would_not(threshold: float, recall: float) -> None:
    found = bands(threshold, 256, recall)
    assert found is not None
    rows, count = found
    assert rows * count <= 256 and 1 - (1 - threshold**rows) ** count >= recall
    longer = rows + 1
    assert longer > 256 or 1 - (1 - threshold**longer) ** (256 // longer) < recall


def test_a_description_does_not_depend_on_the_process() -> None:
    program = (
        "from loomtune_plugins.stages.near import Near; from loomtune_plugins.stages.settings import NearSettings\n"
        f"print(Near(NearSettings()).describe([{{'prompt': {LOOM!r}, 'completion': {REED!r}}}]).tobytes().hex())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == Near(NearSettings()).describe([{"prompt": LOOM, "completion": REED}]).tobytes().hex()


def test_words_of_a_text_are_numbers_that_never_change() -> None:
    assert words_of("A loom, a LOOM").tolist() == [3405396810240292928, 1253711516953209908] * 2


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"threshold": 0.4}, "stage.near.threshold"),
        ({"shingle": "letters"}, "stage.near.shingle=words"),
        ({"size": 0}, "stage.near.size"),
        ({"recall": 1.0}, "stage.near.recall"),
        ({"hashes": 3}, "stage.near.hashes"),
        ({"differ": -1}, "stage.near.differ"),
        ({"short": -1}, "stage.near.short"),
        ({"threshold": 1.0, "recall": 0.9}, "stage.near.recall"),
        ({"threshold": 1.0, "differ": 9}, "stage.near.differ"),
    ],
)
def test_settings_without_sense_are_refused_with_the_key(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as refused:
        Near(NearSettings(**settings))
    assert key in refused.value.faults[0].cure
