"""Settings of the reward that a language model gives."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option
from loomtune_plugins.endpoint import EndpointSettings
from loomtune_plugins.rewards.settings import WEIGHT

QUESTION = "Is the answer correct, helpful and clear?"
TEMPLATES = {
    "number": "End with a line `Score: N`, where N is a number from {lowest} (worst) to {highest} (best).",
    "json": 'Answer with JSON alone: {"score": N}, where N is a number from {lowest} (worst) to {highest} (best).',
    "choice": "(A) yes\n(B) no\n\nAnswer with the letter alone.",
}
"""How the score is read, to how the judge is told to say it."""

SHOWN = "This was asked:\n\n{prompt}\n\nThis is the answer:\n\n{completion}\n\n{criterion}\n\n"


@dataclass
class JudgeSettings(EndpointSettings):
    """A language model that says how good an answer is."""

    weight: float = option(1.0, WEIGHT)
    template: str = option(
        "", "what is asked, or a file with it: {prompt}, {completion}, {criterion} and {row.KEY} are filled in"
    )
    criteria: list[str] = option([], "each is asked about by itself as {criterion}; the score is their mean")
    system: str = option("", "the system's message before it; empty: none")
    read: str = option(
        "number", 'how it is said: `number` behind `Score:`, `json` as {"score": N}, `choice`: how likely A is, not B'
    )
    lowest: float = option(1.0, "what the judge calls the worst, which is a score of 0")
    highest: float = option(10.0, "what it calls the best, which is 1")
    max_tokens: int = option(512, "longest answer of the judge")
    temperature: float = option(0.0, "of the judge; 0: the same question has the same answer")
