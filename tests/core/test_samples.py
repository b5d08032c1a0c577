from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from letters import Letters, Pairs, Rows, row
from loomtune.contracts import Row
from loomtune.errors import UserError
from loomtune.samples import Samples, Source, chain, default_cache, open_samples, prepare


def made(rows: list[Row] | Rows, cache: Path, **change: object) -> Samples:
    data = rows if isinstance(rows, Rows) else Rows(rows)
    vocabulary = change.pop("vocabulary", 256)
    source = Source(data, Pairs(), Letters(), split="train", max_length=100)
    return prepare(replace(source, **change), cache, vocabulary)  # type: ignore[arg-type]


THREE = [row(origin="rows.jsonl:1"), row("question", "yes", "no", m=2.0, origin="rows.jsonl:2"), row(origin="ö:9")]


def test_samples_come_back_as_the_objective_made_them(tmp_path: Path) -> None:
    samples = made(THREE, tmp_path)
    assert len(samples) == 3
    for index, original in enumerate(THREE):
        expected = Pairs().sample(original, Letters(), 100)
        assert dict(samples[index].numbers) == dict(expected.numbers)
        assert samples.origin(index) == original["origin"]
        for ours, theirs in zip(samples[index].segments, expected.segments, strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.is_target, theirs.is_target)
            assert (ours.tokens.dtype, ours.is_target.dtype, ours.parent) == (np.int32, np.bool_, theirs.parent)


def test_lengths_are_known_without_reading_tokens(tmp_path: Path) -> None:
    assert made(THREE, tmp_path).lengths.tolist() == [10, 13, 10]


def test_a_chain_is_a_prompt_and_its_longer_answer(tmp_path: Path) -> None:
    samples = made(THREE, tmp_path)
    assert [chain(samples[i]) for i in range(3)] == [7, 11, 7]


def test_a_sample_beyond_the_last_is_an_index_error(tmp_path: Path) -> None:
    samples = made(THREE, tmp_path)
    for index in (3, -1):
        with pytest.raises(IndexError):
            samples[index]


def test_a_second_start_reads_no_row(tmp_path: Path) -> None:
    data = Rows(THREE)
    first, second = made(data, tmp_path), made(data, tmp_path)
    assert (data.read, first.key) == (1, second.key)
    assert open_samples(tmp_path, first.key).lengths.tolist() == first.lengths.tolist()


def test_whatever_samples_depend_on_gives_another_key(tmp_path: Path) -> None:
    other_template = Letters()
    other_template.template = "b"
    changes: list[dict[str, object]] = [
        {},
        {"data": Rows(THREE, version="2")},
        {"data": Rows(THREE[:2])},
        {"objective": Pairs("2")},
        {"tokenizer": other_template},
        {"split": "validation"},
        {"max_length": 99},
    ]
    keys = [made(THREE, tmp_path, **change).key for change in changes]
    assert len(set(keys)) == len(changes)


