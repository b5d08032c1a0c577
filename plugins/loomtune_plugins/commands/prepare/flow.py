"""The phases of preparing, in their order. Each is a list of tasks; one whose `done.json` is there is over."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from loomtune.contracts import SplitStage
from loomtune.errors import Fault, UserError
from loomtune_plugins.commands.prepare import meeting, reading, writing
from loomtune_plugins.commands.prepare.counts import Counts
from loomtune_plugins.commands.prepare.deciding import SPLITS
from loomtune_plugins.commands.prepare.engines import Engine, Task
from loomtune_plugins.commands.prepare.job import Work
from loomtune_plugins.commands.prepare.manifest import told
from loomtune_plugins.commands.prepare.parts import STATS, Generation, read_json, write_json
from loomtune_plugins.commands.prepare.refining import DROPPED
from loomtune_plugins.commands.prepare.tasks import raise_for

DONE = "done.json"
READ = 7
"""Digits of the numbers of pieces, so that names of parts sort as they are read."""


class Progress(Protocol):
    """Who is told how far it is."""

    def __call__(self, phase: str, done: int, tasks: int) -> None:
        """So many tasks of a phase are done."""


class Flow:
    """One preparation, from wherever its folder stands."""

    def __init__(self, work: Work, engine: Engine, progress: Progress) -> None:
        self.work, self._engine, self._progress = work, engine, progress

    def run(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(output files with their places in the work folder, the manifest)."""
        self._read()
        links = {}
        for number, one in enumerate(self.work.passes):
            self._refine(number)
            if one.link:
                links[one.link] = self._link(number)
        self._refuse_empty(links)
        files = self._write()
        return files, self._told(files, links)

    def _read(self) -> None:
        data, folder = self.work.data, self.work.folder / "rows-0"
        splits = [split for split in SPLITS if split in data.splits()]
        pieces = [(split, piece) for split in splits for piece in data.pieces(split)]
        tasks = [{"do": "read", "split": split, "piece": dict(piece)} for split, piece in pieces]
        self._phase("read", "rows-0", tasks, lambda: {"parts": list(self._parts(folder, len(tasks)))})

    def _parts(self, folder: Path, pieces: int) -> Iterator[dict[str, Any]]:
        for number in range(pieces):
            yield from reading.parts(folder / f"{number:0{READ}d}")

    def _refine(self, number: int) -> None:
        before, one = self.work.folder / f"rows-{number}", self.work.passes[number]
        name = f"rows-{number + 1}"
        if not (self.work.folder / name / DONE).exists():
            generation = Generation.of(before)
            buckets = meeting.buckets(len(generation), meeting.EQUAL.itemsize)
            tasks = [
                {"do": "refine", "pass": number, "part": part, "buckets": buckets}
                for part in range(len(generation.parts))
            ]
            label = ", ".join(one.rows) or "drop"
            label = f"{label}; describe for {one.link}" if one.link else label
            self._phase(label, name, tasks, lambda: {"buckets": buckets, "parts": self._stats(name, len(tasks))})
        self._shrink(f"rows-{number}", *(f"{phase}-{number - 1}" for phase in ("equal", "pairs", "decide")))

    def _link(self, number: int) -> dict[str, Any]:
        """All that is found by the link that ends a pass, and what it decided."""
        name, rows = self.work.passes[number].link or "", f"rows-{number + 1}"
        if (done := self.work.folder / f"decide-{number}" / DONE).exists():
            found: dict[str, Any] = read_json(done)
            return found
        generation = Generation.of(self.work.folder / rows)
        if 0 < (limit := self.work.link(number).limit) < len(generation):
            what = f"stage={name} takes no more than {limit} rows, and there are {len(generation)}"
            raise UserError.of(what, f"let stages before it drop more, or raise stage.{name}.limit")
        count = read_json(self.work.folder / rows / DONE)["buckets"]
        tasks: list[Task] = [{"do": "equal", "pass": number, "bucket": bucket} for bucket in range(count)]
        equal = self._phase(
            f"{name}: equal", f"equal-{number}", tasks, lambda: self._sum(f"equal-{number}", len(tasks))
        )
        columns = self._columns(number, generation)
        cut, pairs = ({}, self._each(number, generation)) if columns is None else self._met(number, generation, columns)
        self._phase(f"{name}: alike", f"pairs-{number}", pairs, dict)
        asked = {"do": "decide", "pass": number, "pairs": f"pairs-{number}", "count": len(pairs)}

        def result() -> dict[str, Any]:
            decided = self._stats(f"decide-{number}", 1)[0]
            return {**equal, **({"cut": cut} if cut.get("keys") else {}), **_without(decided, "part")}

        decided = self._phase(f"{name}: decide", f"decide-{number}", [asked], result)
        self._shrink(f"keys-{number}", f"meet-{number}")
        return decided

    def _columns(self, number: int, generation: Generation) -> int | None:
        """How many keys a row has for a link; None where it has none to give."""
        link = self.work.link(number)
        first = next((part for part in range(len(generation.parts)) if generation.parts[part]["rows"]), None)
        if first is None:
            return 1
        keys = link.keys(generation.described(first)[:1])
        return None if keys is None else keys.shape[1]

    def _met(self, number: int, generation: Generation, columns: int) -> tuple[dict[str, Any], list[Task]]:
        count = meeting.buckets(len(generation) * columns, meeting.MET.itemsize)
        parts, name = range(len(generation.parts)), self.work.passes[number].link
        keys: list[Task] = [{"do": "keys", "pass": number, "part": part, "buckets": count} for part in parts]
        self._phase(f"{name}: keys", f"keys-{number}", keys, dict)
        meet: list[Task] = [{"do": "meet", "pass": number, "bucket": bucket} for bucket in range(count)]
        cut = self._phase(f"{name}: meet", f"meet-{number}", meet, lambda: self._sum(f"meet-{number}", len(meet)))
        return cut, [{"do": "compare", "pass": number, "part": part} for part in parts]

    def _each(self, number: int, generation: Generation) -> list[Task]:
        blocks = [
            (part, begin, min(begin + meeting.ROWS, rows))
            for part in range(len(generation.parts))
            for rows in [generation.parts[part]["rows"]]
            for begin in range(0, rows, meeting.ROWS)
        ]
        return [{"do": "each", "pass": number, "part": part, "rows": [begin, end]} for part, begin, end in blocks]

    def _refuse_empty(self, links: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises UserError where a split that was asked for, or everything, is empty."""
        rows = self._rows()
        if not sum(rows.values()):
            raise UserError.of("no row is left", "see which stage dropped them: leave it out, or mend its settings")
        for name, found in links.items():
            if isinstance(self.work.stages[name], SplitStage):
                empty = [split for split in found["names"] if not rows.get(split)]
                whole = f"all {sum(rows.values())} rows, in groups of up to {found['largest']} that hang together"
                faults = [
                    Fault(
                        f"stage={name}: {split} would have none of {whole}",
                        f"give more rows or another seed, or set its share to 0 (`loomtune plugins stage={name}`)",
                    )
                    for split in empty
                ]
                if faults:
                    raise UserError(*faults)

    def _rows(self) -> dict[str, int]:
        parts = read_json(self._last / DONE)["parts"]
        return {split: sum(part["files"][f"rows-{split}"][0] for part in parts) for split in SPLITS}

    @property
    def _last(self) -> Path:
        return self.work.folder / f"rows-{len(self.work.passes)}"

    def _write(self) -> list[dict[str, Any]]:
        generation = Generation.of(self._last)
        tasks: list[Task] = []
        for split in reversed(SPLITS):
            for number, parts in enumerate(writing.files(generation, split)):
                name = f"{split}-{number:05d}.jsonl"
                tasks.append(
                    {"do": "write", "from": self._last.name, "split": split, "parts": list(parts), "name": name}
                )
        if self.work.job.keep_dropped:
            passes = [f"rows-{number}" for number in range(len(self.work.passes) + 1)]
            tasks.append({"do": "dropped", "from": passes, "name": "dropped.ndjson"})
        written = self._phase("write", "files", tasks, lambda: {"files": self._stats("files", len(tasks))})
        return [{**file, "place": f"files/{file['part']}"} for file in written["files"]]

    def _told(self, files: Sequence[Mapping[str, Any]], links: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        phases = [read_json(self.work.folder / f"rows-{n}" / DONE) for n in range(len(self.work.passes) + 1)]
        counts = Counts.total(part["counts"] for phase in phases for part in phase["parts"])
        records = sum(part["records"] for part in phases[0]["parts"])
        return told(self.work, records, counts, links, files)

    def _phase(
        self, label: str, name: str, tasks: Sequence[Task], result: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Carries out what is not done yet; the result is what is left of a phase when its files are gone."""
        folder = self.work.folder / name
        if not (folder / DONE).exists():
            folder.mkdir(exist_ok=True)
            for draft in folder.glob(".*"):
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
            width = READ if name == "rows-0" else 1
            asked = [
                {**task, "folder": str(self.work.folder), "place": f"{name}/{number:0{width}d}"}
                for number, task in enumerate(tasks)
            ]
            self._carry_out(label, asked)
            write_json(folder / DONE, result())
        done: dict[str, Any] = read_json(folder / DONE)
        return done

    def _carry_out(self, label: str, tasks: Sequence[Task]) -> None:
        left = [task for task in tasks if not (self.work.folder / task["place"]).is_dir()]
        done = len(tasks) - len(left)
        self._progress(label, done, len(tasks))
        for answer in self._engine.carry_out(left) if left else ():
            raise_for(answer)
            done += 1
            self._progress(label, done, len(tasks))

    def _stats(self, name: str, count: int) -> list[dict[str, Any]]:
        folder = self.work.folder / name
        return [{"part": str(number), **read_json(folder / str(number) / STATS)} for number in range(count)]

    def _sum(self, name: str, count: int) -> dict[str, int]:
        total = dict[str, int]()
        for stats in self._stats(name, count):
            for key, value in _without(stats, "part").items():
                total[key] = total.get(key, 0) + value
        return total

    def _shrink(self, *names: str) -> None:
        """Takes away the files of phases that nothing reads any more; what was dropped is asked for at the end."""
        for name in names:
            for path in (self.work.folder / name).glob("*/*"):
                if path.name != DROPPED:
                    path.unlink()


def _without(told: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name != key}
