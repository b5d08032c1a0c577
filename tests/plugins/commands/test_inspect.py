"""`loomtune inspect`: the rows and figures of a run that would read these data, and the words of one that would not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loomtune import api, cli
from loomtune.contracts import Sample
from loomtune.placement import MicroLimit, place
from loomtune.run import Run
from loomtune.session import collated, drawn, looked_at
from loomtune_plugins.commands.inspect.doubts import doubts
from loomtune_plugins.commands.inspect.figures import Figures, figures, histogram
from loomtune_plugins.commands.inspect.layout import layout
from loomtune_plugins.commands.inspect.reading import lines
from loomtune_plugins.commands.inspect.spelling import Speller
from support import mixed_rows, shared, write_rows

Inspect = Callable[..., str]
ALONE = ("launcher.procs=1",)


@pytest.fixture
def inspect(tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Inspect:
    """The command over the tiny model; gives what it printed. ends: with which exit code."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def called(*words: object, ends: int = 0) -> str:
        model = [] if any(str(word).startswith("model") for word in words) else [f"model.path={tiny_model}"]
        with pytest.raises(SystemExit) as ended:
            cli.main(["inspect", *map(str, words), *model])
        told = capsys.readouterr()
        assert ended.value.code == ends, told.err
        return told.err if ends else told.out

    return called


