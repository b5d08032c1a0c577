"""Special tokens that a tokenizer lacks: checked, added, and written where others look for them. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loomtune.errors import Fault, UserError

KEY = "model.new_tokens"


def check(tokens: Sequence[str], multiple: int) -> None:
    """Raises UserError for tokens that cannot be any. multiple: what the rows of the embedding are padded to."""
    faults = []
    if any(not token.strip() for token in tokens):
        faults.append(Fault(f"{KEY} holds a token of no characters", "leave it out"))
    if twice := sorted({token for token in tokens if tokens.count(token) > 1}):
        faults.append(Fault(f"{KEY} names {', '.join(map(repr, twice))} more than once", "name each token once"))
    if multiple < 1:
        faults.append(Fault(f"model.pad_vocabulary_to={multiple} is no multiple", "set it to a number from 1 on"))
    if faults:
        raise UserError(*faults)


def add(tokenizer: Any, tokens: Sequence[str], known: Mapping[str, int]) -> dict[str, int]:
    """Makes them special tokens of transformers' tokenizer, and gives the id of each.

    known: the tokenizer's ids. One that is special already stays what it is. Raises UserError for one that stands for
    ordinary text, and for one that would not come out as itself.
    """
    kinds = tokenizer.added_tokens_decoder
    if ordinary := [token for token in tokens if token in known and not _special(kinds.get(known[token]))]:
        raise UserError.of(
            f"{KEY} names '{ordinary[0]}', which is an ordinary token of the tokenizer already",
            f"leave it out, or choose a spelling that no text has, such as '<|{ordinary[0].strip('<|>')}|>'",
        )
    from tokenizers import AddedToken

    lacking = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in known]
    if lacking:
        tokenizer.add_special_tokens({"extra_special_tokens": lacking}, replace_extra_special_tokens=False)
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}
    _check_added(tokenizer, known, ids)
    return ids


def _special(kind: Any) -> bool:
    return kind is not None and bool(kind.special)


def _check_added(tokenizer: Any, known: Mapping[str, int], ids: Mapping[str, int]) -> None:
    taken = set(known.values())
    for token, number in ids.items():
        if token not in known and number in taken:
            cure = "set model.tokenizer to one whose ids have no gaps"
            raise UserError.of(f"the tokenizer would give '{token}' the id {number}, which another token has", cure)
        if tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"] != [number]:
            cure = "choose another spelling, such as '<|name|>'"
            raise UserError.of(f"'{token}' of {KEY} does not come out of the tokenizer as one token", cure)


def write(folder: Path, added: Mapping[str, int]) -> None:
    """Adds tokens to the files of a tokenizer, whose `tokenizer.json` is there; all else in them stays as it is."""
    entries = {number: _entry(token) for token, number in added.items()}
    with _edited(folder / "tokenizer.json") as pieces:
        pieces["added_tokens"] += [{"id": number, **entry} for number, entry in entries.items()]
    with _edited(folder / "tokenizer_config.json") as settings:
        _list(settings, list(added))
        if "added_tokens_decoder" in settings:
            settings["added_tokens_decoder"] |= {str(number): entry for number, entry in entries.items()}
    # What versions of transformers before 5 read besides, where it is there.
    if (folder / "special_tokens_map.json").is_file():
        with _edited(folder / "special_tokens_map.json") as special:
            _list(special, list(added))
    if (folder / "added_tokens.json").is_file():
        with _edited(folder / "added_tokens.json") as numbers:
            numbers.update(added)


def _entry(token: str) -> dict[str, Any]:
    sides = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"content": token, **sides, "normalized": False, "special": True}


def _list(settings: dict[str, Any], tokens: Sequence[str]) -> None:
    """Under the name that is there; else the older one, which every version of transformers reads."""
    if isinstance(named := settings.get("extra_special_tokens"), dict) and named:
        named |= {token: token for token in tokens}
        return
    name = "extra_special_tokens" if settings.get("extra_special_tokens") else "additional_special_tokens"
    settings[name] = [*(settings.get(name) or []), *tokens]


@contextmanager
def _edited(file: Path) -> Iterator[dict[str, Any]]:
    """The content of a JSON file, which is written back; empty where there is no file."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    yield content
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
