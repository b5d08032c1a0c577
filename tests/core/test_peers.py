"""What is said of a peer that was lost. The messages are torch's and gloo's own; real losses: tests/labs."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from loomtune import peers
from loomtune.errors import PeerLost, RunFailed
from loomtune.peers import Peer

HERE, THERE = Peer("alpha", "127.0.0.1"), Peer("beta", "10.1.2.3")
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
CLOSED = f"{GLOO}pair.cc:537] Read error [10.1.2.3]:62611: Connection reset by peer."
SILENT = f"{GLOO}unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete"


def lost(error: Exception, *hosts: Peer) -> str:
    with pytest.raises(PeerLost) as raised, peers.watched(hosts):
        raise error
    assert raised.value.__cause__ is error and str(error) in str(raised.value)
    return str(raised.value)


def test_the_rank_and_host_that_closed_its_connection_are_named() -> None:
    said = lost(RuntimeError(CLOSED), HERE, THERE, HERE, THERE)
    assert said.startswith("lost rank 1, 3 on beta (10.1.2.3): its connection was closed")
    assert "cure: start the run again, and it goes on from its last checkpoint" in said


def test_a_rank_does_not_take_itself_for_the_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert lost(RuntimeError(CLOSED), THERE, THERE, THERE).startswith("lost rank 0, 2 on beta (10.1.2.3): its")
    assert lost(RuntimeError(CLOSED), HERE, THERE).startswith("lost another rank; every host can be reached: its")


def test_the_host_that_cannot_be_reached_is_named_with_the_time_that_was_waited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Peer, "answers", lambda peer: peer == HERE)
    said = lost(RuntimeError(SILENT), HERE, HERE, THERE)
    assert said.startswith(
        "lost rank 2 on beta (10.1.2.3), which cannot be reached: no answer within LOOMTUNE_TIMEOUT_MINUTES=10\n"
    )


def test_where_all_hosts_answer_a_process_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peer, "answers", lambda peer: True)
    assert lost(RuntimeError(SILENT), HERE, THERE).startswith("lost another rank; every host can be reached: no answer")
    assert lost(RuntimeError(SILENT)).startswith("lost another rank: no answer")


@pytest.mark.parametrize(
    "error",
    [
        dist.DistStoreError("wait timeout after 30000ms, keys: /default_pg/0//cpu//0/1"),
        dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
        RuntimeError("Gloo connectFullMesh failed with [connect.cc] no error"),
    ],
)
def test_losses_while_joining_and_of_nccl_are_known(error: RuntimeError) -> None:
    assert isinstance(error, RuntimeError) and "lost another rank" in lost(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the rows' server timed out"),
        RuntimeError("[enforce fail at third_party/gloo/gloo/barrier.cc] op.preamble.length <= op.nbytes. 8 vs 4"),
        dist.DistBackendError("NCCL error: invalid usage"),
        ValueError("Timed out waiting for gloo"),
        RunFailed("step 3: the loss is nan"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, peers.watched((HERE, THERE)):
        raise error
    assert raised.value is error


def test_a_host_answers_by_a_connection_or_by_its_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert HERE.answers()
    assert Peer("unknown", "").answers(), "what cannot be asked is not accused"

    def silent(*arguments: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    assert not THERE.answers()


def test_a_rank_is_known_by_the_address_that_it_writes_to_the_first_one_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert Peer.me() == Peer(socket.gethostname(), "127.0.0.1")
    monkeypatch.delenv("MASTER_ADDR")
    assert Peer.me().host == socket.gethostname()
