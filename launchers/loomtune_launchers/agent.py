"""What a node runs in torchrun's place, with torchrun's own arguments, and torch's own agent within.

`python -m loomtune_launchers.agent RUN ATTEMPT torchrun-arguments...`: it keeps what ranks say, tells which of them
failed first and why, watches that they make progress, and leaves no process behind. ATTEMPT `auto` is named by time.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, SignalException, SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, parse_args

from loomtune.errors import Preempted, UserError
from loomtune.signals import TOGETHER
from loomtune_launchers.watching import failures, orphans, ranklogs, shadow, watchdog
from loomtune_launchers.watching.pipes import Pipes

FINAL = (Preempted.exit_code, UserError.exit_code)
"""What is not tried again: the run was asked to leave, or has a fault that it would meet again."""


class Group(LogsSpecs):
    """The ranks of this node that run together; a restart is another one. Torch asks it where they write to."""

    def __init__(self, run: Path, folder: Path, mark: str) -> None:
        super().__init__()
        self.run, self._folder, self._mark = run, folder, mark
        self.attempt = run
        self.nodes = 1
        self.began = 0.0
        self.pids: dict[int, int] = {}
        self._ends: dict[int, float] = {}
        self._local: list[int] = []
        self._count = 0
        self._ended_all = False
        self._pipes: Pipes | None = None
        self._watchdog: watchdog.Watchdog | None = None

    @property
    def root_log_dir(self) -> str:
        return str(self.run / "logs")

    @property
    def leads(self) -> bool:
        """Whether rank 0 is here."""
        return 0 in self._local

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Called just before ranks are started; their environment may still be added to."""
        self._local = [int(envs[local]["RANK"]) for local in sorted(envs)]
        self._count += 1
        self.began, self.pids, self._ends, self._ended_all = time.time(), {}, {}, False
        if self.leads:  # what an earlier attempt said of itself is not how the run ended
            (self.run / "result.json").unlink(missing_ok=True)
        here = self._here
        here.mkdir()
        self._pipes = Pipes(here)
        destination = LogsDest()
        for local, rank in enumerate(self._local):
            folder = self.attempt / str(rank)
            out, err = self._pipes.rank(rank, folder / ranklogs.FILE, echo=rank == 0)
            destination.stdouts[local], destination.stderrs[local] = out, err
            destination.error_files[local] = str(folder / failures.FILE)
            envs[local] |= self._told(folder)
        self._pipes.start()
        return destination

    def _told(self, folder: Path) -> dict[str, str]:
        recorder = watchdog.flight_recorder(self._here)
        return {
            "TORCHELASTIC_ERROR_FILE": str(folder / failures.FILE),
            orphans.PARENT: str(os.getpid()),
            shadow.VARIABLE: self._mark,
            watchdog.HEARTBEATS: str(self._here),
            **{name: value for name, value in recorder.items() if name not in os.environ},
        }

    @property
    def _here(self) -> Path:
        return self._folder / str(self._count)

    def started(self, pids: dict[int, int]) -> None:
        """Called when ranks have been started. pids: by local rank."""
        assert self._pipes is not None
        for local, rank in enumerate(self._local):
            self.pids[rank] = pids[local]
            self._pipes.watch(pids[local], partial(self._ends.setdefault, rank))
        ranks = [watchdog.Rank(rank, pid, self.attempt / str(rank), self._here) for rank, pid in self.pids.items()]
        self._watchdog = watchdog.Watchdog(ranks, self._stalled)

    def _stalled(self, behind: watchdog.Found, idle: float) -> None:
        rank, why = behind.rank, behind.reason or "it waits for others"
        stacks = self.attempt / "*" / watchdog.STACKS
        self._ended_all = True
        said = f"no step for {idle:.0f} s after step {behind.step}: {why}; the stacks of all are in {stacks}"
        failures.write(rank.folder, said, time.time(), waited=not behind.reason)

    def failed(self, codes: dict[int, int]) -> failures.Failure | None:
        """The first failure that is known. codes: exit codes by rank of those that failed."""
        ended = {rank: self._ends.get(rank, time.time()) for rank in codes}
        for rank, code in codes.items():
            ours = -code in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL) and ended[rank] > min(ended.values())
            if not (ours or self._ended_all or code == Preempted.exit_code):
                failures.write(self.attempt / str(rank), failures.how(code), ended[rank])
        failures.settle(self.nodes)
        return failures.first(self.attempt)

    def asked(self, number: int, frame: object) -> None:
        """Hands a request to leave on; a rank that hears it twice, from a scheduler as well, minds it once."""
        if not self.pids:
            raise SignalException(f"signal {number}", signal.Signals(number))
        for pid in self.pids.values():
            with suppress(OSError):
                os.kill(pid, number)

    def close(self) -> None:
        """Called when all ranks have ended. Whatever they left behind ends, and what they said is written."""
        if self._watchdog is not None:
            self._watchdog.close()
        shadow.end_marked(self._mark)
        if self._pipes is not None:
            self._pipes.finish()
        shutil.rmtree(self._here, ignore_errors=True)
        self._pipes = self._watchdog = None


