"""The pretraining text never shows the task's format, nor a name of a held-out schema."""

import re
import sqlite3

from loomtune_plugins.data.sql_quiz import corpus
from loomtune_plugins.data.sql_quiz.intents import INTENTS
from loomtune_plugins.data.sql_quiz.words import SPLITS


def test_no_held_out_name_occurs() -> None:
    met = {word for text in corpus.texts(2000, 0) for word in re.findall(r"[a-z]+", text)}
    assert not met & SPLITS["validation"].all()
    assert not met & SPLITS["test"].all()
    assert met & SPLITS["train"].all()


def test_the_tasks_format_never_occurs() -> None:
    openings = {question.split("{")[0] for intent in INTENTS for question in intent.questions}
    for text in corpus.texts(2000, 1):
        assert not any(mark in text for mark in ("Tables:", "Question:", "SQL:", "?"))
        assert not any(opening in text for opening in openings if len(opening.split()) > 1)


def test_no_comment_is_a_question_of_the_task() -> None:
    questions = {question for intent in INTENTS for question in intent.questions}
    assert not questions & {comment for intent in INTENTS for comment in intent.comments}


def test_scripts_run() -> None:
    scripts = [text for text in corpus.texts(400, 2) if text.startswith("CREATE TABLE")]
    assert len(scripts) > 100
    for text in scripts:
        sqlite3.connect(":memory:").executescript(text)


def test_text_is_a_function_of_seed_and_index() -> None:
    assert list(corpus.texts(10, 4)) == list(corpus.texts(20, 4))[:10]
    assert list(corpus.texts(10, 4)) != list(corpus.texts(10, 5))
