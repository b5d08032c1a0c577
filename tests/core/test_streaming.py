"""Rows that stream: what is drawn, where it goes on, what is told, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from letters import Letters, Pairs, Tide, beside, row
from loomtune import streaming
from loomtune.contracts import Data, Drawn, Guard, Judgement, Verdict
from loomtune.errors import Preempted, UserError
from loomtune.order import permutation
from loomtune.samples import Source, prepare
from loomtune.settings import BatchSettings, Settings
from loomtune.streaming import AHEAD, Stream
from loomtune.testing import toy

ROWS = [row(f"row {number}", "yes", "no", origin=f"rows:{number}") for number in range(10)]


class Alive(Guard):
    """Counts how often it was told that nothing hangs."""

    def __init__(self) -> None:
        self.waited = 0

    def judge(self, step: int, loss: float, gradient_norm: float) -> Judgement:
        return Judgement(Verdict.CONTINUE)

    def waits(self) -> None:
        self.waited += 1


@pytest.fixture
def streams(tmp_path: Path) -> Iterator[Any]:
    """Makes streams of data, each in a folder of its own unless one is named, and ends them."""
    made: list[Stream] = []

    def stream(data: Tide, name: str = "", objective: Any = None, sampler: str = "shuffled") -> Stream:
        source = Source(data, objective or Pairs(), Letters(), "train", 100, data.window)
        run: Any = SimpleNamespace(
            data=data,
            objective=source.objective,
            tokenizer=source.tokenizer,
            max_length=100,
            folder=tmp_path / (name or f"run-{len(made)}"),
            splits={"train": prepare(source, tmp_path / "cache", 256)},
            model=SimpleNamespace(vocabulary=lambda: 256),
            world=toy.world(),
            guards=[Alive()],
            settings=Settings(seed=3, batch=BatchSettings(sampler=sampler)),
            stop=SimpleNamespace(requested=False),
            told=[],
        )
        run.tell_once = run.told.append
        made.append(Stream(run, lambda: run.stop.requested))
        return made[-1]

    yield stream
    for each in made:
        each.close()


def prompts(drawn: Sequence[Drawn]) -> list[int]:
    """The numbers of the rows that were drawn."""
    texts = ["".join(map(chr, one.sample.segments[0].tokens)) for one in drawn]
    return [int(text.removeprefix("row ")) for text in texts]


def expected(windows: Sequence[range], seed: int = 3) -> list[int]:
    orders = [permutation(len(window), seed, "order", number) for number, window in enumerate(windows)]
    return [window[i] for window, order in zip(windows, orders, strict=True) for i in order]


EPOCH = [range(0, 4), range(4, 8), range(8, 10)]


def test_each_epoch_has_each_row_once_in_an_order_within_its_windows(streams: Any) -> None:
    drawn = prompts(streams(Tide(ROWS)).draw(0, 30))
    assert drawn == expected(EPOCH * 3)
    assert all(sorted(drawn[begin : begin + 10]) == list(range(10)) for begin in (0, 10, 20))
    assert drawn[:10] != drawn[10:20]


def test_a_window_that_holds_all_rows_needs_no_process_and_is_the_order_of_a_split(streams: Any) -> None:
    stream = streams(Tide(ROWS, window=10))
    assert prompts(stream.draw(0, 20)) == expected([range(10)] * 2)
    assert stream._beside is None


def test_rows_in_their_own_order_stay_in_it(streams: Any) -> None:
    assert prompts(streams(Tide(ROWS), sampler="sequential").draw(0, 20)) == [*range(10), *range(10)]


@pytest.mark.parametrize("done", [0, 3, 4, 9, 10, 13, 17])
def test_it_goes_on_at_the_very_row_from_what_a_checkpoint_kept(streams: Any, done: int) -> None:
    first, second = streams(Tide(ROWS)), streams(Tide(ROWS))
    before = prompts(first.draw(0, done))
    second.set(first.state())
    first.close()
    assert before + prompts(second.draw(done, 24 - done)) == expected(EPOCH * 3)[:24]


def test_windows_are_made_ahead_and_taken_away_behind(streams: Any) -> None:
    stream = streams(Tide([row(f"row {number}", "yes", "no") for number in range(40)]))
    folder = stream.run.folder / "stream"
    stream.draw(0, 1)
    while not (folder / str(AHEAD)).exists():
        time.sleep(0.01)
    time.sleep(0.3)  # in which one that is not held back would have made more
    for begin in range(0, 24, 4):
        stream.draw(begin, 4)
        number = begin // 4
        while not (folder / str(number + 1)).exists():
            assert psutil.pid_exists(stream._beside.process.pid)
            time.sleep(0.01)
        kept = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())
        assert kept[-1] <= number + AHEAD and kept[0] >= max(1, number)
    stream.close()
    assert not folder.exists() and not beside()


def test_what_was_drawn_outlives_its_window(streams: Any) -> None:
    stream = streams(Tide(ROWS))
    drawn = stream.draw(4, 2)
    stream.draw(8, 1)
    assert not (stream.run.folder / "stream" / "1").exists()
    assert prompts(drawn) == expected(EPOCH)[4:6]
    assert all(type(part).__name__ == "ndarray" for one in drawn for part in (one.sample.segments[0].tokens,))


def test_few_bad_rows_are_left_out_and_told_with_their_window(streams: Any) -> None:
    rows = [row(f"row {number}", "yes", "no", origin=f"rows:{number}") for number in range(300)]
    rows[150] = {"origin": "rows:150"}
    stream = streams(Tide(rows, window=100, bad=(30, 250)))
    assert "1 of 100 rows of a window of train cannot be learned from:\n  rows:30: is ill" in stream._head.told
    drawn = prompts(stream.draw(0, 297))
    assert sorted(drawn) == [number for number in range(300) if number not in (30, 150, 250)]
    assert [one.splitlines()[1:] for one in stream.run.told] == [["  rows:150: has no prompt"], ["  rows:250: is ill"]]


def test_many_bad_rows_end_the_run_where_they_would_be_met_and_in_the_head_before_it(streams: Any) -> None:
    stream = streams(Tide(ROWS, bad=(5, 6)))
    assert len(stream.draw(0, 3)) == 3, "rows before them are learned"
    before = stream.state()
    with pytest.raises(UserError, match=r"2 of 4 rows of split train cannot be learned from:\n  rows:5: is ill"):
        stream.draw(3, 2)
    assert stream.state() == before, "and it can be gone on from there"
    with pytest.raises(UserError, match="rows:2: is ill"):
        streams(Tide(ROWS, version="2", bad=(2, 3)))


def test_a_run_that_bad_rows_ended_goes_on_without_them_as_the_cure_says(
    streams: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, other = streams(Tide(ROWS, bad=(5, 6))), streams(Tide(ROWS, bad=(5, 6)))
    drawn = prompts(stream.draw(0, 3))
    with pytest.raises(UserError, match=r"LOOMTUNE_BAD_ROWS=0\.5 leaves them out"):
        stream.draw(3, 2)
    monkeypatch.setenv("LOOMTUNE_BAD_ROWS", "0.5")
    other.set(stream.state())
    assert sorted(drawn + prompts(other.draw(3, 5))) == [0, 1, 2, 3, 4, 7, 8, 9]
    monkeypatch.setenv("LOOMTUNE_BAD_ROWS", "2 %")
    with pytest.raises(UserError, match="LOOMTUNE_BAD_ROWS=2 % is no number from 0 to 1"):
        streams(Tide(ROWS, version="2"))


@pytest.mark.parametrize(("count", "window", "bad", "passes"), [
    (140, 10000, 90, False), (140, 10000, 1, True), (140, 10000, 2, False), (50, 50, 1, True), (400, 300, 3, True),
    (210, 200, 2, True),
])  # fmt: skip
def test_a_hundredth_of_the_rows_that_were_read_may_be_bad_and_one_always(
    streams: Any, count: int, window: int, bad: int, passes: bool
) -> None:
    """The bad ones are the last: of a short window where it is the last of several."""
    rows = [row(f"row {number}", "yes", "no") for number in range(count)]
    data = Tide(rows, version=f"{bad}", window=window, bad=tuple(range(count - bad, count)))
    if passes:
        assert sorted(prompts(streams(data).draw(0, count - bad))) == list(range(count - bad))
    else:
        with pytest.raises(UserError, match=f"{bad} of {count} rows"):
            streams(data)


def test_a_tokenizer_that_is_too_large_is_found_in_any_window(streams: Any) -> None:
    stream = streams(Tide([*ROWS[:5], row("row ∞", "yes", "no", origin="rows:5")]))
    with pytest.raises(UserError, match=r"token 8734 \(first too large in rows:5\)"):
        stream.draw(4, 1)


def test_whoever_waits_says_that_nothing_hangs_until_no_row_comes_for_too_long(
    streams: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PULSE", 0.05)
    monkeypatch.setenv("LOOMTUNE_TIMEOUT_MINUTES", str(2 / 60))
    stream = streams(Tide(ROWS, halts=6))
    with pytest.raises(UserError, match=r"no row was read for 2 s\n.*LOOMTUNE_TIMEOUT_MINUTES"):
        stream.draw(4, 1)
    assert stream.run.guards[0].waited > 5


def test_what_takes_long_to_find_its_place_does_not_count_as_lost(
    streams: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PULSE", 0.05)
    monkeypatch.setenv("LOOMTUNE_TIMEOUT_MINUTES", str(1.5 / 60))
    assert len(streams(Tide(ROWS, seeks=3.0)).draw(4, 1)) == 1


def test_time_that_is_no_number_is_refused_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOMTUNE_TIMEOUT_MINUTES", "ten")
    with pytest.raises(UserError, match="LOOMTUNE_TIMEOUT_MINUTES=ten is no number"):
        streaming.patience()


def test_a_request_to_stop_is_heard_while_rows_are_waited_for(streams: Any) -> None:
    stream = streams(Tide(ROWS, halts=6))
    stream.draw(0, 4)
    stream.run.stop.requested = True
    with pytest.raises(Preempted):
        stream.draw(4, 1)


def test_the_end_of_the_process_is_told(streams: Any) -> None:
    stream = streams(Tide(ROWS, halts=6))
    stream.draw(0, 1)
    stream._beside.process.kill()
    with pytest.raises(UserError, match=r"rows ahead has ended\n.*the log may say why") as error:
        stream.draw(4, 1)
    assert "TIMEOUT" not in str(error.value)


def test_what_cannot_be_sent_to_another_process_is_told(streams: Any) -> None:
    class Local(Pairs):
        """Of no module: pickle cannot name it."""

    with pytest.raises(UserError, match=r"cannot be sent to another process.*\n.*data.stream=false"):
        streams(Tide(ROWS), objective=Local()).draw(4, 1)
    with pytest.raises(UserError, match=r"cannot be sent to another process.*\n.*data.stream=false"):
        streaming.check_sent(Source(Tide(ROWS), Local(), Letters(), "train", 100, 4))
    streaming.check_sent(Source(Tide(ROWS), Local(), Letters(), "train", 100))


def test_a_place_that_json_cannot_hold_is_the_plugin_s_mistake(streams: Any) -> None:
    with pytest.raises(UserError, match=r"JSON cannot hold.*\n.*mistake of the data's plugin"):
        streams(Tide(ROWS, mark=lambda number: {number}))


def test_windows_of_an_attempt_that_was_killed_are_not_read(streams: Any) -> None:
    stream = streams(Tide(ROWS), "same")
    stale = stream.run.folder / "stream" / "1"
    stale.mkdir(parents=True)
    (stale / "tokens").touch()
    assert prompts(stream.draw(0, 8)) == expected(EPOCH)[:8]


def test_data_need_say_no_more_than_their_rows_to_be_streamed() -> None:
    """The contract's own `stream` reads the rows up to the place again."""

    found = list(Data.stream(Tide(ROWS), 7))
    assert [place for _, place in found] == [8, 9, 10] and found[0][0] == ROWS[7]