class NodeAgent(LocalElasticAgent):
    """Torch's agent, which tells the group of ranks what happens, and does not restart what left on purpose."""

    def __init__(self, spec: WorkerSpec, group: Group, attempt: str, grace: int) -> None:
        super().__init__(spec, group, shutdown_timeout=grace)
        self._group, self._grace = group, grace
        self._attempt = ranklogs.named_by_time() if attempt == "auto" else attempt
        self.preempted, self._leaving = False, 0.0

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._group.nodes = worker_group.group_world_size or 1
        self._group.attempt = self._agreed(worker_group)
        self._leaving = 0.0
        pids: dict[int, Any] = super()._start_workers(worker_group)
        self._group.started(pids)
        return pids

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._stop_workers(worker_group)
        self._group.close()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Asks the ranks by SIGUSR1, which may come twice: a scheduler sends SIGTERM to ranks and agents alike, and a
        second SIGTERM, or one to us while they leave, is an order to leave at once."""
        began = time.monotonic()
        try:
            super()._shutdown(signal.SIGUSR1 if death_sig == signal.SIGTERM else death_sig, timeout)
        except SignalException:
            if time.monotonic() - began > TOGETHER:
                super()._shutdown(signal.SIGKILL)
            raise

    def _agreed(self, worker_group: WorkerGroup) -> Path:
        """The folder of this attempt: the first name that is free, chosen on the first node for all of them."""
        store: Any = worker_group.store
        first: Any = worker_group.group_rank == 0
        if first:
            folder = ranklogs.begin(self._group.run, self._attempt)
            store.set("loomtune/attempt", folder.name)
            return folder
        return self._group.run / "logs" / str(store.get("loomtune/attempt").decode())

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if (left := self._left_as_asked()) is not None:
            everyone = dict.fromkeys(worker.global_rank for worker in worker_group.workers)
            return RunResult(left, return_values=everyone)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
            if set(codes.values()) & set(FINAL):
                self._remaining_restarts = 0
            elif self._remaining_restarts:
                self._say_again(codes, worker_group.spec.max_restarts)
        return result

    def _left_as_asked(self) -> WorkerState | None:
        """Whether ranks have left as they were asked. Torch would take the first for a failure, end rank 0 while it
        writes, and start all of them again."""
        assert isinstance(self._pcontext, SubprocessContext)
        codes = {handler.proc.poll() for handler in self._pcontext.subprocess_handlers.values()}
        if Preempted.exit_code not in codes or codes - {Preempted.exit_code, 0, None}:
            return None
        if None not in codes:
            self.preempted = True
            return WorkerState.SUCCEEDED  # so that it waits for the other nodes
        self._leaving = self._leaving or time.monotonic()
        return WorkerState.HEALTHY if time.monotonic() - self._leaving < self._grace else None

    def _say_again(self, codes: dict[int, int], restarts: int) -> None:
        cause = self._group.failed(codes)
        number = restarts - self._remaining_restarts + 1
        _say(f"{cause.short if cause else 'a rank failed'}; from the last checkpoint again, {number} of {restarts}")


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun to its end; gives the exit code of the rank that failed first."""
    run, attempt, *rest = arguments
    folder = Path(tempfile.mkdtemp(prefix="loomtune-"))
    watcher = orphans.Shadow(folder)
    orphans.adopt()
    group = Group(Path(run).absolute(), folder, watcher.mark)
    signal.signal(signal.SIGUSR1, group.asked)
    try:
        return _node(group, attempt, rest)
    except SignalException:
        orphans.end_descendants(spared=(watcher.pid,))
        return _left(group)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        orphans.end_descendants(spared=(watcher.pid,))
        group.close()
        watcher.dismiss()
        shutil.rmtree(folder, ignore_errors=True)  # where somebody has ended the watcher