@pytest.mark.parametrize("column", ["tokens", "is_target", "origins", "about.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, column: str, harm: str) -> None:
    data = Rows(THREE)
    whole = made(data, tmp_path)
    file = tmp_path / whole.key / column
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes(content if harm == "flip" else content[:-1])
    again = made(data, tmp_path)
    assert data.read == 2
    assert again[1].segments[0].tokens.tolist() == Letters().encode("question")
    assert [entry.name for entry in tmp_path.iterdir()] == [whole.key], "nothing is left lying about"


def test_a_rank_that_cannot_see_the_samples_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="LOOMTUNE_CACHE") as error:
        open_samples(tmp_path, "0123")
    assert error.value.exit_code == 2


def test_a_writer_that_dies_leaves_nothing_that_could_be_read(tmp_path: Path) -> None:
    class Dies(Rows):
        def rows(self, split: str) -> Iterator[Row]:
            yield THREE[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(Dies(THREE), tmp_path)
    assert len(made(THREE, tmp_path)) == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_writers_that_race_agree_on_one_result(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    class Waits(Rows):
        def rows(self, split: str) -> Iterator[Row]:
            together.wait(timeout=20)
            yield from THREE
            together.wait(timeout=20)

    results: list[Samples] = []
    threads = [
        threading.Thread(target=lambda: results.append(made(Waits(THREE), tmp_path)), daemon=True) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [samples.lengths.tolist() for samples in results] == [[10, 13, 10]] * 4
    assert [entry.name for entry in tmp_path.iterdir()] == [results[0].key]


def _prepare_in_process(cache: str) -> int:
    return len(made(THREE * 50, Path(cache)))


def test_processes_that_race_agree_on_one_result(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_prepare_in_process, [str(tmp_path)] * 4) == [150] * 4
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old, new = tmp_path / ".unfinished-old", tmp_path / ".unfinished-new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    made(THREE, tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_cut_rows_are_counted_with_what_they_lost(tmp_path: Path) -> None:
    samples = made([row(), row("question", "yes", "no")], tmp_path, max_length=9)
    assert [chain(samples[i]) for i in range(2)] == [7, 9]
    assert (samples.cut, samples.cut_tokens) == (1, 3), "`yes` and `no` keep a letter each"


def test_what_gave_no_row_is_known_from_the_cache_too(tmp_path: Path) -> None:
    class Ties(Rows):
        def left_out(self, split: str) -> tuple[str, str]:
            return f"2 of 5 records of {split} give no row", "mend them"

    data = Ties(THREE)
    found = [list(made(data, tmp_path).left_out) for _ in range(2)]
    assert found == [["2 of 5 records of train give no row", "mend them"]] * 2 and data.read == 1
    assert not made(THREE[:2], tmp_path).left_out


def test_a_row_of_exactly_the_longest_length_is_not_cut(tmp_path: Path) -> None:
    assert made([row()], tmp_path, max_length=7).cut == 0


def test_all_bad_rows_are_refused_at_once_and_the_first_five_are_named(tmp_path: Path) -> None:
    bad = [{"origin": f"rows.jsonl:{number}"} for number in range(2, 9)]
    with pytest.raises(UserError) as error:
        made([THREE[0], *bad, row("a", "", "", origin="rows.jsonl:9")], tmp_path)
    said = str(error.value)
    assert "8 of 9 rows of split train" in said
    assert "rows.jsonl:2: has no prompt" in said
    assert "rows.jsonl:6" in said
    assert "rows.jsonl:7" not in said
    assert "and 3 more" in said
    assert error.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_row_whose_answers_are_all_cut_away_is_refused_with_the_length_as_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train:1: nothing is left to learn once its 7 last tokens .* max_length=3"):
        made([row()], tmp_path, max_length=3)


def test_a_row_with_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its answer is empty"):
        made([row("ask", "", "")], tmp_path)


def test_a_rare_row_whose_answer_is_all_cut_away_is_left_out_and_counted(tmp_path: Path) -> None:
    short, long = row("a", "b"), row("abcdefgh", "b")
    samples = made([short] * 50 + [long] + [short] * 50, tmp_path, max_length=5)
    assert (len(samples), samples.skipped) == (100, 1)
    with pytest.raises(UserError, match="2 of 101 rows"):
        made([short] * 99 + [long] * 2, tmp_path, max_length=5)


def test_a_row_without_an_answer_is_refused_however_rare(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 of 101 rows"):
        made([row()] * 100 + [{"origin": "rows.jsonl:2"}], tmp_path)


def test_a_tokenizer_of_another_model_is_refused_also_from_the_cache(tmp_path: Path) -> None:
    assert made(THREE, tmp_path, vocabulary=122).largest_token == 121, "the y of yes"
    with pytest.raises(UserError, match=r"token 121 \(first too large in rows.jsonl:2\).*121 embeddings"):
        made(THREE, tmp_path, vocabulary=121)


@pytest.mark.parametrize(
    ("sources", "said"),
    [("aba", "rows:2 is of a again, after rows of b"), ("a ", "rows:1 does not say of which source")],
)
def test_sources_that_break_their_promise_are_the_plugin_s_mistake(tmp_path: Path, sources: str, said: str) -> None:
    found = [{"source": of} if of.strip() else {} for of in sources]
    data = Rows([row(origin=f"rows:{number}", **of) for number, of in enumerate(found)])
    data.mixes = True
    with pytest.raises(UserError, match=rf"{said}.*\n.*a mistake of the data's plugin"):
        made(data, tmp_path)


def test_a_cache_that_is_a_file_is_told_with_what_names_another(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"File exists.*\n.*must be a folder .* name it by LOOMTUNE_CACHE"):
        made(THREE, tmp_path / "file")


def test_training_rows_there_must_be_but_a_validation_split_may_be_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split train has no rows"):
        made([], tmp_path)
    assert len(made([], tmp_path, split="validation")) == 0


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOOMTUNE_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("LOOMTUNE_CACHE")
    assert default_cache() == Path.home() / ".cache" / "loomtune" / "samples"
