"""What is done after what: rows are read, pass through stages and links, and are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from loomtune.contracts import SplitStage
from loomtune.errors import Fault, RunFailed, UserError
from loomtune_plugins.commands.prepare import comparing, equality, meeting, reading, shuffling, writing
from loomtune_plugins.commands.prepare.counts import Counts
from loomtune_plugins.commands.prepare.deciding import SPLITS
from loomtune_plugins.commands.prepare.engines import Task
from loomtune_plugins.commands.prepare.job import Work
from loomtune_plugins.commands.prepare.manifest import accounted, told
from loomtune_plugins.commands.prepare.parts import Generation
from loomtune_plugins.commands.prepare.phases import Phases, without

Links = Mapping[str, Mapping[str, Any]]
"""Name of a link to what it found and decided."""


class Flow:
    """One preparation, from wherever its folder stands."""

    def __init__(self, work: Work, phases: Phases, lost: Callable[[Mapping[str, Any]], None] = lambda _: None) -> None:
        """lost: is told what became of the rows where that is why preparing ends."""
        self.work, self._phases, self._lost = work, phases, lost

    def run(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(output files with their places in the work folder, the manifest)."""
        self._read()
        links = dict[str, dict[str, Any]]()
        for number, one in enumerate(self.work.passes):
            self._refine(number, links)
            if one.link:
                links[one.link] = self._link(number)
        account = self._account(links)
        try:
            self._refuse_empty(links, {split: of["rows"] for split, of in account["splits"].items()})
        except UserError:
            self._lost(account)
            raise
        files = self._write()
        if self.work.data.fingerprint() != self.work.job.fingerprint:
            raise RunFailed("the inputs were changed while they were read: start the same command again")
        return files, told(self.work, account, files)

    def _read(self) -> None:
        data = self.work.data
        splits = [split for split in SPLITS if split in data.splits()]
        pieces = [(split, piece) for split in splits for piece in data.pieces(split)]
        tasks = [{"do": "read", "split": split, "piece": dict(piece)} for split, piece in pieces]
        self._phases.run("read", "rows-0", tasks, lambda: _generation(self._parts(len(tasks))))

    def _parts(self, pieces: int) -> Iterator[dict[str, Any]]:
        for number in range(pieces):
            yield from reading.parts(self.work.folder / "rows-0" / str(number))

    def _refine(self, number: int, links: Links) -> None:
        one, name = self.work.passes[number], f"rows-{number + 1}"
        if not self._phases.is_done(name):
            generation = self._rows(number)
            before = links.get(self.work.passes[number - 1].link or "", {}) if number else {}
            self._refuse_many(number, len(generation) - before.get("dropped", 0) if not one.rows else 0)
            buckets = shuffling.buckets(len(generation), equality.EQUAL.itemsize)
            common = {"do": "refine", "pass": number, "buckets": buckets}
            tasks = [{**common, "part": part} for part in range(len(generation.parts))]
            label = ", ".join([*one.rows, *([f"describe for {one.link}"] if one.link else [])]) or "drop"
            result = lambda: {"buckets": buckets, **_generation(self._phases.stats(name, len(tasks)))}  # noqa: E731
            self._phases.run(label, name, tasks, result)
        self._phases.shrink(f"rows-{number}", *(f"{phase}-{number - 1}" for phase in ("equal", "pairs", "decide")))

    def _link(self, number: int) -> dict[str, Any]:
        """All that is found by the link that ends a pass, and what it decided."""
        if self._phases.is_done(f"decide-{number}"):
            return self._phases.result(f"decide-{number}")
        name, generation = self.work.passes[number].link, self._rows(number + 1)
        self._refuse_many(number, len(generation))
        count = self._phases.result(f"rows-{number + 1}")["buckets"]
        tasks: list[Task] = [{"do": "equal", "pass": number, "bucket": bucket} for bucket in range(count)]
        total = partial(self._phases.total, f"equal-{number}", len(tasks))
        equal = self._phases.run(f"{name}: equal", f"equal-{number}", tasks, total)
        columns = self._columns(number, generation)
        cut, pairs = ({}, _each(number, generation)) if columns is None else self._met(number, generation, columns)
        self._phases.run(f"{name}: compare", f"pairs-{number}", pairs, dict)
        asked = {"do": "decide", "pass": number, "pairs": f"pairs-{number}", "count": len(pairs)}

        def result() -> dict[str, Any]:
            decided = self._phases.stats(f"decide-{number}", 1)[0]
            return {**equal, **({"cut": cut} if cut.get("keys") else {}), **without(decided, "part")}

        decided = self._phases.run(f"{name}: decide", f"decide-{number}", [asked], result)
        self._phases.shrink(f"keys-{number}", f"meet-{number}")
        return decided

    def _columns(self, number: int, generation: Generation) -> int | None:
        """How many keys a row has for a link; None where it has none to give."""
        first = next((part for part in range(len(generation.parts)) if generation.parts[part]["rows"]), None)
        if first is None:
            return 1
        keys = self.work.link(number).keys(generation.described(first)[:1])
        return None if keys is None else keys.shape[1]

    def _met(self, number: int, generation: Generation, columns: int) -> tuple[dict[str, int], list[Task]]:
        count = shuffling.buckets(len(generation) * columns, meeting.MET.itemsize)
        parts, name = range(len(generation.parts)), self.work.passes[number].link
        keys: list[Task] = [{"do": "keys", "pass": number, "part": part, "buckets": count} for part in parts]
        self._phases.run(f"{name}: keys", f"keys-{number}", keys, dict)
        meet: list[Task] = [{"do": "meet", "pass": number, "bucket": bucket} for bucket in range(count)]
        total = partial(self._phases.total, f"meet-{number}", len(meet))
        cut = self._phases.run(f"{name}: meet", f"meet-{number}", meet, total)
        return cut, [{"do": "compare", "pass": number, "part": part} for part in parts]

    def _write(self) -> list[dict[str, Any]]:
        last = len(self.work.passes)
        generation, tasks = self._rows(last), list[Task]()
        for split in reversed(SPLITS):
            common = {"do": "write", "from": f"rows-{last}", "split": split}
            for number, parts in enumerate(writing.files(generation, split)):
                tasks.append({**common, "parts": list(parts), "name": f"{split}-{number:05d}.jsonl"})
        if self.work.job.keep_dropped:
            passes = [f"rows-{number}" for number in range(last + 1)]
            tasks.append({"do": "dropped", "from": passes, "name": "dropped.ndjson"})
        shown = {"do": "page", "from": f"rows-{last}"}
        tasks += [{**shown, "stage": name, "name": f"page-{name}.md"} for name in writing.pages(self.work)]
        written = self._phases.run("write", "files", tasks, lambda: {"files": self._phases.stats("files", len(tasks))})
        return [{**file, "place": f"files/{file['part']}"} for file in written["files"]]

    def _account(self, links: Links) -> dict[str, Any]:
        phases = [self._phases.result(f"rows-{number}") for number in range(len(self.work.passes) + 1)]
        parts = self._rows(len(self.work.passes)).parts
        left = {split: sum(part["files"][f"rows-{split}"][0] for part in parts) for split in SPLITS}
        return accounted(self.work, phases[0]["records"], Counts.total(one["counts"] for one in phases), links, left)

    def _refuse_many(self, number: int, rows: int) -> None:
        """Raises UserError where more rows come to a link than it takes."""
        name = self.work.passes[number].link
        if name and 0 < (limit := self.work.link(number).limit) < rows:
            what = f"stage={name} takes no more than {limit} rows, and there are {rows}"
            raise UserError.of(what, f"let stages before it drop more, or raise stage.{name}.limit")

    def _refuse_empty(self, links: Links, rows: Mapping[str, int]) -> None:
        """Raises UserError where a split that was asked for, or everything, is empty."""
        whole = sum(rows.values())
        if not whole:
            raise UserError.of("no row is left", "see which stage dropped them: leave it out, or mend its settings")
        faults = []
        for name, found in links.items():
            among = f"all {whole} rows, in groups of up to {found.get('largest')} that hang together"
            if isinstance(self.work.stages[name], SplitStage):
                empty = [split for split in found["names"] if not rows.get(split)]
                told = f"stage={name}: {{}} would have none of {among}"
                faults += [Fault(told.format(split), _cure(name, split, found["asked"])) for split in empty]
        if faults:
            raise UserError(*faults)

    def _rows(self, number: int) -> Generation:
        return Generation.of(self.work.folder / f"rows-{number}")


def _cure(name: str, split: str, asked: Mapping[str, float]) -> str:
    """What fills a split. Training rows cannot be done without, as the others can."""
    looked = f"`loomtune plugins stage={name}` lists its settings"
    if split != "train":
        return f"give more rows or another seed, or set its share to 0 ({looked})"
    if len(asked) < 2:
        return f"give training rows that are not alike to held-out ones, or let fewer count as alike ({looked})"
    return f"give more rows or another seed, hold out less, or let fewer rows hang together ({looked})"


def _each(number: int, generation: Generation) -> list[Task]:
    rows = comparing.ROWS
    return [
        {"do": "each", "pass": number, "part": part, "rows": [begin, min(begin + rows, of["rows"])]}
        for part, of in enumerate(generation.parts)
        for begin in range(0, of["rows"], rows)
    ]


def _generation(parts: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> dict[str, Any]:
    """What later tasks have to know of each part, which every one of them reads, and what is told of all of them."""
    counts, kept, records = Counts(), [], 0
    for part in parts:
        counts.add(part["counts"])
        records += part.get("records", 0)
        kept.append(without(part, "counts", "records", "seen"))
    return {"parts": kept, "counts": counts.stages, "records": records}
