"""Conversations as files have them: ShareGPT's words, calls of tools, contents in parts, and who may speak."""

import json
from pathlib import Path
from typing import Any

import pytest

from loomtune.contracts import Dropped
from loomtune.errors import UserError
from loomtune_plugins.data.any_files import AnyFiles
from loomtune_plugins.data.any_files_settings import AnyFileSettings
from loomtune_plugins.data.columns import Columns
from loomtune_plugins.data.turns import conversation
from loomtune_plugins.data.values import RecordError
from support import write_rows

CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
SHAREGPT = [
    {"from": "system", "value": "be kind"},
    {"from": "human", "value": "hi"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "wet"},
    {"from": "tool", "value": "cold"},
    {"from": "gpt", "value": "hello"},
]
MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "wet"},
    {"role": "tool", "content": "cold"},
    {"role": "assistant", "content": "hello"},
]
TALK = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def files(path: Path, **settings: Any) -> AnyFiles:
    return AnyFiles(AnyFileSettings(path=str(path), **settings))


def one(value: Any) -> dict[str, Any]:
    (message,) = conversation([value], "'messages'")
    return message


def refusal(value: Any) -> str:
    with pytest.raises(RecordError) as error:
        one(value)
    return str(error.value)


@pytest.mark.parametrize("settings", [{}, {"format": "messages"}, {"messages": "conversations"}])
def test_sharegpt_is_read_by_its_own_column(tmp_path: Path, settings: dict[str, str]) -> None:
    data = files(write_rows(tmp_path / "rows.jsonl", [{"conversations": SHAREGPT, "score": 3}]), **settings)
    data.check()
    assert [row["messages"] for row in data.rows("train")] == [MESSAGES]
    (kept,) = (row for piece in data.pieces("train") for row in data.read(piece))
    assert isinstance(kept, dict) and kept["messages"] == MESSAGES and "conversations" not in kept


def test_cells_of_a_table_hold_sharegpt_too(tmp_path: Path) -> None:
    said = json.dumps(TALK).replace('"', '""')
    (tmp_path / "rows.csv").write_text(f'id,conversations\n7,"{said}"\n')
    (row,) = files(tmp_path / "rows.csv").rows("train")
    assert [message["content"] for message in row["messages"]] == ["hi", "hello"]


@pytest.mark.parametrize(
    "record", [{"text": "t"}, {"prompt": "p", "completion": "c"}, {"messages": [{"role": "user", "content": "m"}]}]
)
def test_what_rows_are_made_of_otherwise_goes_before_sharegpts_column(tmp_path: Path, record: dict[str, Any]) -> None:
    data = files(write_rows(tmp_path / "rows.jsonl", [{**record, "conversations": TALK}]))
    (row,) = data.rows("train")
    assert {key: row[key] for key in record} == record
    (kept,) = (row for piece in data.pieces("train") for row in data.read(piece))
    assert isinstance(kept, dict) and "conversations" not in kept
    assert Columns.decided(data.settings, kept, "kept")["columns"] == {key: key for key in record}


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        (
            {"from": "narrator", "value": "x"},
            "message 1 has the speaker 'narrator', which is none of system, developer",
        ),
        ({"from": ["gpt"], "value": "x"}, "message 1 has the speaker a list"),
        ({"role": "gpt", "content": "x"}, "message 1 has the role 'gpt', which is none of system, developer, user"),
        ({"role": "Assistant", "content": "x"}, "has the role 'Assistant'"),
        ({"from": "gpt"}, "has nothing (null) as its content, not text"),
        ({"from": "function_call", "value": "look!"}, "message 1, a function_call, is no JSON"),
        ({"from": "function_call", "value": "{}"}, "is no object with name and arguments"),
        ({"from": "function_call", "value": {"name": "f"}}, "message 1, a function_call, is an object, not text"),
    ],
)
def test_an_unknown_speaker_or_a_broken_call_is_told_with_its_message(turn: dict[str, Any], told: str) -> None:
    assert told in refusal(turn)


def test_an_unknown_role_is_a_bad_record_of_its_row(tmp_path: Path) -> None:
    odd = [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]
    data = files(write_rows(tmp_path / "rows.jsonl", [{"messages": odd[:1]}, {"messages": odd}]))
    with pytest.raises(UserError, match=r"rows\.jsonl:2: 'messages' message 2 has the role 'bot'"):
        list(data.rows("train"))
    kept = [row for piece in data.pieces("train") for row in data.read(piece)]
    assert [getattr(row, "origin", None) for row in kept if isinstance(row, Dropped)] == ["rows.jsonl:2"]


def test_several_calls_are_calls_of_one_message() -> None:
    calls = one({"from": "function_call", "value": json.dumps([CALL, {"name": "time"}])})["tool_calls"]
    assert [call["function"] for call in calls] == [CALL, {"name": "time"}]


def test_a_content_in_parts_of_text_is_joined() -> None:
    parts = [{"type": "text", "text": "a ", "image_url": None}, {"type": "text", "text": "b"}]
    assert one({"role": "user", "content": parts}) == {"role": "user", "content": "a b"}
    assert one({"from": "human", "value": parts}) == {"role": "user", "content": "a b"}


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (
            {"type": "image_url", "image_url": {"url": "x"}},
            "has image_url as its part 2, and only parts of text are",
        ),
        ({"text": "without a type"}, "has an object without a type as its part 2"),
        ("bare", "has text as its part 2"),
        ({"type": "text"}, "part 2 is nothing (null), not text"),
    ],
)
def test_a_part_that_is_no_text_is_told(part: Any, told: str) -> None:
    assert told in refusal({"role": "user", "content": [{"type": "text", "text": "a"}, part]})
