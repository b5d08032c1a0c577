"""Two ranks of different worlds: what one says the other hears, and neither waits for one that is gone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from loomtune.errors import PeerLost, UserError
from loomtune_plugins.rollouts.huggingface import HuggingFace
from loomtune_plugins.rollouts.line import Line
from loomtune_plugins.rollouts.settings import HuggingFaceSettings
from runs.echoing import echoes, line
from runs.worlds import SERVER, free_port


@pytest.fixture(scope="module")
def peer() -> Iterator[Line]:
    port = free_port()
    process = SERVER.Process(target=echoes, args=(port,), daemon=True)
    process.start()
    yield line(port, 0)
    process.kill()
    process.join()


def never() -> bool:
    return False


def test_plain_objects_of_any_size_go_there_and_back(peer: Line) -> None:
    for thing in ("", {"prompts": [[1, 2], []]}, list(range(100_000))):
        assert peer.say(thing, never)
        assert peer.hear() == [thing, thing]


def test_who_waits_may_look_now_and_then(peer: Line) -> None:
    assert not peer.hears(0.01)
    peer.say(1, never)
    assert peer.hears(math.inf) and peer.hears(0)
    assert peer.hear() == [1, 1] and not peer.hears(0)


def test_who_waits_to_be_heard_leaves_off_when_it_is_spoken_to(peer: Line) -> None:
    peer.say("first", never)
    assert peer.say(None, never), "the other one was waiting to say what it made of the first"


def test_a_peer_that_is_gone_is_named() -> None:
    port = free_port()
    process = SERVER.Process(target=echoes, args=(port,), daemon=True)
    process.start()
    other = line(port, 0)
    other.say("gone", never)
    with pytest.raises(PeerLost, match="lost rank 1 on there: its connection was closed"):
        other.hear()
    with pytest.raises(PeerLost):
        other.say("anyone?", never)
    with pytest.raises(PeerLost):
        other.check()


@pytest.mark.parametrize(
    ("ranks", "ahead", "said"),
    [
        (-1, 0, "rollout.ranks=-1 is negative"),
        (1, 2, "one batch at most is begun ahead"),
        (0, 1, "rollout.ahead=1 gains nothing where training generates itself"),
    ],
)
def test_settings_that_make_no_sense_are_refused(ranks: int, ahead: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        HuggingFace(HuggingFaceSettings(ranks=ranks, ahead=ahead))
