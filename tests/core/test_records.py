"""What a frozen role says of every row: computed once, kept in parts, and never stale."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from loomtune import api, records, worker
from loomtune.assembly import Assembly, assemble
from loomtune.batching import collate
from loomtune.catalogue import installed
from loomtune.contracts import Batch, Record, Sample, Segment
from loomtune.contracts.batch import NO_PARENT
from loomtune.errors import Preempted, UserError
from loomtune.lease import Lease
from loomtune.records import Column
from loomtune.run import Run
from loomtune.settings import BatchSettings, Settings
from loomtune.signals import StopRequest
from loomtune.testing import toy
from loomtune.toolkit import log_probs
from loomtune.world import World
from loomtune_plugins.objectives import references
from loomtune_plugins.objectives.dpo import Dpo
from loomtune_plugins.shardings.engine import TorchEngine
from loomtune_plugins.shardings.single import Single
from ranks import together
from runs.processes import COMMAND, PATIENCE, kill_all, run, started
from support import write_rows

ROWS, PART = 14, 4
"""Training rows, and those of a part; 3 more rows are held out."""


class Counted:
    """What was done: the rows of each reading, and the names of the roles that got an engine."""

    def __init__(self) -> None:
        self.read: list[list[int]] = []
        self.trained: list[bool] = []
        self.fails_at = self.stops_at = -1
        self.stop = StopRequest()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counted:
    """Small parts, a cache of one's own, and an eye on readings and engines."""
    monkeypatch.setenv("LOOMTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "ROWS", PART)
    seen, live, engine = Counted(), references._live, Single.engine

    def reading(roles: Any, batch: Batch) -> torch.Tensor:
        if len(seen.read) == seen.fails_at:
            raise KeyboardInterrupt
        seen.read.append(batch.sample_numbers.tolist())
        seen.stop.asked = len(seen.read) == seen.stops_at
        return live(roles, batch)

    def building(self: Single, spec: Any, world: Any) -> Any:
        seen.trained.append(spec.optimizer is not None)
        return engine(self, spec, world)

    monkeypatch.setattr(references, "_live", reading)
    monkeypatch.setattr(Single, "engine", building)
    return seen


Built = Callable[..., Assembly]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"prompt": "p" * (3 + i % 5), "chosen": "ab" * (1 + i % 7), "rejected": "c" * (2 + i % 3) + chr(97 + i)}
        for i in range(ROWS + 3)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def built(tiny_model: Path, data: Path, tmp_path: Path) -> Iterator[Built]:
    """A run of preferences whose roles are built."""
    made: list[Assembly] = []

    def of(*overrides: str, trains: bool = True, stop: StopRequest | None = None) -> Assembly:
        given = [f"model.path={tiny_model}", "objective=dpo", "data=jsonl", f"data.path={data}", "data.holdout_rows=3"]
        given += ["sharding=single", "batch.micro=4", "objective.reference=stored", "evaluator=[heldout]"]
        named = {text.partition("=")[0]: text for text in [*given, *overrides]}
        if "model" in named:
            del named["model.path"]
        if "objective=distill" in overrides:
            del named["objective.reference"]
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        plan, lease = api.compose([*named.values(), f"run.dir={folder}"]), Lease(folder, "here")
        asked: dict[str, Any] = {"observed": False, "stop": stop}
        made.append(assemble(plan, api.prepare(plan), installed(), toy.world(), lease, **asked))
        made[-1].build_roles(trains=trains)
        return made[-1]

    yield of
    for assembly in made:
        for engine in assembly.run.trained_engines():
            engine.close()


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "records").glob("*/[0-9]*"))


def columns(assembly: Assembly, split: str = "train") -> list[list[float]]:
    """Of each row, what is joined to its targets."""
    found = []
    for index in range(len(samples := assembly.run.splits[split])):
        segments = samples[index].segments
        assert all(len(segment.columns["reference"]) == segment.is_target.sum() for segment in segments)
        found.append([float(value) for segment in segments for value in segment.columns["reference"]])
    return found


