import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from loomtune.contracts import Sample
from loomtune.contracts.role import View
from loomtune.errors import UserError
from loomtune.samples import Source, chain, prepare
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.jsonl import Jsonl
from loomtune_plugins.models.tokenizer import HuggingFaceTokenizer
from loomtune_plugins.objectives.sft import Sft
from loomtune_plugins.objectives.sft_settings import SftSettings

SHARED = Path(os.environ.get("LOOMTUNE_SHARED", Path(__file__).parents[4] / "shared"))
ROW = {"prompt": "Question: How many? Answer: ", "completion": "A and four."}


def ids(sample: Sample) -> list[int]:
    return [int(token) for token in sample.segments[0].tokens]


def targets(sample: Sample) -> list[int]:
    return [int(token) for token in sample.segments[0].tokens[sample.segments[0].is_target]]


def sampled(row, tokenizer, length: int = 10_000, **settings: str) -> Sample:
    return Sft(SftSettings(**settings)).sample(row, tokenizer, length)


def test_a_completion_and_the_end_token_are_learned_and_the_prompt_is_not(tokenizer) -> None:
    made = tokenizer()
    sample = sampled(ROW, made)
    assert made.decode(ids(sample), special=True) == "Question: How many? Answer: A and four.</s>"
    assert made.decode(targets(sample), special=True) == "A and four.</s>"


@pytest.mark.parametrize("pieces", [False, True], ids=["byte level", "blank first"])
@pytest.mark.parametrize("prompt", ["Answer: ", "Answer:", "Answer:\n", "", "Hi"])
def test_a_sample_begins_with_the_tokens_that_the_prompt_has_alone(tokenizer, prompt: str, pieces: bool) -> None:
    made = tokenizer(pieces=pieces, adds_bos=True)
    for completion in ("A", " A", "A A and four", "\nA"):
        row = {"prompt": prompt, "completion": completion}
        asked = Sft(SftSettings()).prompt(row, made)
        sample = sampled(row, made)
        assert ids(sample)[: len(asked)] == asked
        assert targets(sample) == ids(sample)[max(1, len(asked)) :]


def test_a_token_that_would_straddle_the_border_is_not_used(tokenizer) -> None:
    made = tokenizer()
    whole = made.encode("Answer: A")
    assert whole[: len(made.encode("Answer: "))] != made.encode("Answer: "), "or this test shows nothing"
    sample = sampled({"prompt": "Answer: ", "completion": "A"}, made)
    assert ids(sample) == [*made.encode("Answer: "), *made.encode("A"), made.eos_id]


def test_a_tokenizer_that_begins_texts_with_a_blank_does_not_add_one_between_prompt_and_completion(tokenizer) -> None:
    made = tokenizer(pieces=True)
    assert ids(sampled({"prompt": "Answer:", "completion": " four"}, made))[:-1] == made.encode("Answer: four")


def test_plain_text_is_learned_from_its_second_token_on(tokenizer) -> None:
    made = tokenizer()
    sample = sampled({"text": "Hi there."}, made)
    assert ids(sample) == [*made.encode("Hi there."), made.eos_id]
    assert targets(sample) == ids(sample)[1:]


def test_all_tokens_but_the_first_are_learned_where_that_is_asked(tokenizer) -> None:
    sample = sampled(ROW, tokenizer(), train_on="all")
    assert targets(sample) == ids(sample)[1:]


def test_the_separator_belongs_to_the_prompt(tokenizer) -> None:
    made = tokenizer()
    sample = sampled({"prompt": "Hi", "completion": "Hello"}, made, separator="\n\n")
    assert made.decode(ids(sample)) == "Hi\n\nHello"
    assert made.decode(targets(sample)) == "Hello"


@pytest.mark.parametrize(
    ("adds_bos", "bos", "begins"),
    [(True, "auto", True), (False, "auto", False), (False, "always", True), (True, "never", False)],
)
def test_a_text_begins_as_the_tokenizer_does_unless_told_otherwise(tokenizer, adds_bos, bos, begins) -> None:
    made = tokenizer(adds_bos=adds_bos)
    for row in (ROW, {"text": "Hi there."}):
        assert (ids(sampled(row, made, bos=bos))[0] == made.bos_id) is begins


def test_a_beginning_or_an_end_that_the_text_brings_along_is_not_doubled(tokenizer) -> None:
    made = tokenizer(adds_bos=True)
    for row in ({"prompt": "<s>Hi", "completion": "Hello</s>"}, {"text": "<s>HiHello</s>"}):
        made_ids = ids(sampled(row, made))
        assert (made_ids.count(made.bos_id), made_ids.count(made.eos_id)) == (1, 1)


