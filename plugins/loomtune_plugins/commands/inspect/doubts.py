"""What is doubtful about a split, in words, each with a cure."""

from __future__ import annotations

from collections.abc import Iterator

from loomtune.contracts import Sample
from loomtune.plan import Finding
from loomtune.run import Run
from loomtune_plugins.commands.inspect.figures import Figures, Tally, first_target
from loomtune_plugins.commands.inspect.spelling import Speller

ENOUGH = 50
"""Samples from which on it says something that all begin alike."""

LOOKED = 200
"""Samples, the first, whose prompts are looked at where their answers begin."""

USUAL, JOINT = 0.9, 6
"""Share of them from which on it is a habit; tokens of a prompt's end that are told."""

TOLD = {
    "two_beginnings": (
        "begin with {bos} twice",
        "take {bos} out of the rows or the chat template, or set objective.bos=never",
    ),
    "no_end": (
        "do not end with a target {eos}, so from them a model does not learn to stop",
        "raise max_length where it cuts answers, or see that the template's turn end is the tokenizer's eos_token",
    ),
    "two_ends": ("end with {eos} twice", "take {eos} out of the rows: it is added where it is missing"),
    "only_end": (
        "teach nothing but to end at once: an answer is empty",
        "leave rows without an answer out of the files",
    ),
    "no_target": ("have nothing to be learned", "see whether prompts alone are meant; they only take time otherwise"),
}


def doubts(run: Run, split: str, found: Figures, speller: Speller) -> list[Finding]:
    """Warnings about a split."""
    return [Finding(what, cure, fatal=False) for what, cure in _doubts(run, split, found, speller)]


def _doubts(run: Run, split: str, found: Figures, speller: Speller) -> Iterator[tuple[str, str]]:
    bos, eos = run.tokenizer.bos_id, run.tokenizer.eos_id
    signs = {"bos": speller.one(bos) if bos is not None else "", "eos": speller.one(eos)}
    for name, (what, cure) in TOLD.items():
        tally = found.doubts[name]
        asked = name == "no_target" and not run.objective.needs_targets()
        if tally.count and not asked:
            yield _of(tally, found.samples, what.format(**signs)), cure.format(**signs)
    if found.equal.count:
        what = f"are an earlier one again, token by token ({_where(found.equal)})"
        yield f"{_some(found.equal.count, found.samples)} {what}", "`loomtune prepare` takes duplicates out"
    yield from _beginning(found, speller)
    yield from _touching(run, split, speller)


def _touching(run: Run, split: str, speller: Speller) -> Iterator[tuple[str, str]]:
    """Prompts that run into their answers, `...weeks?It took`: two columns were joined and nothing put between."""
    samples = run.splits[split]
    joints = [_joint(samples[index], speller) for index in range(min(len(samples), LOOKED))]
    touching = [joint for joint in joints if _touch(*joint)]
    if joints and len(touching) > USUAL * len(joints):
        asked, answered = touching[0]
        what = f"prompts run into their answers with nothing between: '...{asked}' then '{answered}...'"
        yield what, "set objective.separator to a blank or a new line, or end the prompts with one"


def _joint(sample: Sample, speller: Speller) -> tuple[str, str]:
    """The last words before the first learned token, and what is learned then; nothing where there is no such place."""
    learned, before = first_target(sample)
    if len(before) < 2 or not learned or speller.is_special(int(before[-1])):
        return "", ""
    return speller.joint(before[-JOINT:].tolist(), learned)


def _touch(asked: str, answered: str) -> bool:
    """Blanks tell nothing of languages that write none, so only of ASCII."""
    ends, begins = asked[-1:], answered[:1]
    return (ends + begins).isascii() and not ends.isspace() and begins.isalnum() and bool(ends)


def _beginning(found: Figures, speller: Speller) -> Iterator[tuple[str, str]]:
    """All answers begin alike: a marker that belongs into the prompt, or a form that all of them have."""
    if sum(found.learns.values()) >= ENOUGH and len(found.learns) == 1:
        what = f"in every sample the first target is {speller.one(next(iter(found.learns)))}"
        cure = "nothing, where all answers have this form; else end the prompt, its separator or the template with it"
        yield what, cure


def _of(tally: Tally, samples: int, what: str) -> str:
    return f"{_some(tally.count, samples)} {what} ({_where(tally)})"


def _some(count: int, samples: int) -> str:
    return f"all {samples:,} samples" if count == samples else f"{count:,} of {samples:,} samples"


def _where(tally: Tally) -> str:
    more = ", ..." if tally.count > len(tally.first) else ""
    return ", ".join(tally.first) + more
