"""A small tokenizer: words that queries and questions are made of are whole, names and values are spelled.

A name is cut into pairs of letters wherever it stands, so copying a name that was never seen is copying its pieces. No
piece of a name carries a space; the words around it do. Text of any other kind falls back to bytes and is never lost.
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from string import ascii_lowercase, digits

from loomtune_plugins.data.sql_quiz.intents import INTENTS

SPECIAL = ("<pad>", "<bos>", "<eos>")
MAX_LENGTH = 512
_SQL = (
    "CREATE TABLE INSERT INTO VALUES TEXT INTEGER DISTINCT WHERE AND ORDER BY DESC LIMIT GROUP JOIN USING SELECT FROM"
)
_CALLS = ("MAX(", "MIN(", "SUM(", "AVG(", "COUNT(", "COUNT(*)", "COUNT(DISTINCT ")
_MARKS = (
    ":\n",
    "?\n",
    ".\n",
    ";\n",
    ");\n",
    "), (",
    "', '",
    "', ",
    ", '",
    " = '",
    " (",
    " USING (",
    " VALUES (",
    ", ",
    "; ",
    ": ",
    "-- ",
)
_COMPARISONS = ("=", "<", ">")


def build(folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"pad_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        **names,
    }
    _write(folder / "tokenizer.json", _tokenizer())
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "special_tokens_map.json", names)


def vocabulary() -> list[str]:
    """Every token, in the order of its id, special tokens first, as text before its bytes are mapped."""
    whole = [variant for word in _words() for variant in (word, f"{word} ", f" {word}", f" {word} ")]
    whole += [variant for sign in _COMPARISONS for variant in (f"{sign} ", f" {sign} ")]
    letters = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    numbers = ["".join(pair) for pair in product(digits, repeat=2)]
    return list(dict.fromkeys((*whole, *_CALLS, *_MARKS, *letters, *numbers)))


def _words() -> list[str]:
    """SQL's keywords and the words of all phrasings, sorted."""
    phrasings = (phrase for intent in INTENTS for phrase in (*intent.questions, *intent.comments))
    found = {word for phrase in phrasings for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w\}", " ", phrase))}
    return sorted(
        found | {"Tables", "Question", "SQL", "INSERT INTO", "CREATE TABLE", "ORDER BY", "GROUP BY", *_SQL.split()}
    )


def _pattern() -> str:
    """Where text is cut: whole words first, longest first, then marks, then pairs of letters and of digits."""
    longest = sorted(_words(), key=lambda word: (-len(word), word))
    marks = "|".join(re.escape(mark) for mark in sorted((*_CALLS, *_MARKS), key=lambda mark: (-len(mark), mark)))
    signs = "|".join(_COMPARISONS)
    return rf"{marks}| ?\b(?:{'|'.join(longest)})\b ?| ?(?:{signs}) |[a-z]{{1,2}}|[0-9]{{1,2}}|\s|[^\s]"


def _begins_with(bos: int) -> dict[str, object]:
    """What puts `<bos>` before a text, for whoever asks for special tokens."""
    token, text = {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {"<bos>": {"id": "<bos>", "ids": [bos], "tokens": ["<bos>"]}}
    return {"type": "TemplateProcessing", "single": [token, text], "pair": [token, text], "special_tokens": special}


def _tokenizer() -> dict[str, object]:
    """The contents of `tokenizer.json`; the BPE has no merges, it looks whole pieces up."""
    byte = _bytes()
    pieces = (*SPECIAL, *(byte[value] for value in range(256)), *(_mapped(piece, byte) for piece in vocabulary()))
    ids = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _pattern()}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(number, token) for number, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": _begins_with(SPECIAL.index("<bos>")),
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": ids,
            "merges": [],
        },
    }


def _special(number: int, token: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}


def _mapped(text: str, byte: dict[int, str]) -> str:
    return "".join(byte[value] for value in text.encode())


def _bytes() -> dict[int, str]:
    """GPT-2's printable character for each byte (openai/gpt-2, `encoder.py`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others: Iterator[int] = (value for value in range(256) if value not in printable)
    return {value: chr(value) for value in printable} | {value: chr(256 + n) for n, value in enumerate(others)}


def _write(path: Path, contents: Mapping[str, object]) -> None:
    path.write_text(json.dumps(contents, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
