"""What a step sends between two nodes is what was planned for it, byte by byte of payload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labs.netns import Nodes, nodes
from labs.wire import HEADERS, LAYOUTS, NET, PREFIX, Apart, apart, calm, headers, measured, model_and_rows, planned

OFF = 2e-3
"""Of what is counted, at most; the promise is 2 %. What remains is what TCP sends twice on a busy machine."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Nodes]:
    with nodes(2, PREFIX, NET) as made:
        calm(made)
        yield made


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return model_and_rows(tmp_path_factory.mktemp("wire"))


@pytest.fixture(scope="module")
def world(lab: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Apart]]:
    made: dict[int, Apart] = {}

    def of(procs: int) -> Apart:
        if procs not in made:
            for other in made.values():
                other.stop()  # both would serve one port
            made.clear()
            made[procs] = apart(lab, procs, tmp_path_factory.mktemp("ranks"))
        return made[procs]

    yield of
    for one in made.values():
        one.stop()


def test_a_packet_s_headers_are_as_many_bytes_as_are_taken_off(lab: Nodes) -> None:
    assert headers(lab) == pytest.approx(HEADERS["eth0"], abs=0.5)


@pytest.mark.parametrize(
    "layout", ["ddp, 2 x 1", "fsdp, 2 x 1", "zero 3, 2 x 1", "fsdp, 2 x 2", "hsdp, 2 x 2", "zero 3, 2 x 2"]
)
def test_a_step_sends_what_is_planned(
    world: Callable[[int], Apart], settings: list[str], layout: str, tmp_path: Path
) -> None:
    procs, more = LAYOUTS[layout]
    payload, framing = planned([*settings, *more], procs)
    seen = measured(world(procs), [*settings, *more], tmp_path / "run")
    for where in ("between", "inside"):
        counted = sum(getattr(seen, where))
        assert sum(getattr(payload, where)) + sum(getattr(framing, where)) == pytest.approx(counted, rel=OFF)
        print(f"{layout}, {where}: {counted:,.0f} bytes")


def test_hsdp_s_nodes_exchange_gradients_alone(settings: list[str]) -> None:
    """A third of what FSDP sends: by reduce_scatter between nodes, gloo's all_reduce, and no parameters."""
    (fsdp, _), (hsdp, _) = (planned([*settings, *LAYOUTS[name][1]], 2) for name in ("fsdp, 2 x 2", "hsdp, 2 x 2"))

    assert sum(fsdp.between) / sum(hsdp.between) == pytest.approx(3, rel=0.02)