@pytest.mark.parametrize("how", ["batch.share=always", "batch.share=never", "packing=true", "batch.micro=auto"])
def test_each_target_has_what_the_policy_says_of_it_before_the_first_step(
    how: str, built: Built, counted: Counted
) -> None:
    assembly = built(how)
    for split in ("train", "validation"):
        samples = assembly.run.splits[split]
        for index, found in enumerate(columns(assembly, split)):
            alone = collate([samples[index]], [0], 0)
            with assembly.run.policy.engine.evaluating():
                assert found == pytest.approx(log_probs(assembly.run.policy, alone).tolist(), rel=1e-5, abs=1e-6)
            assert alone.columns["reference"].tolist() == pytest.approx(found)


def test_a_twin_that_is_stored_needs_no_engine(built: Built, counted: Counted) -> None:
    assembly = built()
    assert counted.trained == [True] and set(assembly.run.roles) == {"policy"}
    counted.trained.clear()
    assert set(built("objective.reference=live").run.roles) == {"policy", "reference"}
    assert counted.trained == [True, False]


def test_auto_stores_what_would_be_a_second_network_and_no_more(built: Built, counted: Counted) -> None:
    assert set(built("objective.reference=auto").run.roles) == {"policy"}
    assert counted.read
    counted.read.clear()
    assert set(built("objective.reference=auto", "adapter=lora").run.roles) == {"policy", "reference"}
    assert not counted.read and counted.trained == [True, True]


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_with_an_adapter_the_base_is_what_is_stored(adapter: str, built: Built, counted: Counted) -> None:
    """What is added begins as nothing with LoRA, and not so with virtual tokens."""
    with_adapter, whole = columns(built(f"adapter={adapter}", "max_length=64")), columns(built("max_length=64"))
    assert [len(row) for row in with_adapter] == [len(row) for row in whole]
    for one, other in zip(with_adapter, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert counted.trained == [True, True]


def test_the_next_run_reads_nothing_anew(built: Built, counted: Counted, tmp_path: Path) -> None:
    first = columns(built())
    assert len(counted.read) == 5 and len(parts(tmp_path)) == 5, "4 parts of 14 rows, and 1 of 3"
    counted.read.clear()
    assert columns(built("seed=3", "batch.micro=2", "steps=7")) == first and not counted.read


def test_only_splits_that_are_used_are_read(built: Built, counted: Counted) -> None:
    built(trains=False)
    assert len(counted.read) == 1
    built("evaluator=[]")
    assert len(counted.read) == 1 + 4
    built("evaluator=[]", "max_length=64", trains=False)
    assert len(counted.read) == 1 + 4


def test_an_interrupted_pass_goes_on_with_the_parts_that_are_missing(
    built: Built, counted: Counted, tmp_path: Path
) -> None:
    counted.fails_at = 2
    with pytest.raises(KeyboardInterrupt):
        built()
    assert [sorted(rows) for rows in counted.read] == [[*range(4)], [*range(4, 8)]]
    assert len(parts(tmp_path)) == 2
    counted.fails_at, counted.read = -1, []
    found = columns(built())
    assert [sorted(rows) for rows in counted.read] == [[*range(8, 12)], [12, 13], [0, 1, 2]]
    shutil.rmtree(tmp_path / "cache" / "records")
    assert columns(built()) == found


def test_a_pass_hears_a_request_to_leave_before_its_next_batch(built: Built, counted: Counted, tmp_path: Path) -> None:
    counted.stops_at = 3
    with pytest.raises(Preempted, match="before the first step"):
        built("batch.micro=2", stop=counted.stop)
    assert len(counted.read) == 3 and len(parts(tmp_path)) == 1, "the first part's two batches, and one more"
    counted.stops_at, counted.read, counted.stop = -1, [], StopRequest()
    built("batch.micro=2")
    assert sorted(row for rows in counted.read for row in rows) == sorted([*range(4, 14), 0, 1, 2])


def test_a_run_that_leaves_before_its_first_step_is_preempted_and_begins_when_called_again(
    tiny_model: Path, data: Path, counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"model.path={tiny_model}", "objective=dpo", "data=jsonl", f"data.path={data}", "sharding=single"]
    plan = api.compose([*given, "tracker=[]", "steps=1", f"run.dir={tmp_path / 'run'}"])
    folder = api.prepare(plan)
    for requested, code, status in ((True, 75, "preempted"), (False, 0, "completed")):
        monkeypatch.setattr(StopRequest, "listen", lambda self, asked=requested: setattr(self, "asked", asked))
        assert worker.guarded(lambda: worker.execute(plan, folder)) == code
        result = api.Result.of(folder)
        assert (result.status, result.step) == (status, int(not requested))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, Path.unlink])
