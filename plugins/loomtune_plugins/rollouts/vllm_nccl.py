"""Weights from GPU to GPU, by the trainer's half of vLLM's weight transfer: docs/training/weight_transfer of vLLM 0.33.

vLLM must be installed beside loomtune for it: the trainer's half is a library, the servers' is reached by HTTP.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from loomtune.contracts import Engine
from loomtune.errors import UserError
from loomtune.world import World
from loomtune_plugins.rollouts.vllm_http import Refused, Server, Unanswered, hang_up
from loomtune_plugins.rollouts.vllm_meeting import Met
from loomtune_plugins.rollouts.vllm_pushing import PausedPush, Tensors, at_all, consumed

AHEAD = 4
"""Tensors that are gathered before the one that is under way has arrived."""

STUCK = 240.0
"""Seconds for one tensor: other ranks wait meanwhile in a collective, whose time is out after ten minutes."""

END = ("", None)


class Wire:
    """The four methods by which vLLM's trainer speaks with servers; here with several of them at once.

    failed: the first thing that went wrong. NCCL itself waits for ever for a server that said no.
    """

    def __init__(self, servers: Sequence[Server], sizes: Sequence[int]) -> None:
        self.servers, self._sizes = servers, sizes
        self.failed: BaseException | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each server's workers follow those of the one before."""
        firsts = accumulate(self._sizes, initial=init_info["rank_offset"])
        each = zip(self.servers, firsts, strict=False)  # the last one is where no server begins
        bodies = {server.url: {"init_info": {**init_info, "rank_offset": first}} for server, first in each}
        self._each("init_weight_transfer_engine", lambda server: bodies[server.url])

    def start_weight_update(self) -> None:
        """Servers make ready."""
        self._each("start_weight_update", lambda _: None)

    def update_weights(self, update_info: Any) -> None:
        """Servers receive; returns when they have."""
        self._each("update_weights", lambda _: {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Servers use what they received."""
        self._each("finish_weight_update", lambda _: {"weight_version": weight_version} if weight_version else None)

    def _each(self, path: str, body: Any) -> None:
        def ask(server: Server) -> None:
            try:
                server.ask("POST", f"/{path}", body(server), again=False)
            except BaseException as error:
                self.fail(error)
                raise

        at_all(self.servers, ask)

    def fail(self, error: BaseException) -> None:
        """Ends what is under way with all of them: where one is lost, the others would wait for ever."""
        self.failed = self.failed or error
        hang_up(self.servers)


class Daemon:
    """A thread that may hang for ever: nobody waits for it longer than he wants to."""

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._raised: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(work, device), daemon=True, name="vllm-nccl")
        self._thread.start()

    def _run(self, work: Callable[[], None], device: torch.device) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            work()
        except BaseException as error:
            self._raised.append(error)

    def check(self, wire: Wire | None) -> None:
        """Raises what a server said, for which the others were hung up on, or else what it raised."""
        for error in (wire.failed if wire else None, *self._raised):
            if error is not None:
                raise error

    def wait(self, seconds: float, wire: Wire | None) -> None:
        """Until it ended well. Raises what went wrong, Unanswered where it takes longer."""
        until = time.monotonic() + seconds
        while self._thread.is_alive():
            self.check(wire)
            if time.monotonic() > until:
                raise Unanswered(f"the servers did not join in what NCCL does within {seconds:g} seconds")
            self._thread.join(0.1)
        self.check(wire)


class NcclPush(PausedPush):
    """One broadcast for all servers, in a thread: what hangs in it must not hang the run.

    Ranks gather tensor by tensor; rank 0 hands each to the thread.
    """

    def __init__(self, met: Sequence[Met], world: World, patience: float) -> None:
        super().__init__(met)
        self.check_device(world.device)
        self._device, self._patience = world.device, patience
        self._meta: list[tuple[str, tuple[int, ...]]] = []
        self._tensors: queue.Queue[tuple[str, Tensor | None]] = queue.Queue(AHEAD)
        self._trainer: Any = None
        self._wire: Wire | None = None
        self._sender: Daemon | None = None

    def check_device(self, device: torch.device) -> None:
        """Raises UserError where NCCL does not reach."""
        if device.type != "cuda":
            what = "NCCL carries weights between GPUs, and this run trains on none"
            raise UserError.of(what, "set rollout.push=disk, and start the servers without --weight-transfer-config")

    def prepare(self, servers: Sequence[Server], version: str) -> None:
        """Servers pause, and the first time their workers join the trainer's group."""
        at_all(servers, lambda server: server.ask("POST", "/pause?mode=wait"))
        if self._wire is not None:
            self._wire.servers = servers
            return
        sizes = [int(size["world_size"]) for size in at_all(servers, lambda s: s.ask("GET", "/get_world_size"))]
        self._wire = Wire(servers, sizes)
        self._daemon(lambda: self._join_group(sizes)).wait(self._patience, self._wire)

    def stream(self, engine: Engine, world: World, version: str) -> BaseException | None:
        if not world.broadcast(bool(self._meta)):
            error = consumed(world, engine.stream_weights(), lambda tensors: self._note(engine, tensors))
            if error is not None:
                return error
        return consumed(world, engine.stream_weights(), lambda tensors: self._send(engine, tensors))

    def _note(self, engine: Engine, tensors: Tensors) -> None:
        self._meta = [(name, tuple(tensor.shape)) for name, tensor in self.typed(engine, tensors)]

    def _send(self, engine: Engine, tensors: Tensors) -> None:
        assert self._wire is not None, "a group is joined before weights stream"
        self._tensors = queue.Queue(AHEAD)
        self._sender = self._daemon(self._trainer.send_weights)
        for name, tensor in self.typed(engine, tensors):
            self._put((name, tensor.to(self._device).contiguous()))
        self._put(END)

    def _put(self, item: tuple[str, Tensor | None]) -> None:
        assert self._sender is not None
        until = time.monotonic() + min(self._patience, STUCK)
        while time.monotonic() < until:
            self._sender.check(self._wire)
            with suppress(queue.Full):
                self._tensors.put(item, timeout=0.2)
                return
        raise Unanswered("the servers take no more weights by NCCL")

    def _daemon(self, work: Callable[[], None]) -> Daemon:
        return Daemon(work, self._device)

    def _join_group(self, sizes: Sequence[int]) -> None:
        """Makes vLLM's trainer, of whose group the servers' workers are."""
        try:
            from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            cure = "pip install 'loomtune[vllm]', or set rollout.push=disk"
            raise UserError.of(f"rollout.push=nccl needs vLLM beside the training too: {error}", cure) from error
        assert self._wire is not None
        about = NCCLTrainerInitInfo(
            master_address=_seen_from(self._wire.servers[0]),
            master_port=_free_port(),
            world_size=1 + sum(sizes),
            rank=0,
        )
        self._trainer = WeightTransferTrainerFactory.trainer_init(
            init_info=about, client=self._wire, source=self._source()
        )

    def _source(self) -> Any:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

        push = self

        class Gathered(WeightSource):  # type: ignore[misc]
            """What ranks gather, as it comes."""

            def metadata(self) -> list[Any]:
                return [ParamMeta(name, push._dtype, shape) for name, shape in push._meta]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                while (item := push._tensors.get())[1] is not None:
                    yield item  # type: ignore[misc]

        return Gathered()

    def hand_over(self, servers: Sequence[Server], version: str) -> None:
        """Waits until what was sent has arrived."""
        assert self._sender is not None and self._wire is not None
        self._sender.wait(self._patience, self._wire)

    def close(self, servers: Sequence[Server]) -> None:
        if self._trainer is not None:
            for server in servers:
                with suppress(Refused, Unanswered):
                    server.ask("POST", "/shutdown_weight_transfer_engine", again=False, seconds=30)


def _seen_from(server: Server) -> str:
    """This machine's address on the way to a server; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((urlsplit(server.url).hostname, 9))
        return str(probe.getsockname()[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
