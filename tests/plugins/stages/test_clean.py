"""Text is mended without losing any of it, and rows with nothing to learn go with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from loomtune.contracts import Dropped
from loomtune.errors import UserError
from loomtune_plugins.stages.clean import Clean
from loomtune_plugins.stages.settings import CleanSettings


def mended(text: str, **settings: Any) -> str:
    (row,) = Clean(CleanSettings(min_answer=0, min_characters=0, **settings)).apply([{"text": text}])
    assert not isinstance(row, Dropped)
    return str(row["text"])


def reason(row: dict[str, Any], **settings: Any) -> str:
    (judged,) = Clean(CleanSettings(**settings)).apply([{**row, "origin": "rows.jsonl:7"}])
    if isinstance(judged, Dropped):
        assert judged.origin == "rows.jsonl:7"
        return judged.reason
    return ""


def test_letters_and_their_accents_are_composed() -> None:
    assert mended("Cafe\u0301 ²") == "Café ²"
    assert mended("Cafe\u0301 ²", unicode="nfkc") == "Café 2"
    assert mended("Cafe\u0301 ²", unicode="none") == "Cafe\u0301 ²"


def test_what_nobody_sees_goes_and_what_lays_text_out_stays() -> None:
    assert mended("a\x07b\u200bc\ufeffde\tf\r\ng\rh") == "abcde\tf\ng\nh"
    assert mended("hidden\U000e0041\U000e0042") == "hidden"


@pytest.mark.parametrize("mark", ["\f", "\v", "\x85", "\u2028", "\u2029"])
def test_where_a_line_or_a_page_ends_a_line_ends(mark: str) -> None:
    assert mended(f"page one{mark}page two") == "page one\npage two"


def test_the_language_of_terminals_goes_whole() -> None:
    assert mended("\x1b[31mred\x1b[0m, \x1b]0;a title\x07\x1b[1;4mbold") == "red, bold"
    assert mended("a\x1bHello") == "aHello" and mended("x[31m") == "x[31m"


def test_tags_that_spell_a_flag_stay() -> None:
    scotland = "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
    assert mended(f"{scotland}\U000e0041 and \U0001f3f4\U000e0041") == f"{scotland} and \U0001f3f4"


@pytest.mark.parametrize("text", ["ខ្ញុំ\u200bចូលចិត្ត", "ภาษา\u200bไทย", "ພາສາ\u200bລາວ", "မြန်မာ\u200bစာ"])
def test_a_zero_width_blank_stays_where_a_script_has_no_other(text: str) -> None:
    assert mended(text) == text
    assert mended(f"\u200b{text}\u200ba\u200bb") == f"{text}ab"


def test_joiners_stay_because_scripts_and_emoji_need_them() -> None:
    family, persian = "👨‍👩‍👧", "می‌خواهم"
    assert mended(family) == family and mended(persian) == persian


def test_nul_and_halves_of_characters_go_in_any_case() -> None:
    assert mended("a\x00b\ud83dc\x07", control=False, unicode="none") == "abc\x07"
    assert mended("a&#0;b", html="unescape", control=False) == "a\ufffdb"


def test_text_that_was_decoded_wrongly_is_repaired_on_request() -> None:
    assert mended("Itâ€™s") == "Itâ€™s"
    assert mended("Itâ€™s", mojibake=True) == "It’s"


CODE = """Use `vector<int>`:
```cpp
if (a < b && c > d) std::vector<b> x; // <b>bold</b> &amp;
```
That is 48/2 = <<48/2=24>>24."""


def test_html_stays_unless_it_is_asked_for() -> None:
    assert mended("<b>5 &lt; 6</b>") == "<b>5 &lt; 6</b>"
    assert mended("<b>5 &lt; 6</b>", html="unescape") == "<b>5 < 6</b>"


@pytest.mark.parametrize("html", ["keep", "strip"])
def test_code_and_comparisons_survive(html: str) -> None:
    assert mended(CODE, html=html) == CODE
    assert mended("it`s\n```\nlist<b>\n```", html=html) == "it`s\n```\nlist<b>\n```", "a stray tick opens nothing"
    assert mended("if a<b and c>d: List<String>", html=html) == "if a<b and c>d: List<String>"


def test_tags_comments_and_scripts_are_stripped() -> None:
    page = (
        '<div class="x"><p>One &amp; <a href="http://e.org/?a=1&b=2">two</a>.</p><!-- no -->İ<SCRIPT>evil()</script>'
        "<p>Three<br/>four</p></div><pre><code>x &lt; y</code></pre>"
    )
    lines = [line for line in mended(page, html="strip").split("\n") if line]
    assert lines == ["One & two.", "İ", "Three", "four", "x < y"]


@pytest.mark.parametrize(
    "text", ["<a " * 300_000, "<!--" * 300_000, "`" * 300_001, "<a =" * 300_000, "<a" + " " * 900_000, "<" * 900_000]
)
def test_hostile_markup_costs_no_more_than_its_length(text: str) -> None:
    assert len(mended(text, html="strip")) <= len(text)


def test_blanks_are_collapsed_on_request_and_indentation_stays() -> None:
    text = "def f():  \n    return  1\n\n\n\nend\t\tof it "
    assert mended(text) == text
    assert mended(text, blanks="collapse") == "def f():\n    return 1\n\nend of it"


def test_roles_labels_and_what_rides_along_stay_as_they_are() -> None:
    calls = [{"function": {"name": "f\u200b", "arguments": "{}"}}]
    row = {
        "messages": [{"role": "user", "content": "a\x00"}, {"role": "assistant", "content": None, "tool_calls": calls}],
        "label": False,
        "gold": "x\x00",
        "origin": "f:1",
    }
    (judged,) = Clean(CleanSettings()).apply([row])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    assert judged == {**row, "messages": turns}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "completion": " \u200b"}, "no answer"),
        ({"prompt": "", "completion": ""}, "too short"),
        ({"prompt": "Q"}, ""),
        ({"prompt": "Q", "chosen": "A", "rejected": ""}, "no answer"),
        ({"prompt": "Q", "chosen": "A\x00", "rejected": "A"}, "both answers are the same"),
        ({"prompt": "Q", "answers": ["A", ""], "ranks": [1, 2]}, "no answer"),
        ({"prompt": "Q", "answers": []}, "no answer"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "no turn of the assistant"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]}, "no answer"),
        ({"text": "A"}, ""),
    ],
)
def test_rows_with_nothing_to_learn_go_with_the_reason(row: dict[str, Any], expected: str) -> None:
    assert reason(row) == expected


def test_lengths_are_those_of_the_row_and_of_each_answer() -> None:
    row = {"prompt": "12345", "chosen": "123", "rejected": "1234567"}
    assert reason(row, min_characters=17) == "too short"
    assert reason(row, max_characters=15) == "too long"
    assert reason(row, min_answer=4) == "answer too short"
    assert reason(row, max_answer=6) == "answer too long"
    assert reason(row, min_characters=16, max_characters=16, min_answer=3, max_answer=7) == ""


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"unicode": "nfd"}, "stage.clean.unicode=nfc"),
        ({"html": "drop"}, "stage.clean.html=strip"),
        ({"blanks": "none"}, "stage.clean.blanks=collapse"),
        ({"min_answer": 5, "max_answer": 4}, "stage.clean.min_answer"),
        ({"min_characters": -1}, "stage.clean.min_characters"),
    ],
)
def test_settings_without_sense_are_refused_with_the_key(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as refused:
        Clean(CleanSettings(**settings))
    assert key in refused.value.faults[0].cure
