"""What services send that is no answer, read without a service."""

from __future__ import annotations

import json
import math

import pytest

from loomtune_plugins.endpoint import Ask
from loomtune_plugins.endpoint.patience import Again, judged
from loomtune_plugins.endpoint.replies import Unusable, options, reply_of

ASK = Ask(messages=[{"role": "user", "content": "x" * 30}])


@pytest.mark.parametrize("said", ["Mon, 01 Jan 2100 00:00:00 +9999999999999", "soon", "nan", "", "Mon, 99 Jan"])
def test_a_retry_after_that_says_nothing_asks_for_no_wait(said: str) -> None:
    assert judged(429, {"retry-after": said}, b"", "stage.x") == Again("status 429")


@pytest.mark.parametrize(
    ("code", "message", "passes"),
    [
        ("rate_limit_exceeded", "Limit: 3 / min. Add a payment method at https://example.org/account/billing", True),
        ("rate_limit_exceeded", "You exceeded your current quota, please check your plan and billing details", True),
        ("insufficient_quota", "You exceeded your current quota, please check your plan and billing details", False),
        ("billing_hard_limit_reached", "Hard limit", False),
    ],
)
def test_a_limit_of_a_minute_is_waited_for_and_an_empty_account_is_not(code: str, message: str, passes: bool) -> None:
    body = json.dumps({"error": {"message": message, "code": code}}).encode()
    assert isinstance(judged(429, {}, body, "stage.x"), Again) == passes


@pytest.mark.parametrize(
    "shown",
    [
        [("A", -math.inf), ("B", -math.inf)],
        [("A", -math.inf), ("C", -0.1)],
        [("A", math.inf), ("B", -1.0)],
        [("A", math.nan), ("B", -1.0)],
        [],
    ],
)
def test_no_choice_is_made_of_what_is_impossible_or_no_probability(shown: list[tuple[str, float]]) -> None:
    with pytest.raises(Unusable):
        options(shown, ("A", "B"))


def test_an_impossible_option_beside_a_likely_one_is_at_most_as_likely_as_the_last() -> None:
    assert options([("B", -0.1), ("C", -9.0), ("A", -math.inf)], ("A", "B")) == {"A": -9.0, "B": -0.1}


def test_a_count_of_tokens_that_nobody_could_have_written_is_guessed() -> None:
    said = {"choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": 10**400, "completion_tokens": 1}}
    read, written = reply_of(json.dumps(said).encode(), ASK).tokens
    assert read < 100 and written == 1
