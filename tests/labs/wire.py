"""Bytes that a step of training puts on the wire between two nodes, counted by the kernel, beside what is planned.

`python tests/labs/wire.py --write docs/wire.md`, as root, makes the table anew. What a run sends at its start and end
is left out: a node's counters are read where two of its steps begin.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parents[1])]  # as pytest does it

from labs.netns import Nodes, nodes, wait_for  # noqa: E402
from loomtune import api, loop  # noqa: E402
from loomtune.plan import Plan  # noqa: E402
from loomtune.worker import execute  # noqa: E402
from loomtune_plugins.planner.trace import Collective, Trace  # noqa: E402
from loomtune_plugins.planner.wire import traffic  # noqa: E402
from runs.driver import serve  # noqa: E402
from runs.worlds import SERVER, World  # noqa: E402
from support import SHAPE, byte_tokenizer, write_rows  # noqa: E402

PREFIX, NET, PORT = "labw", "10.91.0", "29517"
STEPS = (3, 9)
"""At whose beginnings it is read: the first steps have what happens once."""

NETWORK = 0x40000000
"""`CLONE_NEWNET` of <sched.h>."""

HEADERS = {"eth0": 66, "lo": 52}
"""Bytes of a packet that are not its own: 20 of IPv4, 20 of TCP and 12 of its time stamps, and 14 of Ethernet."""

SEGMENT = 1448
"""Bytes of payload that a packet of `eth0` carries at most: 1500 without the first three."""

PATIENT = {"tcp_early_retrans": 0, "tcp_recovery": 0, "tcp_reordering": 250, "tcp_rto_min_us": 2_000_000}
"""Of the nodes' kernels: nothing is sent a second time because a process was slow, or packets came in another order."""

CONTROL = (8, 32, 24)
"""Bytes that the loop sums over all ranks in a step, which no rehearsal sees: the loss's weight, what is logged, and
whether anybody was asked to stop, has written a checkpoint or lost its lease."""

ROW = len("what is 20?"), len("it is 27") + 1
"""Tokens of each row's prompt and answer, the end with it: a byte is a token."""

LAYOUTS: Mapping[str, tuple[int, list[str]]] = {
    "ddp, 2 x 1": (1, ["sharding=ddp"]),
    "fsdp, 2 x 1": (1, ["sharding=fsdp"]),
    "zero 3, 2 x 1": (1, ["sharding=zero", "sharding.stage=3"]),
    "ddp, 2 x 2": (2, ["sharding=ddp"]),
    "fsdp, 2 x 2": (2, ["sharding=fsdp"]),
    "hsdp, 2 x 2": (2, ["sharding=fsdp", "sharding.replicate=2"]),
    "zero 3, 2 x 2": (2, ["sharding=zero", "sharding.stage=3"]),
    "zero 3, 2 x 2, nothing kept whole": (2, ["sharding=zero", "sharding.stage=3", "sharding.persist=0"]),
    "zero 2, 2 x 2": (2, ["sharding=zero", "sharding.stage=2"]),
    "zero 1, 2 x 2": (2, ["sharding=zero", "sharding.stage=1"]),
    "fsdp, 2 x 2, 2 micro-batches": (2, ["sharding=fsdp", "batch.micro=1"]),
    "fsdp, 2 x 2, recomputed": (2, ["sharding=fsdp", "sharding.activation_checkpointing=true"]),
    "fsdp, 2 x 2, bf16": (2, ["sharding=fsdp", "precision=bf16"]),
    "fsdp, 2 x 2, tensor=2": (2, ["sharding=fsdp", "sharding.tensor=2"]),
    "fsdp, 2 x 2, LoRA": (2, ["sharding=fsdp", "adapter=lora"]),
}
"""Each with its processes on either node."""


@dataclass(frozen=True)
class Counted:
    """What an interface has sent. again: segments that its kernel's TCP has sent a second time."""

    bytes: int
    packets: int
    again: int = 0

    def __sub__(self, before: Counted) -> Counted:
        return Counted(self.bytes - before.bytes, self.packets - before.packets, self.again - before.again)

    def payload(self, headers: int) -> int:
        """Without headers, each byte once."""
        return self.bytes - headers * self.packets - SEGMENT * self.again


@dataclass(frozen=True)
class Step:
    """Bytes that each node sends in a step: to itself and to the other one, without TCP's and IP's headers."""

    inside: tuple[float, ...]
    between: tuple[float, ...]