@pytest.fixture(scope="module")
def looked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A run that is looked at, of these rows; equal settings are composed once."""
    folder = tmp_path_factory.mktemp("looked")
    composed = cache(lambda *given: api.compose([f"model.path={tiny_model}", "data=jsonl", *ALONE, *given]))

    def made(rows: Iterable[dict[str, Any]], *settings: str) -> Run:
        path = write_rows(folder / f"{len(list(folder.iterdir()))}.jsonl", rows)
        plan = composed("data.path=rows.jsonl", *settings)
        data = {**plan.chosen("data"), "path": str(path)}
        return looked_at(replace(plan, settings={**plan.settings, "data": data}))

    return made


def shown(run: Run, sample: Sample) -> list[tuple[list[int], list[bool]]]:
    return [(segment.tokens.tolist(), segment.is_target.tolist()) for segment in sample.segments]


@pytest.mark.parametrize("settings", [(), ("packing=true", "batch.micro=2")])
@pytest.mark.parametrize("ranks", [1, 3])
def test_each_row_of_a_step_is_shown_once_with_its_own_targets(
    looked: Callable[..., Run], settings: tuple[str, ...], ranks: int
) -> None:
    run = looked(mixed_rows(20), "batch.size=8", "seed=3", *settings)
    run = replace(run, world=replace(run.world, replicas=ranks))
    rows = next(drawn(run, "train"))
    documents = [row for line in lines(collated(run, "train", rows)) for row in line.documents]
    assert sorted(row.number for row in documents) == list(range(8))
    for row in documents:
        expected = shown(run, run.splits["train"][rows[row.number]])
        assert [(part.tokens, part.learned) for part in row.parts] == expected


def test_a_row_is_shown_by_its_number_and_by_its_words(inspect: Inspect, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "some.jsonl", [{"prompt": f"{n}? ", "completion": f"answer {n}"} for n in range(40)])
    assert "── some.jsonl:7 ─ 12 tokens · 9 targets" in inspect(path, "--row", 7)
    assert "\n6?·«answer 6</s>»\n" in inspect(path, "--row", 7)
    assert "\n3│1│?│·│«a│n" in inspect(path, "--find", "answer 31", "--tokens")
    assert inspect(path, "--find", "answer 3").count("── some.jsonl:") == 3
    assert "── some.jsonl:39 ─" in inspect(path, "--find", "some.jsonl:39", "--rows", "0")


def test_a_long_row_is_cut_on_the_terminal_unless_it_is_asked_for(inspect: Inspect, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "long.jsonl", [{"prompt": "ab " * 20, "completion": "cd " * 12 + "x" * 9}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loomtune_plugins.commands.inspect.rows.HEAD", 50)
        patch.setattr("loomtune_plugins.commands.inspect.rows.TAIL", 6)
        told = inspect(path)
        assert "… 50 tokens, 40 targets …" in told and "xxxxx</s>»" in told and "x" * 9 not in told
        assert "…" not in inspect(path, "--row", 1).partition("split train")[0].partition("edge")[2]


def test_pairs_are_shown_as_a_prompt_and_two_answers(inspect: Inspect, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "which? ", "chosen": "this", "rejected": "that"}])
    for share in ("always", "never"):
        told = inspect(path, "objective=dpo", f"batch.share={share}")
        assert told.count("which?") == 1
        parts = told.partition("pairs.jsonl:1")[2].splitlines()[1:7]
        assert parts == [
            "▸ prompt 7 tokens · 0 targets",
            "which?·",
            "▸ chosen 5 tokens · 5 targets",
            "«this</s>»",
            "▸ rejected 5 tokens · 5 targets",
            "«that</s>»",
        ]


def test_labels_and_margins_stand_beside_their_rows(inspect: Inspect, tmp_path: Path) -> None:
    rows = [{"prompt": "p ", "completion": text, "label": text == "good"} for text in ("good", "bad")]
    told = inspect(write_rows(tmp_path / "labels.jsonl", rows), "objective=kto", "objective.variant=apo_zero_unpaired")
    assert "labels.jsonl:1 ─ 7 tokens · 5 targets · label=1" in told
    assert "labels.jsonl:2 ─ 6 tokens · 4 targets · label=0" in told
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "p ", "chosen": "a", "rejected": "b", "by": 2}])
    scored = inspect(pairs, "objective=reward", "objective.margin=by")
    assert "margin=2" in scored and "«target: a score is read before it»" in scored


def test_a_packed_row_shows_the_border_between_its_rows(inspect: Inspect, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}? ", "completion": "a"} for n in range(4)]
    told = inspect(write_rows(tmp_path / "short.jsonl", rows), "packing=true", "batch.size=4", "--rows", "1", *ALONE)
    assert "━━ packed row 1 ━ 4 rows · 20 of 20 tokens" in told
    assert told.count("\n── short.jsonl:") == 4


@pytest.mark.parametrize("ranks", [1, 2])
def test_how_full_batches_are_is_a_count_over_the_run_s_own_steps(looked: Callable[..., Run], ranks: int) -> None:
    run = looked(mixed_rows(50), "batch.size=8", "batch.micro=3", "max_length=90")
    run = replace(run, world=replace(run.world, replicas=ranks))
    found = layout(run, "train")
    assert (found.epoch, found.run, found.steps, found.rows) == (7, 7, 7, 50)
    for filling, width in ((found.plain, 0), (found.packed, 90)):
        places = tokens = batches = 0
        for first in range(0, 50, 8):
            rows = run.sampler.order.rows(first, min(first + 8, 50)).tolist()
            lengths = [int(run.splits["train"].lengths[row]) for row in rows]
            for micro in chain.from_iterable(place(range(len(rows)), lengths, ranks, MicroLimit(3, packed=width))):
                taken = [sum(lengths[i] for i in row) for row in micro.rows]
                places += len(taken) * max(taken) if taken else 1  # one without rows has a place all the same
                tokens, batches = tokens + sum(taken), batches + 1
        assert (filling.places, filling.tokens, filling.batches) == (places, tokens, batches)
    assert found.packed.efficiency > found.plain.efficiency


def test_figures_of_a_split_are_counts_of_its_samples(looked: Callable[..., Run]) -> None:
    rows = [{**row, "prompt": f"{n}: {row['prompt']}"} for n, row in enumerate(mixed_rows(12))]
    again = [rows[4], rows[9], {**rows[4], "completion": "another answer"}]
    run = looked([*rows, *again])
    found = figures(run, "train")
    samples = [run.splits["train"][n] for n in range(15)]
    assert (found.samples, found.rows, found.tokens) == (15, 15, sum(sample.length for sample in samples))
    assert found.targets == sum(sample.targets for sample in samples)
    assert found.equal.count == 2 and found.equal.first[0].endswith(":13 = " + run.splits["train"].origin(4))
    assert found.asked.count == 1
    assert found.asked.first[0].endswith(f":15 asks what {run.splits['train'].origin(4)}")
    assert found.ends == {2: 15} and sum(found.begins.values()) == 15
    assert found.percentile(100) == max(sample.length for sample in samples)
    assert sum(count for *_, count in histogram(found.lengths)) == 15
    assert any("again, token by token" in doubt.what for doubt in doubts(run, "train", found, Speller(run.tokenizer)))


def test_answers_that_differ_in_their_label_are_no_duplicates(looked: Callable[..., Run]) -> None:
    rows = [{"prompt": "p ", "completion": "a", "label": label} for label in (True, False, True)]
    found = figures(looked(rows, "objective=kto", "objective.variant=apo_zero_unpaired"), "train")
    assert (found.equal.count, found.asked.count) == (1, 1)


def told(run: Run) -> tuple[Figures, str]:
    found = figures(run, "train")
    return found, "\n".join(
        f"{doubt.what}: {doubt.cure}" for doubt in doubts(run, "train", found, Speller(run.tokenizer))
    )


def test_what_is_odd_is_told_with_a_cure(looked: Callable[..., Run]) -> None:
    _, two = told(looked([{"prompt": "<s><s>who? ", "completion": "me</s></s>"}, {"prompt": "a ", "completion": "b"}]))
    assert "1 of 2 samples begin with '<s>' twice" in two and "set objective.bos=never" in two
    assert "1 of 2 samples end with '</s>' twice" in two
    _, cut = told(looked([{"prompt": "a ", "completion": "b" * 40}], "max_length=20"))
    assert "all 1 samples do not end with a target '</s>'" in cut and "raise max_length" in cut
    _, empty = told(looked([{"prompt": "a ", "completion": ""}, {"prompt": "a ", "completion": "b"}]))
    assert "1 of 2 samples teach nothing but to end at once" in empty
    _, good = told(looked(mixed_rows(10, seed=2)))
    assert good == ""


def test_a_document_that_goes_on_in_another_sample_is_not_without_its_end(looked: Callable[..., Run]) -> None:
    found, warnings = told(looked([{"text": "".join(map(chr, range(33, 126)))}], "objective=pretrain", "max_length=20"))
    assert (found.rows, found.samples) == (1, 5) and warnings == ""


def test_a_prompt_that_runs_into_its_answer_is_told(looked: Callable[..., Run]) -> None:
    rows = [{"prompt": f"how many of {n}?", "completion": f"It is {n}."} for n in range(9)]
    assert "prompts run into their answers with nothing between: '... of 0?' then 'I...'" in told(looked(rows))[1]
    assert "run into" not in told(looked(rows, 'objective.separator=" "'))[1]


def test_answers_that_all_begin_alike_are_told(looked: Callable[..., Run]) -> None:
    rows = [{"prompt": f"{n}: ", "completion": f"#{n}"} for n in range(60)]
    assert "in every sample the first target is '#'" in told(looked(rows))[1]
    assert "in every sample" not in told(looked([*rows, {"prompt": "x ", "completion": "y"}]))[1]


@pytest.mark.parametrize(
    "lengths", [[5], [5, 5, 5], list(range(10, 300)), [*range(50, 150)] * 20 + [90_000], [0, 1], [511, 512] * 9]
)
def test_a_histogram_has_few_round_bins_that_hold_every_length_once(lengths: list[int]) -> None:
    bins = histogram(np.array(lengths, np.int64))
    assert 1 <= len(bins) <= 16
    for begin, end, count in bins:
        assert count == sum(begin <= length <= end for length in lengths)
    assert sum(count for *_, count in bins) == len(lengths)
    assert [begin for begin, *_ in bins[1:]] == [end + 1 for _, end, _ in bins[:-1]]
    assert sum(count > 0 for *_, count in bins) >= min(3, len(set(lengths)) // 30)


def test_no_lengths_are_no_histogram() -> None:
    assert histogram(np.zeros(0, np.int64)) == []


def test_json_holds_the_figures(inspect: Inspect, mixed_data: Path) -> None:
    found = json.loads(inspect(mixed_data, "--json", "batch.size=8"))
    assert found["samples"] == 61 and found["steps"]["epoch"] == 8
    assert 0 < found["target_share"] == found["targets"] / found["tokens"] < 1
    assert found["filling"]["packed"]["efficiency"] > found["filling"]["unpacked"]["efficiency"]
    assert found["last_tokens"][0] == {"token": 2, "text": "</s>", "samples": 61}


def test_a_page_is_written(inspect: Inspect, mixed_data: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert inspect(mixed_data, "--html", page).strip() == str(page)
    text = page.read_text()
    assert text.count('<article class="row">') == 3 and '<span class="end">&lt;/s&gt;</span>' in text
    assert "--html" in inspect(mixed_data, "--html", tmp_path / "no" / "page.html", ends=2)


def test_data_are_a_file_or_a_pattern_of_any_kind(inspect: Inspect, mixed_data: Path, tmp_path: Path) -> None:
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(mixed_data.read_bytes()))
    assert json.loads(inspect(packed, "--json"))["samples"] == 61
    pattern, settings = mixed_data.parent / "mix*.jsonl", ["data=jsonl", "data.holdout_rows=9"]
    held_out = json.loads(inspect(pattern, *settings, "--json", "--split", "validation"))
    assert (held_out["data"], held_out["split"]) == ("jsonl", "validation") and held_out["rows"] >= 9


def test_a_run_s_folder_is_shown_with_its_own_settings(
    inspect: Inspect, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", mixed_rows(9))
    given = [f"model.path={tiny_model}", "data=jsonl", f"data.path={path}", "max_length=50", "packing=true", "steps=2"]
    folder = api.prepare(api.compose([*given, f"run.dir={tmp_path / 'run'}"]))
    before = sorted(folder.iterdir())
    found = json.loads(inspect(folder, "--json", "model.path=" + str(tiny_model)))
    assert (found["max_length"], found["samples"], found["steps"]["run"]) == (50, 9, 2)
    assert sorted(folder.iterdir()) == before
    write_rows(path, mixed_rows(9, seed=5))
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(folder), "--rows", "0"])
    assert "was made with other samples of train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["no_such.jsonl"], "no_such.jsonl"),
        (["{rows}", "optimiser.lr=1"], "optimiser"),
        (["{rows}", "--split", "tran"], "the data have no split 'tran'. Did you mean 'train'?"),
        (["{rows}", "--row", "62"], "--row 62: split train has 61 samples"),
        (["{rows}", "--find", "no such words"], "nothing of split train contains 'no such words'"),
        (["{rows}", "{rows}"], "2 names are given"),
        (["{rows}", "--rows", "-1"], "--rows -1 is negative"),
        (["{folder}"], "neither a run's folder"),
        (["{rows}", "max_length=1000"], "max_length=1000 is longer than the model's context"),
        (["{rows}", "objective=dpo"], "cannot be learned from"),
    ],
)
def test_mistakes_end_it_with_a_cure(inspect: Inspect, mixed_data: Path, words: list[str], what: str) -> None:
    error = inspect(*(w.format(rows=mixed_data, folder=mixed_data.parent) for w in words), ends=2)
    assert what in error and "cure: " in error


def test_the_shipped_model_s_task_is_shown_with_no_word_of_the_question_learned(
    inspect: Inspect, capsys: pytest.CaptureFixture[str]
) -> None:
    told = inspect(
        "model=huggingface", "data=sql_quiz", "data.train=30", "data.validation=5", "data.test=5", "--rows", 30
    )
    rows = told.partition("\n── ")[2].partition("\n━━ split")[0].split("\n── ")
    assert len(rows) == 30
    for row in rows:
        text = row.partition("\n")[2]
        assert text.count("«") == text.count("»") == 1
        assert text.startswith("<bos>Tables: ") and "SQL:⏎\n«SELECT " in text and text.rstrip().endswith("<eos>»")


def test_of_gsm8k_the_targets_are_the_answer_and_its_end(tmp_path: Path) -> None:
    model, data = shared("models", "stories260k"), shared("data", "gsm8k", "train.jsonl")
    with data.open() as file:
        rows = [json.loads(next(file)) for _ in range(8)]
    path = write_rows(tmp_path / "some.jsonl", rows)
    columns = ["data.prompt=question", "data.completion=answer", 'objective.separator="\\n"']
    run = looked_at(api.compose([f"model.path={model}", "data=jsonl", f"data.path={path}", *columns, "packing=true"]))
    for line in lines(collated(run, "train", range(8))):
        for row in line.documents:
            (part,) = row.parts
            learned = [t for t, is_target in zip(part.tokens, part.learned, strict=True) if is_target]
            assert run.tokenizer.decode(learned, special=True) == rows[row.number]["answer"] + "</s>"
