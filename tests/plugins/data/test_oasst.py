"""Conversation trees with ranked replies, as pairs, labels, conversations and prompts."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loomtune.errors import UserError
from loomtune_plugins.data.oasst import Oasst
from loomtune_plugins.data.oasst_settings import OasstSettings

SHARED = Path(os.environ.get("LOOMTUNE_SHARED", Path(__file__).parents[4] / "shared"))
TREES = SHARED / "data" / "oasst" / "en_100_tree.jsonl"
needs_trees = pytest.mark.skipif(not TREES.is_file(), reason="needs ../shared/data/oasst")


def said(text: str, *replies: dict[str, Any], role: str = "assistant", **more: Any) -> dict[str, Any]:
    return {"message_id": f"id of {text}", "text": text, "role": role, "lang": "en", "replies": list(replies), **more}


def asks(text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return said(text, *replies, role="prompter", **more)


def tree(text: str = "q", **more: Any) -> dict[str, Any]:
    """A question with three ranked replies, the best of which is asked on."""
    again = asks("and?", said("b1", rank=1), said("b0", rank=0), rank=0)
    replies = said("worst", rank=2), said("best", asks("odd", rank=1), again, rank=0), said("good", rank=1)
    return {"message_tree_id": f"tree of {text}", "prompt": asks(text, *replies, **more)}


def file(path: Path, *trees: Any) -> str:
    lines = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in trees)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


def rows(tmp_path: Path, *trees: Any, split: str = "train", **settings: Any) -> list[dict[str, Any]]:
    data = Oasst(OasstSettings(path=file(tmp_path / "trees.jsonl", *trees), **settings))
    data.check()
    return [dict(row) for row in data.rows(split)]


def compared(found: list[dict[str, Any]]) -> list[str]:
    return [f"{row['chosen']}>{row['rejected']}" for row in found]


def refusal(tmp_path: Path, *trees: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        rows(tmp_path, *trees, **settings)
    assert error.value.exit_code == 2
    return str(error.value)


def test_every_message_with_ranked_replies_gives_its_path_and_all_pairs(tmp_path: Path) -> None:
    found = rows(tmp_path, tree())
    assert compared(found) == ["best>good", "best>worst", "good>worst", "b0>b1"]
    assert [row["margin"] for row in found] == [1.0, 2.0, 1.0, 1.0]
    first, last = found[0], found[-1]
    assert first["prompt"] == [{"role": "user", "content": "q"}]
    assert [turn["content"] for turn in last["prompt"]] == ["q", "best", "and?"]
    assert [turn["role"] for turn in last["prompt"]] == ["user", "assistant", "user"]
    assert {(row["tree"], row["origin"]) for row in found} == {("tree of q", "trees.jsonl:1")}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"pairs": "best_worst"}, ["best>worst", "b0>b1"]),
        ({"pairs": "adjacent"}, ["best>good", "good>worst", "b0>b1"]),
        ({"min_gap": 2}, ["best>worst"]),
    ],
)
def test_the_settings_of_rankings_hold_for_trees(tmp_path: Path, settings: dict, wanted: list[str]) -> None:
    assert compared(rows(tmp_path, tree(), **settings)) == wanted


def test_unranked_and_equally_ranked_replies_give_no_pair(tmp_path: Path) -> None:
    replies = said("x"), said("y", rank=0), said("z", rank=0), said("w", rank=None), asks("a prompter", rank=1)
    assert not rows(tmp_path, tree(), {"prompt": asks("other", *replies)})[4:]


@pytest.mark.parametrize("mark", [{"deleted": True}, {"synthetic": True}, {"review_result": False}, {"lang": "de"}])
def test_messages_that_are_marked_take_what_was_said_under_them_along(tmp_path: Path, mark: dict) -> None:
    marked = tree("marked")
    marked["prompt"]["replies"][1] |= mark
    found = rows(tmp_path, marked, tree(), lang="en")
    assert compared(found) == ["good>worst", *compared(rows(tmp_path, tree()))]
    assert compared(rows(tmp_path, tree("whole", **mark), tree(), lang="en")) == compared(rows(tmp_path, tree()))


def test_reviews_that_nobody_made_leave_a_message_in(tmp_path: Path) -> None:
    assert len(rows(tmp_path, tree(review_result=None))) == 4


def test_the_best_and_the_worst_reply_are_labelled(tmp_path: Path) -> None:
    found = rows(tmp_path, tree(), format="unpaired")
    assert [(row["completion"], row["label"]) for row in found] == [
        ("best", True),
        ("worst", False),
        ("b0", True),
        ("b1", False),
    ]


def test_the_best_ranked_path_is_the_conversation_to_learn(tmp_path: Path) -> None:
    silent = {"prompt": asks("nobody replied")}
    ends = {"prompt": asks("p", said("reply", asks("asked on in vain")))}
    found = rows(tmp_path, tree(), silent, ends, format="messages")
    assert [[turn["content"] for turn in row["messages"]] for row in found] == [
        ["q", "best", "and?", "b0"],
        ["p", "reply"],
    ]


def test_every_message_of_a_prompter_is_a_prompt(tmp_path: Path) -> None:
    found = rows(tmp_path, tree(), format="prompt")
    assert [row["messages"][-1] for row in found] == [
        {"role": "user", "content": text} for text in ("q", "odd", "and?")
    ]


def test_the_export_is_read_compressed_as_it_is(tmp_path: Path) -> None:
    packed = Oasst(OasstSettings(path=file(tmp_path / "trees.jsonl.gz", tree(), tree("r"))))
    assert compared([dict(row) for row in packed.rows("train")]) == compared(rows(tmp_path, tree(), tree("r")))


@pytest.mark.parametrize("settings", [{"holdout": 0.4}, {"holdout_rows": 6}])
def test_no_tree_is_in_two_splits_whatever_its_rows_are(tmp_path: Path, settings: dict) -> None:
    trees = [tree(f"q{number}") for number in range(20)]
    held = {row["tree"] for row in rows(tmp_path, *trees, split="validation", **settings)}
    kept = {row["tree"] for row in rows(tmp_path, *trees, **settings)}
    assert held and kept and not held & kept and len(held | kept) == 20
    assert len(held) == 6 or "holdout" in settings
    for other in ("unpaired", "messages", "prompt"):
        again = rows(tmp_path, *trees[::-1], split="validation", format=other, **settings)
        assert {row["tree"] for row in again} == held, "by what a tree says, not by its line"


def nested(depth: int) -> dict[str, Any]:
    message = said("end")
    for _ in range(depth):
        message = asks("q", said("a", message))
    return {"prompt": message}


def bad() -> Iterator[tuple[Any, str]]:
    yield {"message_id": "x", "parent_id": "y", "text": "t", "role": "prompter"}, "it is a single message"
    yield {"chosen": "a", "rejected": "b"}, "has no 'prompt', with which a conversation tree begins; it has chosen"
    yield {"prompt": "text"}, "a message is text, not an object"
    yield {"prompt": said("q", role="system")}, "message id of q has the role 'system'"
    yield {"prompt": {**asks("q"), "text": None}}, "message id of q: 'text' is nothing (null), not text"
    yield {"prompt": asks("q", said("a", rank="first"))}, "message id of a: 'rank' is text, not a number"
    yield {"prompt": {**asks("q"), "replies": {"a": 1}}}, "message id of q: 'replies' is an object, not a list"
    yield {"prompt": {**asks("q"), "replies": ["a"]}}, "a message is text, not an object"
    yield nested(190), "JSON too deeply nested"
    yield '{"prompt": ', "is no JSON"


@pytest.mark.parametrize(("record", "told"), list(bad()))
def test_a_line_that_is_no_tree_is_named_with_the_cure(tmp_path: Path, record: Any, told: str) -> None:
    found = refusal(tmp_path, tree(), record)
    assert f"trees.jsonl:2: {told}" in found or ("trees.jsonl:2: " in found and told in found), found
    assert "_trees.jsonl.gz" in found


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"format": "preferences"}, "Did you mean 'preference'?"),
        ({"format": "messages", "pairs": "adjacent"}, "data.pairs=adjacent is never used"),
        ({"format": "prompt", "min_gap": 2}, "data.min_gap=2 is never used"),
        ({"pairs": "best"}, "data.pairs=best is not known"),
        ({"lang": "de"}, "data.lang"),
        ({"min_gap": 9}, "a lower data.min_gap"),
        ({"holdout": 2}, "0 <= data.holdout < 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict, told: str) -> None:
    assert told in refusal(tmp_path, tree(), **settings)


def test_the_fingerprint_follows_contents_and_settings(tmp_path: Path) -> None:
    path = file(tmp_path / "trees.jsonl", tree())
    variants = [{}, {"pairs": "adjacent"}, {"min_gap": 1}, {"lang": "en"}, {"format": "prompt"}]
    prints = {Oasst(OasstSettings(path=path, **more)).fingerprint() for more in variants}
    file(tmp_path / "trees.jsonl", tree("other"))
    assert len(prints | {Oasst(OasstSettings(path=path)).fingerprint()}) == len(variants) + 1


@needs_trees
def test_the_shared_trees_give_the_pairs_that_counting_their_ranks_predicts() -> None:
    """A plain recursion over the file, which knows nothing of rows."""

    def predicted(message: dict[str, Any]) -> int:
        replies = [reply for reply in message["replies"] if not reply["synthetic"] and not reply["deleted"]]
        ranks = [reply["rank"] for reply in replies if reply["role"] == "assistant" and reply.get("rank") is not None]
        return sum(a < b for a in ranks for b in ranks) + sum(map(predicted, replies))

    read = [json.loads(line)["prompt"] for line in TREES.read_text().splitlines()]
    found = list(Oasst(OasstSettings(path=str(TREES))).rows("train"))
    assert len(found) == sum(predicted(root) for root in read if not root["synthetic"]) == 732
    assert not any("chip20b" in str(row) for row in found)
