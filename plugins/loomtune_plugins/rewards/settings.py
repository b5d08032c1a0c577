"""Settings of the rewards."""

from dataclasses import dataclass

from loomtune.settings import option

WEIGHT = "what the score is multiplied with in the sum of all rewards"
MARKED = r"####\s*(.+)"
"""The answer as GSM8K writes it."""


@dataclass
class SqlSettings:
    """What a query returns, beside what the right one returns."""

    weight: float = option(1.0, WEIGHT)
    valid: float = option(0.0, "score of a query that runs and returns something else")
    overlap: float = option(0.0, "added to `valid`, times the share of rows that are right (F1)")
    broken: float = option(0.0, "score of a query that does not run")
    seconds: float = option(1.0, "time that a query may take")


@dataclass
class ExactSettings:
    """The final answer, beside the right one."""

    weight: float = option(1.0, WEIGHT)
    pattern: str = option(MARKED, "regular expression of what is compared: its last match, of that the last group")
    last: bool = option(True, "without a match: the last number of the answer counts; false: it has no answer")
    numeric: bool = option(True, "compare as numbers where both are (1,000.0 is 1000), else as words")
    tolerance: float = option(1e-6, "numbers are the same to this part of the right one")
    reference: str = option("", "key of a row's right answer; empty: `gold`, `chosen` or `completion`")
    wrong: float = option(0.0, "score of another answer")
    missing: float = option(0.0, "score where there is no answer to compare")
    seconds: float = option(1.0, "time that matching an answer may take")


@dataclass
class FormatSettings:
    """What an answer looks like."""

    weight: float = option(1.0, WEIGHT)
    pattern: str = option("", "regular expression that it matches; what its named groups match must not be empty")
    whole: bool = option(True, "the pattern matches the whole answer, around which white space does not count")
    json: bool = option(False, "it is JSON, alone or within a fence of backticks")
    keys: list[str] = option([], "keys that the JSON object has")
    wrong: float = option(0.0, "score of an answer that looks otherwise")
    seconds: float = option(1.0, "time that matching an answer may take")


@dataclass
class LengthSettings:
    """How long an answer is, in tokens, with the one that ends it: 0 within bounds, down to -1 outside."""

    weight: float = option(1.0, WEIGHT)
    longest: int = option(0, "tokens from which on the penalty grows; 0: no bound")
    shortest: int = option(0, "tokens below which the penalty grows; 0: no bound")
    margin: int = option(0, "tokens over which the penalty grows from 0 to 1; 0: at once")
    cut: float = option(0.0, "penalty of an answer that did not end by itself, where that is more")


@dataclass
class FunctionSettings:
    """A function of yours."""

    weight: float = option(1.0, WEIGHT)
    function: str = option("", "`package.module:function` or `path/file.py:function`")
    batch: int = option(0, "call it with lists of at most so many answers; 0: with one answer at a time")
    seconds: float = option(10.0, "time that a call may take")
    memory: float = option(4.0, "GiB that a worker process may take; 0: no bound")
    workers: int = option(0, "processes of each rank that call it; 0: one for each core, at most 8", how=True)