def test_a_damaged_part_is_noticed_and_made_again(
    damage: Callable[[Path], object], built: Built, counted: Counted, tmp_path: Path
) -> None:
    found = columns(built())
    (train,) = {path.parent for path in parts(tmp_path) if path.name == "000001"}
    damage(train / "000002")
    counted.read.clear()
    assert columns(built()) == found
    assert [sorted(rows) for rows in counted.read] == [[*range(8, 12)]]


def test_other_weights_data_templates_and_lengths_are_other_records(
    built: Built, counted: Counted, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    first = built()
    known = {column.folder for samples in first.run.splits.values() for column in samples.columns.values()}
    assert len(known) == 2
    other, template = tmp_path / "other", tmp_path / "template.jinja"
    shutil.copytree(tiny_model, other)
    _nudge(other / "model.safetensors")
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    changed = write_rows(
        tmp_path / "changed.jsonl", [json.loads(line) | {"chosen": "z"} for line in data.read_text().splitlines()]
    )
    for how in (
        f"model.path={other}",
        f"model.chat_template={template}",
        f"data.path={changed}",
        "max_length=9",
        "precision=bf16",
        "objective.separator=' '",
    ):
        folders = {column.folder for samples in built(how).run.splits.values() for column in samples.columns.values()}
        assert len(folders) == 2 and not folders & known, how
        known |= folders


def _nudge(weights: Path) -> None:
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def test_weights_that_are_drawn_hang_on_the_seed(built: Built, counted: Counted, tiny_model: Path) -> None:
    drawn = ["model=random", f"model.config={tiny_model}", f"model.tokenizer={tiny_model}"]
    one, other = (built(*drawn, f"seed={seed}").run.splits["train"].columns["reference"].folder for seed in (0, 1))
    assert one != other


def bare(samples: list[Sample], world: Any) -> Any:
    """What of a run a reading needs, nobody being asked to leave."""
    settings = Settings(batch=BatchSettings(size=2, micro=1, share="never"))
    parts: dict[str, Any] = {"splits": {"train": samples}, "settings": settings, "world": world}
    made = SimpleNamespace(**parts, roles={}, tokenizer=toy.ToyTokenizer(), token_budget=64, stop=StopRequest())
    made.guards = []
    made.heed = partial(Run.heed, made)
    return made


def leaving() -> str:
    """What a rank says of which the second alone is asked to leave. Nothing is gathered: who stays shall not wait."""
    rank, size, here = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    total = World(rank, size, rank, here, dist.group.WORLD).total
    world = SimpleNamespace(replica=rank, replicas=size, device=here, total=total, gather_tensor=lambda values: values)
    sample = Sample((Segment(np.array([3, 4], np.int32), np.array([False, True])),))
    run = bare([sample] * 6, world)
    run.stop.asked = rank == 1
    try:
        records._read(run, "train", Record(role="teacher", read=lambda roles, batch: batch.target), {}, range(6))
    except Preempted as asked:
        return str(asked)
    return ""


def test_ranks_leave_together_where_one_of_them_is_asked(tmp_path: Path) -> None:
    assert all("before the first step" in said for said in together(2, tmp_path, leaving))


def test_targets_stand_in_the_order_of_their_segments_however_a_tree_is_unfolded() -> None:
    def segment(token: int, parent: int) -> Segment:
        return Segment(np.array([token, token + 1], np.int32), np.array([False, True]), parent)

    deep = Sample(tuple(segment(10 * i, parent) for i, parent in enumerate([NO_PARENT, 0, 0, 1, 1, 2])))
    assert deep.unfolded().parts == (0, 1, 3, 0, 1, 4, 0, 2, 5)
    record = Record(role="teacher", read=lambda roles, batch: batch.target.float() + 100 * batch.sample_numbers[0])
    targets, values = records._read(bare([deep, deep, deep], toy.world()), "train", record, {}, range(1, 3))
    assert targets.tolist() == [6, 6]
    assert values.tolist() == [*range(101, 152, 10), *range(201, 252, 10)]


def test_a_role_of_its_own_is_read_and_let_go_before_the_policy_is_built(
    built: Built, counted: Counted, tiny_model: Path, mixed_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    monkeypatch.setattr(TorchEngine, "close", lambda self: closed.append(len(counted.trained)))
    given = ["objective=distill", f"roles.teacher.model.path={tiny_model}", f"data.path={mixed_data}"]
    given += ["objective.teacher_logits=stored", "objective.top_k=3"]
    assert set(built(*given).run.roles) == {"policy"}
    assert counted.trained == [False, True] and closed == [1], "the teacher, which is closed, and then the policy"
    counted.trained.clear()
    run = built(*given).run
    assert counted.trained == [True], "what was read is there"
    (segment,) = run.splits["train"][0].segments
    assert segment.columns["teacher"].shape == (segment.is_target.sum(), 2 * 3 + 3)


def test_a_rank_that_does_not_see_what_was_written_says_so(
    built: Built, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Column, "write", lambda *_: None)
    with pytest.raises(UserError, match="LOOMTUNE_CACHE"):
        built()


def test_a_record_may_hold_several_numbers_of_each_target(
    built: Built, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(roles: Any, batch: Batch) -> torch.Tensor:
        return torch.stack([batch.target.float(), batch.predict_from.float() * 0 + len(roles)], 1)

    monkeypatch.setattr(Dpo, "records", lambda self: {"wide": Record(role="reference", read=read, width=2)})
    run = built("batch.share=never").run
    for index in range(ROWS):
        for segment in run.splits["train"][index].segments:
            at = segment.is_target
            assert segment.columns["wide"].tolist() == [[float(token), 1.0] for token in segment.tokens[at]]
    first = next(batch for batch in run.batches("train"))
    assert first.columns["wide"][:, 0].tolist() == first.target.tolist()


def test_a_row_is_found_in_its_part(tmp_path: Path) -> None:
    column = Column(tmp_path, rows=130, size=64, width=3)
    assert list(column.parts()) == [0, 1, 2] and column.rows_of(2) == range(128, 130)
    assert column.missing() == [0, 1, 2]
    column.write(2, np.array([2, 0]), np.arange(6, dtype=np.float32).reshape(2, 3))
    assert column.missing() == [0, 1]
    assert column[128].tolist() == [[0, 1, 2], [3, 4, 5]] and column[129].shape == (0, 3)


def _training(tiny_model: Path, tmp_path: Path) -> list[str]:
    """A command whose pass has three parts."""
    rows = [{"prompt": "p", "chosen": "ab" * 9, "rejected": "c" * (1 + i % 3) + str(i)} for i in range(1200)]
    given = ["objective=dpo", "data=jsonl", "sharding=single", "launcher.procs=1", "steps=1"]
    given += [f"model.path={tiny_model}", f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}"]
    return [*COMMAND, "train", *given, f"run.dir={tmp_path / 'run'}"]


def _first_part(folder: Path, process: subprocess.Popen[bytes], log: Path) -> Path:
    """Waits for it."""
    while not (done := parts(folder)):
        assert process.poll() is None, log.read_text()
        time.sleep(0.001)
    return done[0]


@pytest.mark.slow
def test_a_signal_during_the_pass_ends_it_with_code_75_and_the_same_command_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOMTUNE_CACHE", str(tmp_path / "cache"))
    command, log = _training(tiny_model, tmp_path), tmp_path / "log"
    with started(command, log) as process:
        _first_part(tmp_path, process, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == Preempted.exit_code, log.read_text()
    assert api.Result.of(tmp_path / "run").status == "preempted"
    left = {path: path.stat().st_mtime_ns for path in parts(tmp_path)}
    assert 0 < len(left) < 3
    assert run(command, log) == 0, log.read_text()
    assert left.items() <= {path: path.stat().st_mtime_ns for path in parts(tmp_path)}.items()
    assert api.Result.of(tmp_path / "run").status == "completed"


@pytest.mark.slow
def test_a_kill_loses_no_more_than_the_part_under_way(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOMTUNE_CACHE", str(tmp_path / "cache"))
    command, log = _training(tiny_model, tmp_path), tmp_path / "log"
    with started(command, log) as process:
        first = _first_part(tmp_path, process, log)
        kill_all(process)
    left = {path: path.stat().st_mtime_ns for path in parts(tmp_path)}
    assert first in left and len(left) < 3
    assert run(command, log) == 0, log.read_text()
    assert left.items() <= {path: path.stat().st_mtime_ns for path in parts(tmp_path)}.items()
    assert len(parts(tmp_path)) == 3
