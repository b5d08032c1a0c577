"""Settings of data that are read from files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from loomtune.settings import option
from loomtune_plugins.data.split_settings import OrderSettings


@dataclass
class FileSettings(OrderSettings):
    """Which files, which of their columns mean what, and what rows are made of them.

    A column that is not named is looked for under its own key (`prompt`, `messages`, ...). `answers.text` is the
    `text` of each of the objects in the list `answers`.
    """

    format: str = option("auto", "auto (by the columns), completion, messages, text, preference, unpaired or prompt")
    prompt: str = option("", "column of the prompt")
    completion: str = option("", "column of the answer to be learned")
    messages: str = option("", "column of the conversation, a list of role and content")
    text: str = option("", "column of plain text")
    chosen: str = option("", "column of the preferred answer")
    rejected: str = option("", "column of the other answer")
    label: str = option("", "column that says whether the answer is wanted: true or false, 1 or 0")
    answers: str = option("", "column of several answers to one prompt, a list; by itself from the best to the worst")
    ranks: str = option("", "column of the answers' ranks, a list: the smaller the better, null where there is none")
    scores: str = option("", "column of the answers' scores, a list: the larger the better, null where there is none")
    score: str = option("", "column of the completion's score, which data.threshold turns into a label")
    threshold: Optional[float] = option(None, "answers of this score or more are wanted, others not")  # noqa: UP045
