"""Ranked answers of Open Assistant's conversations, of 1 to 5 turns, as plain text for models without a template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loomtune_plugins.data.oasst import Oasst
from loomtune_plugins.data.oasst_settings import OasstSettings
from support import shared

NAMES = {"user": "User: ", "assistant": "Assistant: "}


def pairs(prompt: tuple[int, int], answer: tuple[int, int]) -> list[dict[str, str]]:
    """`prompt`, `chosen`, `rejected`: any two ranked answers to one prompt, in the order of the file.

    prompt: how many characters it has, at least and at most. answer: the same of answers, which are cut to fit.
    """
    read = Oasst(OasstSettings(path=str(shared("data", "oasst", "en_100_tree.jsonl"))))
    rows = [_plain(row, answer[1]) for row in read.rows("train")]
    fitting = [row for row in rows if prompt[0] <= len(row["prompt"]) <= prompt[1] and row["chosen"] != row["rejected"]]
    return [row for row in fitting if min(len(row["chosen"]), len(row["rejected"])) >= answer[0]]


def _plain(row: Mapping[str, Any], room: int) -> dict[str, str]:
    said = "".join(f"{NAMES[one['role']]}{one['content']}\n" for one in row["prompt"])
    return {"prompt": said + NAMES["assistant"], "chosen": row["chosen"][:room], "rejected": row["rejected"][:room]}
