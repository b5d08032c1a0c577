"""Training rows that are tokenised while the run goes on: a window of them at a time, ahead of the steps.

A process beside rank 0 makes windows of `Data.window` rows, in the order of the data, each in a folder such as the
samples of a split lie in. No window reaches over the end of the data, behind which the first one, the head, follows
again: it is made before the run, and kept. Within a window the rows are permuted. So what is drawn is a function of
(seed, window, index), and a checkpoint keeps the place in the data at which its window begins.
"""

from __future__ import annotations

import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loomtune.beside import Beside
from loomtune.contracts import Drawn, Evaluator, Objective, Sample
from loomtune.errors import Fault, Preempted, UserError
from loomtune.order import permutation
from loomtune.samples import Samples, Source, open_samples
from loomtune.samples.cache import check_tokens
from loomtune.samples.crew import Crew
from loomtune.samples.making import Rows, fill
from loomtune.samples.stored import writable
from loomtune.settings import Settings, from_environment

if TYPE_CHECKING:
    from loomtune.run import Run

AHEAD = 2
"""How many windows are made before they are needed."""

PULSE = 2.0
"""Seconds after which ranks that wait hear from rank 0."""

CREW = 2
"""How many processes tokenise beside a run, unless the environment says: training comes first."""

WORK = 0.01
"""Seconds of CPU time by which a process that seeks or reads slowly is told from one that hangs."""

TIMEOUT = "LOOMTUNE_TIMEOUT_MINUTES"

FOLDER = "stream"
"""Where a run keeps its windows."""


@dataclass(frozen=True, slots=True)
class Window:
    """Number among all of the run; number of its first row; where it begins, as `Data.stream` has it, or None."""

    number: int = 0
    first: int = 0
    place: Any = None


