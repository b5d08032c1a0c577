"""Which steps are traced."""

import pytest

from loomtune.errors import UserError
from loomtune.settings import ProfileSettings, Settings
from loomtune_plugins.trackers.usage.window import findings, window


@pytest.mark.parametrize(("said", "meant"), [("", None), ("7", (7, 7)), ("10:12", (10, 12)), ("3:3", (3, 3))])
def test_a_step_or_the_first_and_the_last_one(said: str, meant: tuple[int, int] | None) -> None:
    assert window(said) == meant


@pytest.mark.parametrize("said", ["12:10", "0", "0:3", "ten", "1-3", "1:2:3", "-1", ":3", "3:", " "])
def test_what_names_no_steps_is_refused_before_the_run_with_a_cure(said: str) -> None:
    with pytest.raises(UserError, match=r"set profile\.steps to"):
        window(said)
    (finding,) = findings(Settings(profile=ProfileSettings(said)), ["usage"])
    assert finding.fatal and f"profile.steps={said}" in finding.what


@pytest.mark.parametrize(
    ("said", "ends", "word"),
    [("4:6", {"steps": 5}, "not all"), ("6", {"steps": 5}, "none"), ("3", {"steps": 9, "stop_after": 2}, "none")],
)
def test_steps_beyond_the_last_are_a_warning(said: str, ends: dict[str, int], word: str) -> None:
    (finding,) = findings(Settings(profile=ProfileSettings(said), **ends), ["usage"])
    assert not finding.fatal and word in finding.what


def test_steps_of_the_run_are_fine_and_so_are_steps_of_a_run_whose_length_follows_from_its_rows() -> None:
    assert not findings(Settings(profile=ProfileSettings("4:5"), steps=5), ["usage"])
    assert not findings(Settings(profile=ProfileSettings("400")), ["usage"])
    assert not findings(Settings(), [])


def test_what_nobody_traces_is_refused() -> None:
    (finding,) = findings(Settings(profile=ProfileSettings("2")), ["console", "jsonl"])
    assert finding.fatal and finding.cure == "set tracker=[console,jsonl,usage]"
