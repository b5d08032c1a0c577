"""What a run began from in files that no checkpoint holds: whoever opens it later finds them as they were."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loomtune import api, inputs
from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune.plan import Plan
from loomtune.session import opened
from loomtune.testing import toy
from loomtune.train import _composed
from loomtune.worker import execute
from support import mixed_rows, signals_kept, tiny_llama, write_rows

LORA = ["adapter=lora", "adapter.rank=2"]
CHANGED = r"(?s)began from other files of {}: they were changed.*restore the files, or begin another run.*run\.dir"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a model `base`, rows and two saved adapters, `first` and `second`, lie."""
    here = tmp_path_factory.mktemp("inputs")
    tiny_llama(here / "base", tied=True)
    write_rows(here / "rows.jsonl", mixed_rows(12))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for name, seed in (("first", 1), ("second", 2)):
            trained(settings(f"made-{name}", *LORA, "stop_after=1", f"seed={seed}"))
            shutil.copytree(here / f"made-{name}" / "checkpoints" / "step-00000001" / "adapter", here / name)
    return here


@pytest.fixture(autouse=True)
def there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def settings(run: str, *more: str) -> list[str]:
    given = ["model.path=base", "data=jsonl", "data.path=rows.jsonl", "sharding=single", "tracker=[]", "steps=4"]
    return [*given, "optimizer.lr=1e-2", "checkpoint.background=false", *more, f"run.dir={run}"]


def went(folder: Path) -> str:
    with signals_kept():
        return str(execute(Plan.load(folder), folder, toy.world())["status"])


def trained(overrides: list[str]) -> Path:
    folder = api.prepare(api.compose(overrides))
    went(folder)
    return folder


@pytest.fixture(scope="module")
def half(home: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return trained(settings("half", *LORA, "stop_after=2"))


@pytest.fixture
def stopped(half: Path, tmp_path: Path) -> Path:
    """A run of LoRA that has half of its steps to go."""
    return shutil.copytree(half, tmp_path / "run")


@contextmanager
def changed(*files: Path) -> Iterator[None]:
    """The last byte of each file is another while this lasts."""
    before = {file: file.read_bytes() for file in files}
    for file, kept in before.items():
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        yield
    finally:
        for file, kept in before.items():
            file.write_bytes(kept)


def resumed(folder: Path) -> Path:
    return api.prepare(api.resumed(folder, []))


def test_a_frozen_base_that_was_changed_is_refused_by_all_who_open_the_run(stopped: Path, home: Path) -> None:
    again = settings(str(stopped), *LORA)
    with changed(home / "base" / "model.safetensors"):
        for way in (
            lambda: resumed(stopped),
            lambda: api.prepare(api.compose(again)),
            lambda: _composed(again, 1),
            lambda: api.export(stopped, stopped / "out", check=False),
            lambda: api.evaluate(stopped),
            lambda: opened(Plan.load(stopped), stopped).__enter__(),
        ):
            with pytest.raises(UserError, match=CHANGED.format("model")):
                way()
    assert not (stopped / "out").exists()
    assert went(resumed(stopped)) == "completed", "restored, it goes on"
    assert (api.export(stopped, stopped / "out", check=False) / "config.json").is_file()


def test_a_run_that_never_said_what_it_began_from_goes_on(stopped: Path, home: Path) -> None:
    (stopped / inputs.FILE).unlink()
    with changed(home / "base" / "model.safetensors"):
        assert resumed(stopped) == stopped
        assert (stopped / inputs.FILE).is_file()
    with pytest.raises(UserError, match=CHANGED.format("model")):
        resumed(stopped)


@pytest.mark.parametrize("key", ["adapter.path=first", "adapter.under=[first]"])
def test_an_adapter_s_own_files_must_stay_too(key: str, home: Path, tmp_path: Path) -> None:
    more = ["adapter=lora", *(["adapter.rank=2"] if "under" in key else [])]
    folder = trained(settings(str(tmp_path / "run"), *more, key, "stop_after=2"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        at = home / "first" / file
        kept = at.read_bytes()
        shutil.copyfile(home / "second" / file, at)
        at.write_bytes(at.read_bytes() + b" " * (file == "adapter_config.json"))
        try:
            with pytest.raises(UserError, match=CHANGED.format("adapter")):
                resumed(folder)
            with pytest.raises(UserError, match=CHANGED.format("adapter")):
                api.export(folder, tmp_path / "out", check=False)
        finally:
            at.write_bytes(kept)
    assert went(resumed(folder)) == "completed"


def test_the_model_of_a_role_is_asked_about_where_the_role_is_needed(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "base", tmp_path / "teacher")
    more = ["objective=distill", f"roles.teacher.model.path={tmp_path / 'teacher'}", "stop_after=1"]
    folder = trained(settings(str(tmp_path / "run"), *LORA, *more))
    with changed(tmp_path / "teacher" / "model.safetensors"):
        with pytest.raises(UserError, match=CHANGED.format(r"roles\.teacher\.model")):
            resumed(folder)
        assert (api.export(folder, tmp_path / "out", check=False) / "config.json").is_file(), "a teacher stays behind"


def test_all_that_is_wrong_is_told_together(stopped: Path) -> None:
    now = dict.fromkeys(("model", "adapter"), "another")
    with pytest.raises(UserError) as refused:
        inputs.check(stopped, now)
    assert [fault.what.split(" of ")[1].partition(":")[0] for fault in refused.value.faults] == ["model", "adapter"]


def test_what_reads_no_files_says_so(stopped: Path) -> None:
    said = json.loads((stopped / inputs.FILE).read_text())
    assert said["adapter"] == "" and len(said["model"]) == 64
    assert said == inputs.fingerprints(Plan.load(stopped), installed())


def test_an_adapter_in_a_checkpoint_names_its_base_by_its_whole_path(stopped: Path, home: Path) -> None:
    config = stopped / "checkpoints" / "step-00000002" / "adapter" / "adapter_config.json"
    assert json.loads(config.read_text())["base_model_name_or_path"] == str(home / "base")


def test_a_chat_template_must_stay_as_it_was_and_its_digest_leaves_with_the_model(tmp_path: Path) -> None:
    template = tmp_path / "talk.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    digest = hashlib.sha256(template.read_bytes()).hexdigest()
    folder = trained(settings(str(tmp_path / "run"), f"model.chat_template={template}", "stop_after=1"))
    assert json.loads((folder / inputs.FILE).read_text())["model.chat_template"] == digest
    kept = json.loads((folder / "checkpoints" / "step-00000001" / "manifest.json").read_text())["files"]
    assert digest in json.dumps(kept["model/chat_template.jinja"])
    out = api.export(folder, tmp_path / "out", check=False)
    assert hashlib.sha256((out / "chat_template.jinja").read_bytes()).hexdigest() == digest
    assert json.loads((out / "export.json").read_text())["chat_template"] == digest
    template.write_text(template.read_text() + "\n{# another #}")
    with pytest.raises(UserError, match=CHANGED.format(r"model\.chat_template")):
        resumed(folder)
