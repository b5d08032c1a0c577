"""Settings of the stages."""

from dataclasses import dataclass
from typing import Optional

from loomtune.settings import option


@dataclass
class CleanSettings:
    """What is changed in all that was said, and which rows are too short, too long or without an answer."""

    unicode: str = option("nfc", "Unicode form: nfc, nfkc (which also turns ² into 2 and ﬁ into fi) or none")
    control: bool = option(True, "remove control characters and invisible ones; NUL goes in any case")
    mojibake: bool = option(False, "repair text that was decoded wrongly, such as â€™, by ftfy")
    html: str = option("keep", "keep, unescape (&amp; becomes &) or strip (known tags go too, outside of code)")
    blanks: str = option("keep", "keep, or collapse (one blank between words, one empty line; indentation stays)")
    min_characters: int = option(1, "least characters of a row, of all that was said in it")
    max_characters: int = option(0, "most characters of a row; 0: any")
    min_answer: int = option(1, "least characters of every answer; 0: empty answers stay")
    max_answer: int = option(0, "most characters of every answer; 0: any")


@dataclass
class LanguageSettings:
    """Which languages stay."""

    keep: list[str] = option(["en"], "ISO 639-1 codes of the languages that stay")
    certainty: float = option(0.7, "least probability of a language that is not wanted, for a row to go; 0 to 1")
    short: int = option(40, "rows with fewer letters than this stay, because nobody can say")


@dataclass
class ExactSettings:
    """What counts as the same row."""

    blanks: bool = option(True, "False: rows that differ in blanks and line breaks alone are the same")
    case: bool = option(True, "False: rows that differ in capital letters alone are the same")
    columns: list[str] = option([], "columns beside what was said that must be equal too, such as a gold answer")


@dataclass
class NearSettings:
    """How alike two rows must be to count as one, and by what."""

    threshold: float = option(0.75, "least Jaccard similarity, of the prompts and of the answers; 0.5 to 1")
    shingle: str = option("characters", "what is compared: runs of characters, or of words")
    size: int = option(5, "characters or words of a run")
    hashes: int = option(256, "MinHash values of a side, a byte each: the similarity's error is 0.5 / sqrt(hashes)")
    recall: float = option(0.99, "share of the pairs at the threshold that are found at least")
    numbers: bool = option(False, "True: rows are compared though their numbers differ")
    differ: int = option(60, "most runs that one of two rows has and the other has not, a side; 0: any; not of `text`")
    short: int = option(20, "shorter answers are equal by chance: their prompts must have the same words; 0: none")
    columns: list[str] = option([], "columns beside what was said that must be equal too, such as a gold answer")


@dataclass
class SemanticSettings:
    """Which model says what rows mean, and how alike their meaning must be."""

    model: str = option(
        "", "folder of a sentence-transformers model, or of any Hugging Face model (mean of its last states)"
    )
    threshold: Optional[float] = option(  # noqa: UP045
        None, "least cosine, of the prompts and of the answers; 0.9 where the model was made for sentences"
    )
    max_length: int = option(0, "tokens of a side that the model reads; 0: as many as it was made for")
    batch: int = option(32, "texts that the model reads at once: part of the result, by rounding")
    columns: list[str] = option([], "columns beside what was said that must be equal too, such as a gold answer")
    limit: int = option(200_000, "most rows: each is compared with each, so twice as many take four times as long")


@dataclass
class DecontaminateSettings:
    """Which evaluations rows must not contain."""

    against: list[str] = option(
        [], "evaluation files (jsonl, ndjson, json, parquet, csv, tsv, txt; .gz, .bz2, .zst), globs or folders"
    )
    columns: list[str] = option([], "their columns that are compared, each by itself; empty: all that hold text")
    size: int = option(13, "words of an n-gram; a shorter text of an evaluation must occur as a whole")
    shortest: int = option(8, "evaluation texts of fewer words must be the whole prompt: `42` occurs everywhere")
    share: float = option(0.0, "least share of an evaluation text's n-grams that a row holds; 0: any one of them")
    common: int = option(10, "n-grams that more evaluation texts than these share are nobody's; 0: none are left out")


@dataclass
class SplitSettings:
    """How many rows are held out, and which must stay together."""

    validation: float = option(0.05, "share of the rows that goes into validation; 0: none")
    test: float = option(0.05, "share of the rows that goes into test; 0: none")
    group: str = option("", "column whose equal values stay together")
    similar: float = option(0.7, "prompts this alike (Jaccard similarity) stay together; 0: only equal ones do")
    hashes: int = option(256, "MinHash values of a prompt, a byte each")