def test_a_long_row_is_cut_at_its_end_and_gets_no_end_token_there(tokenizer) -> None:
    made = tokenizer()
    whole, cut = sampled(ROW, made), sampled(ROW, made, 12)
    assert ids(cut) == ids(whole)[:12]
    assert made.eos_id not in ids(cut)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi"}, "neither a completion nor messages nor text"),
        ({"prompt": "Hi", "chosen": "A", "rejected": "B"}, "it has prompt, chosen, rejected: .*data.completion=chosen"),
        ({"prompt": None, "completion": "A"}, "no text as its prompt"),
        ({"prompt": "Hi", "completion": 3}, "no text as its completion"),
        ({**ROW, "label": False}, "is an unwanted answer; objective=kto learns from it, or leave such rows out"),
    ],
)
def test_a_row_that_cannot_be_learned_from_says_why(tokenizer, row, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        sampled(row, tokenizer())


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"train_on": "completions"}, "Did you mean 'completion'"),
        ({"turns": "first"}, "all or last"),
        ({"bos": "maybe"}, "auto or always or never"),
        ({"train_on": "all", "turns": "last"}, "leave one of them out"),
    ],
)
def test_settings_that_are_none_or_contradict_each_other_are_refused(settings, cure: str) -> None:
    with pytest.raises(UserError, match=cure):
        Sft(SftSettings(**settings))


def test_wanted_answers_are_learned_and_a_class_of_0_is_no_label(tokenizer) -> None:
    plain = ids(sampled(ROW, tokenizer()))
    assert ids(sampled({**ROW, "label": True}, tokenizer())) == plain == ids(sampled({**ROW, "label": 0}, tokenizer()))


def test_half_of_the_labelled_queries_are_no_answers_to_learn(tokenizer) -> None:
    from loomtune_plugins.data.sql_quiz_data import SqlLabels
    from loomtune_plugins.data.sql_quiz_settings import SqlQuizSettings

    refused = 0
    for row in SqlLabels(SqlQuizSettings(train=20)).rows("train"):
        with suppress(ValueError):
            sampled(row, tokenizer())
            assert row["label"]
            continue
        refused += 1
        assert not row["label"]
    assert 0 < refused < 20


def test_another_setting_has_another_fingerprint() -> None:
    variants = [SftSettings(), SftSettings(train_on="all"), SftSettings(turns="last"), SftSettings(separator=" ")]
    assert len({Sft(settings).fingerprint() for settings in variants}) == len(variants)


def test_the_loss_is_a_sum_and_its_weight_the_number_of_targets() -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    head, hidden, target = nn.Linear(4, 7), torch.randn(3, 4), torch.tensor([1, 5, 0])
    view = View(hidden, slice(None), {"lm": head}, {})
    role = SimpleNamespace(head="lm", read=lambda batch, reader: reader(view))
    batch = SimpleNamespace(target=target)
    objective = Sft(SftSettings())
    weight = objective.weights(batch)["loss"]
    loss = objective.loss({"policy": role}, batch, {"loss": 100.0}, {}).terms["loss"]
    assert weight == 3
    torch.testing.assert_close(loss / weight, nn.functional.cross_entropy(head(hidden), target))


@pytest.mark.skipif(not (SHARED / "references" / "sft.json").is_file(), reason="needs ../shared/references")
@pytest.mark.parametrize(("train_on", "case"), [("completion", "completion_only"), ("all", "full_sequence")])
def test_rows_become_the_tokens_and_targets_that_trl_makes_of_them(train_on: str, case: str) -> None:
    recorded = json.loads((SHARED / "references" / "sft.json").read_text())
    tokenizer = HuggingFaceTokenizer(SHARED / "references" / "tokenizer")
    samples = [sampled(row, tokenizer, train_on=train_on) for row in recorded["rows"]]
    for sample, expected, mask in zip(
        samples, recorded["batch"]["input_ids"], recorded["batch"]["attention_mask"], strict=True
    ):
        assert ids(sample) == expected[: sum(mask)]
    if train_on == "completion":
        for sample, labels in zip(samples, recorded["batch"]["labels"], strict=True):
            at = np.flatnonzero(np.array(labels) != -100)
            assert np.flatnonzero(sample.segments[0].is_target).tolist() == at.tolist()
    expected_targets = {entry["name"]: entry["num_target_tokens"] for entry in recorded["cases"]}[case]
    assert sum(sample.targets for sample in samples) == expected_targets


@pytest.mark.skipif(not (SHARED / "data" / "gsm8k").is_dir(), reason="needs ../shared/data and ../shared/models")
def test_gsm8k_becomes_samples_that_end_and_learn_the_answer_alone(tmp_path: Path) -> None:
    settings = FileSettings(
        path=str(SHARED / "data" / "gsm8k" / "train.jsonl"), prompt="question", completion="answer", limit=200
    )
    data, tokenizer = Jsonl(settings), HuggingFaceTokenizer(SHARED / "models" / "stories260k")
    source = Source(data, Sft(SftSettings(separator="\n")), tokenizer, "train", 512)
    samples = prepare(source, tmp_path, 512)
    assert len(samples) == 200
    for index, row in enumerate(data.rows("train")):
        sample = samples[index]
        if sample.length < 512:
            assert tokenizer.decode(ids(sample), special=True) == f"{row['prompt']}\n{row['completion']}</s>"
            assert tokenizer.decode(targets(sample), special=True) == f"{row['completion']}</s>"
    whole = [ids(samples[index])[-1] == tokenizer.eos_id for index in range(200)]
    assert samples.cut == whole.count(False) > 0
    assert [chain(sample) for sample in samples] == samples.lengths.tolist()


def test_rows_become_samples_without_torch() -> None:
    program = (
        "import sys, loomtune_plugins.objectives.sft, loomtune_plugins.objectives; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
