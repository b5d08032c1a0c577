"""The tokenizer keeps all text, spells names alike wherever they stand, and cuts prompt and query apart."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loomtune_plugins.data.sql_quiz import corpus, generate, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.build(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return found


def encode(loaded: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(loaded(text, add_special_tokens=False)["input_ids"])


def test_special_tokens_have_ids_of_their_own(loaded: PreTrainedTokenizerBase) -> None:
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("text", ["Hello,  World! déjà\t\n", "SELECT 'a b' , MAX (x)\n\n--", "a1b22c333", " x ", ""])
def test_any_text_comes_back(loaded: PreTrainedTokenizerBase, text: str) -> None:
    assert loaded.decode(encode(loaded, text)) == text


def test_the_tasks_text_comes_back_and_prompt_and_query_share_no_token(loaded: PreTrainedTokenizerBase) -> None:
    for row in generate.rows("test", 100):
        whole = row["prompt"] + row["completion"]
        assert encode(loaded, row["prompt"]) + encode(loaded, row["completion"]) == encode(loaded, whole)
        assert loaded.decode(encode(loaded, whole)) == whole


def test_a_name_is_spelled_the_same_wherever_it_stands(loaded: PreTrainedTokenizerBase) -> None:
    name = [loaded.convert_tokens_to_ids(piece) for piece in ("to", "nn", "ag", "e")]
    for text in (
        "tonnage",
        "MAX(tonnage) FROM",
        "(tonnage, x)",
        "the tonnage for each",
        "BY tonnage DESC",
        "y, tonnage",
    ):
        found = encode(loaded, text)
        assert any(found[start : start + 4] == name for start in range(len(found)))


def test_rows_are_short(loaded: PreTrainedTokenizerBase) -> None:
    lengths = [len(encode(loaded, row["prompt"] + row["completion"])) for row in generate.rows("train", 200)]
    assert max(lengths) <= 128
    assert sum(lengths) / len(lengths) < 90


def test_pretraining_text_fits(loaded: PreTrainedTokenizerBase) -> None:
    assert max(len(encode(loaded, text)) for text in corpus.texts(500, 0)) <= tokenizer.MAX_LENGTH


def test_building_twice_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    tokenizer.build(tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_the_shipped_tokenizer_is_the_one_that_is_built(folder: Path) -> None:
    """A phrasing with a new word would shift every id under the shipped weights."""
    shipped = Path(tokenizer.__file__).parents[2] / "models" / "tiny" / "tokenizer.json"
    assert shipped.read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_text_begins_with_bos_where_special_tokens_are_asked_for(loaded: PreTrainedTokenizerBase) -> None:
    assert loaded("SELECT 1")["input_ids"] == [1, *encode(loaded, "SELECT 1")]