def _node(group: Group, attempt: str, arguments: list[str]) -> int:
    words: Any = parse_args(["--log-dir", os.devnull, *arguments])  # type: ignore[no-untyped-call]
    if words.standalone:
        words.rdzv_backend, words.rdzv_endpoint, words.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    words.master_port = words.master_port or 29500
    config, entrypoint, command = config_from_args(words)
    agent = _agent(config, entrypoint, command, group, attempt)
    try:
        result = agent.run()
    except SignalException:
        raise  # the rendezvous stays open: a scheduler may start this node again
    except RendezvousError as error:
        _say(f"the nodes did not meet: {type(error).__name__}: {error}")
        result = None
    if result is None:  # not met, or met by others without this node
        return _ended(group, {})
    agent._rdzv_handler.shutdown()
    if agent.preempted:
        return Preempted.exit_code
    failed = {rank: failure.exitcode for rank, failure in result.failures.items()}
    return _ended(group, failed) if failed else 0


def _agent(config: LaunchConfig, entrypoint: Any, command: list[str], group: Group, attempt: str) -> NodeAgent:
    met = RendezvousParameters(
        config.rdzv_backend,
        config.rdzv_endpoint,
        config.run_id,
        config.min_nodes,
        config.max_nodes,
        config.local_addr,
        **config.rdzv_configs,
    )
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=tuple(word.replace("$", "$$") for word in command),  # torch takes `$$` and `${local_rank}` for its own
        rdzv_handler=get_rendezvous_handler(met),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
        numa_options=config.numa_options,
    )
    grace = 30 if config.shutdown_timeout is None else config.shutdown_timeout
    return NodeAgent(spec, group, attempt, grace)


def _ended(group: Group, failed: dict[int, int]) -> int:
    """Says what failed, and gives the exit code. failed: exit codes by rank."""
    cause = group.failed(failed)
    group.close()
    if cause is None:  # on a full disk none is left
        for rank, code in failed.items():
            _say(f"rank {rank} {failures.how(code)}")
        return max([1, *failed.values()])
    _say(cause.told(heard=cause.rank == 0 and group.leads))
    if group.leads:
        failures.conclude(group.run, cause, group.began, group.pids.values())
    return max(1, failed.get(cause.rank, 1))


def _left(group: Group) -> int:
    """The exit code after a request to leave. Ranks that could not save in time, or had not begun, are to go on too."""
    if group.leads and not failures.status(group.run):
        failures.conclude(group.run, None, group.began, group.pids.values())
    return {"failed": 1, "completed": 0, "stopped": 0}.get(failures.status(group.run), Preempted.exit_code)


def _say(text: str) -> None:
    print(text if text.startswith("loomtune: ") else f"loomtune: {text}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