def counted(lab: Nodes, i: int, interface: str = "eth0") -> Counted:
    """What a node has sent until now, to others or (`lo`) to itself."""
    said = subprocess.run(
        ["ip", "-n", lab.host(i), "-s", "-j", "link", "show", interface], capture_output=True, text=True, check=True
    )
    sent = json.loads(said.stdout)[0]["stats64"]["tx"]
    return Counted(sent["bytes"], sent["packets"])


def calm(lab: Nodes) -> None:
    """Makes the nodes' kernels wait for what is late."""
    for i in range(lab.count):
        for name, value in PATIENT.items():
            lab.call(i, ["sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{name}"])


def headers(lab: Nodes, size: int = 64 << 20) -> float:
    """Bytes of a packet beside its payload: of a plain stream of known size from node 0 to node 1."""
    receive = "import socket; s = socket.create_server(('', 29518)); c = s.accept()[0]\nwhile c.recv(1 << 20): pass"
    send = f"import socket; s = socket.create_connection(('{lab.host(1)}', 29518)); s.sendall(bytes({size})); s.close()"
    before, receiver = counted(lab, 0), lab.run(1, [sys.executable, "-c", receive])
    lab.call(1, ["sh", "-c", "until grep -q ':734E ' /proc/net/tcp; do sleep 0.1; done"])
    lab.call(0, [sys.executable, "-c", send])
    assert wait_for(receiver) == [0]
    sent = counted(lab, 0) - before
    return (sent.bytes - size) / sent.packets


def model_and_rows(folder: Path) -> list[str]:
    """Settings of a run of a Llama of 3 million parameters, each step of which sends the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(7)
        shape = SHAPE | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "model")
    byte_tokenizer(folder / "model")
    rows = [{"prompt": f"what is {i}?", "completion": f"it is {i + 7}"} for i in range(20, 84)]
    data = write_rows(folder / "rows.jsonl", rows)
    return [
        *(f"model.path={folder / 'model'}", "data=jsonl", f"data.path={data}", "tracker=[jsonl]", "optimizer.lr=1e-3"),
        "batch.size=8",
    ]


class Apart(World):
    """Processes of one group, as many on each of two nodes."""

    lab: Nodes

    def start(self) -> None:
        procs = self.size // self.lab.count
        for rank in range(self.size):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % procs),
                "WORLD_SIZE": str(self.size),
                "DS_ACCELERATOR": "cpu",
            }
            place |= {"MASTER_ADDR": self.lab.address(0), "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": "eth0"}
            here, there = SERVER.Pipe()
            command = (there, place, self.log, self.lab.host(rank // procs))
            process = SERVER.Process(target=serve_on, args=command, daemon=True)
            process.start()
            there.close()
            self.ranks.append((process, here))


def apart(lab: Nodes, procs: int, folder: Path) -> Apart:
    """A world over two nodes."""
    made = Apart(lab.count * procs, folder / f"world-{procs}.log")
    made.lab = lab
    return made


def serve_on(jobs: Connection, place: dict[str, str], log: Path, host: str) -> None:
    """A rank in a node's network, by `setns(2)`, which Python 3.11 does not offer."""
    with Path("/run/netns", host).open() as node:
        assert ctypes.CDLL(None, use_errno=True).setns(node.fileno(), NETWORK) == 0, os.strerror(ctypes.get_errno())
    serve(jobs, place, log)


def measured(world: Apart, settings: Sequence[str], folder: Path) -> Step:
    """What both nodes send in a step of training."""
    plan = _composed([*settings, f"run.dir='{folder}'"], world.size)
    api.check(plan)
    ranks = world.run(api.prepare(plan), counting).result["counted"]
    procs, steps = world.size // world.lab.count, STEPS[1] - STEPS[0]
    waited = traffic(_barriers(world.size), procs, "gloo").framing
    nodes = ranks[::procs]
    seen = {
        name: [(Counted(*node[1][name]) - Counted(*node[0][name])).payload(around) for node in nodes]
        for name, around in HEADERS.items()
    }
    return Step(
        tuple((one - wait.inside) / steps for one, wait in zip(seen["lo"], waited, strict=True)),
        tuple((one - wait.between) / steps for one, wait in zip(seen["eth0"], waited, strict=True)),
    )


def _composed(settings: Sequence[str], processes: int) -> Plan:
    """Each step sends the same: as many micro-batches in all of them."""
    micro = [] if any(one.startswith("batch.micro=") for one in settings) else ["batch.micro=4"]
    return api.compose([*settings, *micro, f"steps={STEPS[1]}"], processes=processes)


