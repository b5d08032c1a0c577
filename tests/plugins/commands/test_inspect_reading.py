"""What is shown of a row is what its batch says, and every token of it can be looked at safely."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from loomtune.batching import collate
from loomtune.contracts import Batch, Sample, Segment, Tokenizer
from loomtune.plan import Finding
from loomtune_plugins.commands.inspect.page import page
from loomtune_plugins.commands.inspect.reading import Line, Part, filled, lines
from loomtune_plugins.commands.inspect.rows import ShownLine, ShownPart, ShownRow, Stretch
from loomtune_plugins.commands.inspect.spelling import Speller, visible
from loomtune_plugins.commands.inspect.summary import Summary
from loomtune_plugins.commands.inspect.terminal import Terminal
from loomtune_plugins.models.tokenizer import HuggingFaceTokenizer
from support import byte_tokenizer, shared

NOTHING = Summary("split train", "", [], [])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return HuggingFaceTokenizer(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


def segment(tokens: Sequence[int], targets: Sequence[int], parent: int = -1) -> Segment:
    """Targets: places."""
    learned = np.zeros(len(tokens), np.bool_)
    learned[list(targets)] = True
    return Segment(np.array(tokens, np.int32), learned, parent)


ANSWERED = Sample((segment([1, 10, 11, 12, 13], [3, 4]),))
OTHER = Sample((segment([1, 20, 21], [1, 2]),), {})
PAIR = Sample((segment([1, 30, 31], []), segment([40, 41], [0, 1], 0), segment([50, 51, 2], [0, 1, 2], 0)))


def said(found: Sequence[Line]) -> list[list[list[tuple[list[int], list[int]]]]]:
    """Of each part of each sample of each line: tokens, and places of the learned ones."""

    def told(part: Part) -> tuple[list[int], list[int]]:
        return part.tokens, [at for at, learned in enumerate(part.learned) if learned]

    return [[[told(part) for part in row.parts] for row in line.documents] for line in found]


def shifted(batch: Batch) -> Batch:
    """As a collator would make it that forgets that a token is predicted from the one before."""
    return replace(batch, predict_from=batch.predict_from - 1)


def test_learned_tokens_are_those_that_the_batch_asks_for() -> None:
    batch = collate([ANSWERED, OTHER], [0, 1], pad_id=0)
    assert said(lines([batch])) == [[[([1, 10, 11, 12, 13], [3, 4])]], [[([1, 20, 21], [1, 2])]]]


def test_a_collator_that_is_off_by_one_shows() -> None:
    good = collate([ANSWERED], [0], pad_id=0)
    assert said(lines([shifted(good)])) == [[[([1, 10, 12, 13, 13], [2, 3])]]]
    other_targets = replace(good, target=torch.tensor([12, 99]))
    assert said(lines([other_targets])) == [[[([1, 10, 11, 12, 99], [3, 4])]]]
    one_target = replace(good, predict_from=good.predict_from[1:], target=good.target[1:], row=good.row[1:])
    assert said(lines([one_target])) == [[[([1, 10, 11, 12, 13], [4])]]]


@pytest.mark.parametrize("sample", [PAIR, PAIR.unfolded()], ids=["shared", "a copy for each answer"])
@pytest.mark.parametrize("rows", [None, [1, 1], [2]], ids=["a row each", "one sample a row", "packed"])
def test_answers_to_one_prompt_are_parts_and_the_prompt_is_drawn_once(sample: Sample, rows: list[int] | None) -> None:
    batch = collate([sample, sample], [5, 6], pad_id=0, rows=rows)
    parts = [([1, 30, 31], []), ([40, 41], [0, 1]), ([50, 51, 2], [0, 1, 2])]
    found = lines([batch])
    assert [row for line in said(found) for row in line] == [parts, parts]
    assert [row.number for line in found for row in line.documents] == [5, 6]
    assert {(part.before) for line in found for row in line.documents for part in map(_hashable, row.parts)} == {
        (),
        (1, 30, 31),
    }


def test_what_is_learned_of_a_prompt_is_shown_though_its_second_copy_is_not_learned() -> None:
    prompts = Sample((segment([1, 30, 31], [1, 2]), *PAIR.segments[1:]))
    for sample in (prompts, prompts.unfolded()):
        ((parts,),) = said(lines([collate([sample], [0], pad_id=0)]))
        assert parts[0] == ([1, 30, 31], [1, 2])


def _hashable(part: Part) -> Part:
    return replace(part, before=tuple(part.before))  # type: ignore[arg-type]


def test_a_packed_row_holds_its_samples_apart_and_tells_its_padding() -> None:
    batch = collate([ANSWERED, OTHER, ANSWERED], [0, 2, 1], pad_id=0, rows=[2, 1])
    first, second = lines([batch])
    assert [row.number for row in first.documents] == [0, 2] and [row.number for row in second.documents] == [1]
    assert (first.tokens, second.tokens, first.width) == (8, 5, 8)
    assert filled(batch) == (13, 16)


def test_an_empty_micro_batch_shows_nothing() -> None:
    assert lines([collate([], [], pad_id=0, like=ANSWERED)]) == []


def test_numbers_of_a_sample_are_told() -> None:
    rated = replace(ANSWERED, numbers={"label": 1.0})
    (line,) = lines([collate([rated, replace(rated, numbers={"label": 0.0})], [0, 1], pad_id=0, rows=[2])])
    assert [row.numbers for row in line.documents] == [{"label": 1.0}, {"label": 0.0}]


def test_bytes_of_one_character_are_one_piece_and_nothing_is_lost(tokenizer: Tokenizer) -> None:
    text = "naïve 日本 🧵\n"
    ids = tokenizer.encode(text)
    pieces = list(Speller(tokenizer).pieces(ids, [False] * len(ids)))
    assert [piece.text for piece in pieces] == list(text)
    assert [token for piece in pieces for token in piece.tokens] == ids


def test_half_characters_are_shown_as_such_and_do_not_swallow_what_follows(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("é")
    ids = [first, *tokenizer.encode("a"), first, 2]
    pieces = list(Speller(tokenizer).pieces(ids, [False, False, True, True]))
    assert "".join(piece.text for piece in pieces) == "\ufffda\ufffd</s>"
    assert [piece.learned for piece in pieces][-2:] == [True, True]
    assert [(piece.special, piece.ends) for piece in pieces][-1] == (True, True)


def test_a_run_of_half_characters_is_no_single_piece(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("é")
    pieces = list(Speller(tokenizer).pieces([first] * 9, [False] * 9))
    assert [len(piece.tokens) for piece in pieces] == [4, 4, 1]


def test_a_character_whose_bytes_are_given_and_learned_is_not_one_piece(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("é")
    pieces = list(Speller(tokenizer).pieces([first, second], [False, True]))
    assert [piece.tokens for piece in pieces] == [(first,), (second,)]


def test_special_tokens_are_signs_and_only_the_end_ends(tokenizer: Tokenizer) -> None:
    pieces = list(Speller(tokenizer).pieces([1, *tokenizer.encode("a"), 2], [False] * 3))
    assert [(piece.text, piece.special, piece.ends) for piece in pieces] == [
        ("<s>", True, False),
        ("a", False, False),
        ("</s>", True, True),
    ]


def test_blanks_that_a_tokenizer_puts_before_words_are_shown_where_the_model_reads_them() -> None:
    tokenizer = HuggingFaceTokenizer(shared("models", "stories260k"))
    ids = [1, *tokenizer.encode("once upon a time")]
    whole = "".join(piece.text for piece in Speller(tokenizer).pieces(ids, [False] * len(ids)))
    assert whole == tokenizer.decode(ids, special=True)
    answer = tokenizer.encode("and then")
    behind = "".join(piece.text for piece in Speller(tokenizer).pieces(answer, [True] * len(answer), ids[-8:]))
    assert behind == " and then"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a⏎\nb⇥\tc"),
        ("\x1b[31mred\x07\x00\r", "␛[31mred␇␀␍"),
        ("\x7f\x9b1m", "␡⟨U+009B⟩1m"),
        ("\u202eabc\u2066\u200b", "⟨U+202E⟩abc⟨U+2066⟩⟨U+200B⟩"),
        ("\ud800 \u2028 \ue000 \U000e0041", "⟨U+D800⟩ ⟨U+2028⟩ ⟨U+E000⟩ ⟨U+E0041⟩"),
        ("a\u00a0b", "a⍽b"),
        ("日本 é <b>", "日本 é <b>"),
    ],
)
def test_nothing_that_acts_gets_through(text: str, shown: str) -> None:
    assert visible(text) == shown
    visible(text).encode()


HOSTILE = "</pre><script>alert('x')</script><img src=http://evil/ onerror=x> & \x1b]0;title\x07"


def a_line(text: str, *, kinds: Sequence[str] = ("given",), name: str = "") -> ShownLine:
    stretches = [Stretch(kind, visible(text), (7, 8)) for kind in kinds]
    row = ShownRow(HOSTILE, 4, 2, {HOSTILE: 1.0}, [ShownPart(name, 4, 2, stretches)])
    return ShownLine([row], 4, 4)


def test_the_page_escapes_all_that_comes_from_data_and_loads_nothing() -> None:
    told = Summary(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], [(0, 9, 3), (10, 19, 0)])
    text = page([a_line(HOSTILE, name=HOSTILE)], told, [Finding(HOSTILE, HOSTILE)], HOSTILE, apart=True)
    bare = text.partition("</style>")[2]
    assert "<script" not in text and "<img" not in text and "\x1b" not in text
    assert bare.count("&lt;script&gt;") >= 5
    assert "http" not in text.replace("http://evil", "") and "url(" not in text and "@import" not in text
    assert 'title="7, 8"' in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_tells_the_kinds_of_tokens_apart() -> None:
    text = page([a_line("warp", kinds=["given", "learned", "sign", "end"])], NOTHING, [], "target", apart=False)
    rows = text.partition("<h2>")[2].partition("<article")[2]
    for kind in ("given", "learned", "sign", "end"):
        assert f'<span class="{kind}">warp</span>' in rows
    assert 'title="7' not in rows
    assert '<pre class="rejected">' in page([a_line("x", name="rejected")], NOTHING, [], "target", apart=False)


def shown(line: ShownLine, *, apart: bool = False) -> str:
    stream = io.StringIO()
    Terminal(stream, apart=apart).show([line], NOTHING, [], "target")
    return stream.getvalue()


def test_without_colours_targets_stand_in_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    line = a_line("warp", kinds=["given", "learned", "learned", "end", "sign"])
    assert "\nwarp«warpwarpwarp»warp\n" in shown(line)
    assert "\nwarp«│warp│warp│warp»│warp\n" in shown(line, apart=True).replace("│«", "«│").replace("│»", "»│")
    assert "\x1b" not in shown(line)


def test_with_colours_there_are_no_marks_and_rows_bring_none_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown(a_line(HOSTILE, kinds=["learned", "end"], name=HOSTILE))
    assert "«" not in text and "\x1b[32m</pre>" in text and "\x1b[30;42m</pre>" in text
    assert "\x1b]0" not in text and "\x07" not in text
    assert "\x1b[31m" in shown(a_line("worse", kinds=["learned"], name="rejected"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "«" in shown(a_line("warp", kinds=["learned"])) and "\x1b[32m" not in shown(
        a_line("warp", kinds=["learned"])
    )


def test_a_text_that_ends_a_line_leaves_no_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert "SQL:⏎\n«SELECT»" in shown(
        ShownLine([ShownRow("o", 2, 1, {}, [_part("SQL:\n", "given"), _part("SELECT", "learned")])], 2, 2)
    ).replace("▸ \n", "")


def _part(text: str, kind: str) -> ShownPart:
    return ShownPart("", 1, 1, [Stretch(kind, visible(text), (1,))])