class Stream:
    """Draws the rows of a run from windows, in their order, on every rank the same."""

    def __init__(self, run: Run, asked: Callable[[], bool]) -> None:
        """asked: whether some rank was asked to leave; called on all ranks, while they wait."""
        self.run, self._asked = run, asked
        self._folder, self._head = run.folder / FOLDER, run.splits["train"]
        self._beside: Beside | None = None
        self._heard, self._worked = 0.0, 0.0
        self._lost: Fault | None = None
        self.set({})

    def set(self, state: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint kept."""
        self.close()
        self.window = Window(**state.get("window", {}))
        self._samples: Samples | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"window": asdict(self.window)}

    def draw(self, begin: int, count: int) -> list[Drawn]:
        """The rows of these numbers; none may be smaller than the last that was drawn. Called on every rank.

        Raises UserError, on every rank, for rows that cannot be learned from and data that cannot be read, and
        Preempted where a rank was asked to leave while it waited; none of these rows is drawn then.
        """
        before = self.window
        try:
            return [self._drawn(number) for number in range(begin, begin + count)]
        except (Preempted, UserError):
            self.window = before
            raise

    def close(self) -> None:
        """Ends the process beside this one, and takes its windows away."""
        if self._beside is not None:
            self._beside.close()
            shutil.rmtree(self._folder, ignore_errors=True)
        self._beside = None

    def _drawn(self, number: int) -> Drawn:
        samples = self._opened() if self._samples is None else self._samples
        while (index := number - self.window.first) >= len(samples):
            after, before = samples.next, self.window
            self.window = Window(before.number + 1, before.first + len(samples), after)
            samples = self._opened()
        row = int(self._order[index])
        return Drawn(row, _copied(samples[row]), samples.row(row), number)

    def _opened(self) -> Samples:
        """The window's samples. Of the one before, which is taken away, every rank has drawn all that it needs."""
        run, former = self.run, self._samples
        if run.world.leads and self._beside is None and self._head.next is not None:
            self._begin()
        samples = self._samples = self._head if self.window.place is None else self._waited_for()
        self._order: NDArray[Any] = np.arange(len(samples))
        if run.settings.batch.sampler != "sequential":
            self._order = permutation(len(samples), run.settings.seed, "order", self.window.number)
        if run.world.leads and former is not None and former is not self._head:
            shutil.rmtree(former.folder, ignore_errors=True)
        return samples

    def _begin(self) -> None:
        """Starts the process that makes windows, the next that is needed first; the head is there."""
        run, window, after = self.run, self.window, self._head.next
        if window.place is None:
            window = replace(window, number=window.number + 1, place=after)
        source = Source(run.data, run.objective, run.tokenizer, "train", run.max_length, run.data.window)
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._beside, self._lost = Beside("loomtune.streaming:produce"), None
            work = source, run.model.vocabulary(), self._folder, window.number, window.place, after
            for told in (work, *["one more"] * AHEAD):
                self._beside.pipe.send(told)
        except Exception as error:  # what cannot be pickled raises whatever it likes; all ranks hear of it later
            self._lost = unsent(error)

    def _waited_for(self) -> Samples:
        """The window's samples, once they are made: no rank waits in one collective for longer than a pulse."""
        run, said = self.run, dict[str, Any]()
        self._heard = time.monotonic()
        while not said:
            for guard in run.guards:
                guard.waits()
            if self._asked():
                raise Preempted("asked to leave while rows were tokenised; what was learned is kept")
            said = run.world.broadcast(self._said() if run.world.leads else None)
        if faults := said.get("faults"):
            raise UserError(*(Fault(*fault) for fault in faults))
        for told in said["told"]:
            run.tell_once(told)
        samples = None
        with suppress(UserError):
            samples = open_samples(self._folder, str(self.window.number))
        if run.world.total([float(samples is None)])[0] or samples is None:
            what = f"not every rank sees {self._folder}, where rank 0 has rows tokenised"
            raise UserError.of(what, "every rank must see the folder that run.dir names")
        return samples

    def _said(self) -> dict[str, Any]:
        """What comes of the window; nothing while it is made."""
        try:
            if self._beside is not None and not self._lost and self._beside.pipe.poll(PULSE):
                said = self._beside.pipe.recv()
                with suppress(OSError):  # a later window may have ended it, which is told when that is needed
                    self._beside.pipe.send("one more")
                return dict(said)
            if self._beside is not None and (worked := self._beside.worked()) > self._worked + WORK:
                self._heard, self._worked = time.monotonic(), worked
        except (EOFError, OSError):
            cure = "the log may say why; where memory was short, set a smaller data.window in a new run; start it again"
            self._lost = Fault("the process that tokenises rows ahead has ended", f"{cure}, to go on where it was")
        if time.monotonic() - self._heard > patience():
            cure = f"see that the data can be reached, and start the run again; {TIMEOUT} says how long it waits"
            self._lost = Fault(f"no row was read for {patience():.0f} s", cure)
        return {"faults": [(self._lost.what, self._lost.cure)]} if self._lost else {}


def patience() -> float:
    """Seconds without any work on rows after which the data count as lost."""
    return from_environment(TIMEOUT, 10.0, least=0.01) * 60


def unsent(error: Exception) -> Fault:
    """Of what another process cannot be sent."""
    what = f"what makes samples cannot be sent to another process: {error!r}"
    return Fault(what, "set data.stream=false, or have the plugins of data, objective and model hold what pickle takes")


def check_sent(source: Source) -> None:
    """Raises UserError for rows that stream and could not be tokenised beside a run."""
    try:
        pickle.dumps(source if source.window else None)
    except Exception as error:
        raise UserError(unsent(error)) from error


def faults(settings: Settings, objective: Objective, evaluators: Mapping[str, Evaluator]) -> Iterator[Fault]:
    """What is asked of a run that only the whole split could give, without torch."""
    patience()
    if not settings.steps:
        yield Fault("training rows stream, so how long an epoch is is not known", "set steps=")
    if settings.batch.sampler == "packed":
        yield Fault("batch.sampler=packed packs a whole split, but training rows stream", "set batch.sampler=shuffled")
    for record in objective.records().values():
        if record.always:
            what = f"what the {record.role} says of every row is to be stored before training, but training rows stream"
            yield Fault(what, "have the objective read it live, in each step, or set data.stream=false")
    splits = ("train", "validation", "test")
    for name, evaluator in evaluators.items():
        if "train" in (read := evaluator.reads(splits)) and set(read) != set(splits):
            what = f"evaluator={name} measures on train, whose rows stream and are never there together"
            yield Fault(what, f"set evaluator.{name}.split to another split, or data.stream=false")


def _copied(sample: Sample) -> Sample:
    """The sample without the files that it was read from."""
    each = (replace(one, tokens=np.array(one.tokens), is_target=np.array(one.is_target)) for one in sample.segments)
    return replace(sample, segments=tuple(each))


def produce(pipe: Connection) -> None:
    """What the process beside rank 0 does: windows, as many as it is let. Training comes first."""
    os.nice(5)
    try:
        _produce(pipe, *pipe.recv())
    except UserError as error:
        pipe.send({"faults": [(fault.what, fault.cure) for fault in error.faults]})
    except Exception as error:
        with suppress(OSError):
            pipe.send({"faults": [(f"rows cannot be tokenised ahead: {error!r}", "the log has the place")]})
        raise


def _produce(
    pipe: Connection, source: Source, vocabulary: int, folder: Path, number: int, place: Any, after: Any
) -> None:
    """after: the place behind the head, which is not made again."""
    making, rows = folder / "unfinished", None
    with closing(Crew(source.encoder, CREW)) as crew:
        while True:
            pipe.recv()
            if place is None:
                number, place, rows = number + 1, after, None
            rows = rows or Rows(source, place)
            with writable(folder):
                making.mkdir(parents=True)
            fill(making, source, rows, crew.parts)
            samples = Samples(making)
            check_tokens(samples, vocabulary)
            with writable(folder):
                making.rename(folder / str(number))
            pipe.send({"told": [told for told in (samples.told, *samples.left_out[:1]) if told]})
            number, place = number + 1, rows.next