def counting(folder: Path, world: Any) -> dict[str, Any]:
    """Runs a plan on this rank, and reads its node's counters where steps begin. All ranks give what all have read."""
    seen = []
    step = loop.Loop._step

    def counted_step(self: loop.Loop, began: float) -> Any:
        if self.run.step + 1 in STEPS:
            seen.append(_quietly(world))
        return step(self, began)

    with patch.object(loop.Loop, "_step", counted_step):
        result = execute(Plan.load(folder), folder, world)
    return {"metrics": {}, "status": result["status"], "counted": world.gather(seen)}


def _quietly(world: Any) -> dict[str, tuple[int, ...]]:
    """(bytes, packets, again) that each interface of this process' node has sent, while nobody sends."""
    world.barrier()
    time.sleep(0.3)
    lines = [line.partition(":") for line in Path("/proc/net/dev").read_text().splitlines()]
    fields = {name.strip(): rest.split() for name, _, rest in lines}
    names, numbers = (line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line[:4] == "Tcp:")
    world.barrier()
    again = int(numbers[names.index("RetransSegs")])
    sent = {name: (int(fields[name][8]), int(fields[name][9])) for name in ("eth0", "lo")}
    return {"eth0": (*sent["eth0"], again), "lo": sent["lo"]}


def _barriers(size: int) -> Trace:
    """What is waited for between two readings."""
    barrier = Collective("barrier", 0, tuple(range(size)), "data", "fp32", 2)
    return Trace(0, size, 1, {}, {}, {}, (barrier,), (), 0, 0, 1, (0, 0, 0))


def planned(settings: Sequence[str], procs: int) -> tuple[Step, Step]:
    """The same by rehearsal, in a process of its own: payload, and what gloo puts around it."""
    here, there = SERVER.Pipe()
    process = SERVER.Process(target=_plan, args=(there, list(settings), procs))
    process.start()
    there.close()
    try:
        payload, framing = here.recv()
    finally:
        process.join()
    return Step(*payload), Step(*framing)


def _plan(answer: Connection, settings: list[str], procs: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from loomtune_plugins.planner.rehearse import rehearse

    seen = rehearse(_composed(settings, 2 * procs), 2 * procs, rows=[ROW])
    own = [Collective("all_reduce", size, tuple(range(2 * procs)), "data", "fp64") for size in CONTROL]
    step = traffic(replace(seen, collectives=[*seen.collectives, *own]), procs, "gloo")
    of = [([one.inside for one in flows], [one.between for one in flows]) for flows in (step.nodes, step.framing)]
    answer.send(of)


HEAD = """| layout, nodes x processes | to the other node | counted | off by | within a node | counted | off by |
|---|---:|---:|---:|---:|---:|---:|
"""


def row(name: str, payload: Step, framing: Step, seen: Step) -> str:
    """A line of the table: the sum of both nodes."""
    cells = []
    for where in ("between", "inside"):
        plan = sum(getattr(payload, where)) + sum(getattr(framing, where))
        count = sum(getattr(seen, where))
        off = f"{(plan / count - 1) * 100:+.3f} %" if plan > 0 else "-"
        cells += [f"{plan:,.0f}", f"{count:,.0f}", off]
    return f"| {name} | {' | '.join(cells)} |\n"


def table(only: Sequence[str], page: Path | None) -> None:
    """Runs all layouts, or some. What was seen so far is on the page, in Markdown."""
    lines: list[str] = []
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    with tempfile.TemporaryDirectory(prefix="wire-") as temporary, nodes(2, PREFIX, NET) as lab:
        calm(lab)
        around, folder = headers(lab), Path(temporary)
        settings = model_and_rows(folder)
        for procs in (1, 2):
            world = apart(lab, procs, folder)
            for i, (name, (number, more)) in enumerate(LAYOUTS.items()):
                if number == procs and (not only or name in only):
                    seen = measured(world, [*settings, *more], folder / f"run{i}")
                    lines.append(row(name, *planned([*settings, *more], procs), seen))
                    print(lines[-1], end="", flush=True)
                    if page:
                        said = f"{datetime.now(UTC):%Y-%m-%d}: {versions}; {around:.2f} bytes of headers a packet."
                        write(page, f"{HEAD}{''.join(lines)}\n{said}\n")
            world.stop()


MARKS = "<!-- wire: begin -->", "<!-- wire: end -->"


def write(path: Path, made: str) -> None:
    """Puts the table between its marks."""
    before, _, rest = path.read_text().partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    assert mark, f"{path} has no {MARKS[0]} ... {MARKS[1]}"
    path.write_text(f"{before}{MARKS[0]}\n{made}{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the page whose table is made anew")
    parser.add_argument("--only", action="append", default=[], choices=LAYOUTS, help="a layout, instead of all")
    chosen = parser.parse_args()
    table(chosen.only, chosen.write)


if __name__ == "__main__":
    main()
