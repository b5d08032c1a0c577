"""What a judge is asked, and what its answer says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from loomtune.contracts import Answer
from loomtune.errors import UserError
from loomtune_plugins.rewards.judge_settings import SHOWN, TEMPLATES, JudgeSettings

YES, NO = "A", "B"
_PLACES = re.compile(r"\{(prompt|completion|criterion|lowest|highest|row\.([^{}\s]+))\}")
_SCORE = re.compile(r"score[^\w(\[]{0,9}?(-?\d+(?:\.\d+)?)", re.IGNORECASE)  # `Score (1-10): 7` is not 1
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_FILES = (".txt", ".md", ".j2")


def template(settings: JudgeSettings) -> str:
    """What is asked, with places to fill in. Raises UserError where the answer has none, or its file is not there."""
    said = settings.template
    if said.endswith(_FILES) and "\n" not in said:
        said = _file(said)
    elif not said:
        said = SHOWN + TEMPLATES[settings.read]
    if "{completion}" not in said:
        what = "reward.judge.template does not show the answer that is to be judged"
        raise UserError.of(what, "put {completion} where it belongs, and {prompt} where the question does")
    if settings.criteria and "{criterion}" not in said:
        what = "reward.judge.criteria are named, and reward.judge.template does not ask about them"
        raise UserError.of(what, "put {criterion} where each belongs, or leave the criteria out")
    return said


def _file(named: str) -> str:
    path = Path(named).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        what = f"reward.judge.template={named} is no file that can be read: {error}"
        raise UserError.of(what, "name one, or write the template itself") from error


def lacking(said: str, row: Mapping[str, object]) -> list[str]:
    """The keys that a template shows and a row lacks."""
    return [key for _, key in _PLACES.findall(said) if key and key not in row]


def filled(said: str, known: Mapping[str, str], answer: Answer) -> str:
    """A template with all places filled in, once: braces in what is filled in are only braces.

    Raises KeyError where the row lacks a key.
    """
    return _PLACES.sub(lambda found: str(answer.row[found[2]]) if found[2] else known[found[1]], said)


def number(text: str) -> float | None:
    """The score that a text ends with: the last behind `Score:`; else the only number there is."""
    found = _SCORE.findall(text) or _NUMBER.findall(text)
    return float(found[-1]) if found and (len(found) == 1 or _SCORE.search(text)) else None


def from_json(text: str) -> float | None:
    """`score` of the JSON object in a text, whatever stands around it."""
    try:
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])["score"]
        return None if isinstance(found, bool) else float(found)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def preferred(log_probs: Mapping[str, float]) -> float:
    """The probability of yes, of yes and no together."""
    return 1.0 / (1.0 + math.exp(min(700.0, log_probs[NO] - log_probs[YES])))
