"""What a run leaves opens in other programs, and says what the training model said."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loomtune import api, cli, export, hookimpl
from loomtune.catalogue import BUILT_IN, Catalogue, Source
from loomtune.checkpoint import Manifest, Reader
from loomtune.errors import LoomtuneError, UserError
from loomtune.plan import Plan
from loomtune.testing import toy
from loomtune.worker import execute, guarded
from loomtune_plugins.models.huggingface import HuggingFace
from runs.exporting import logits, trained
from runs.ranks import on_ranks
from support import SHAPE, byte_tokenizer, mixed_rows, signals_kept, write_rows

ODD = {"hidden_size": 35, "head_dim": 6, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 33}
"""Sizes that neither two ranks nor the number of heads divide."""
LORA = ["adapter=lora", "adapter.rank=4", "adapter.targets=[all-linear]"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Ended:
    """A run of two processes. said: the logits of the model that it trained."""

    folder: Path
    base: Path
    said: Tensor

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "step-00000004"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd Llama with tied embeddings, a chat template and settings of generation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("odd")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **ODD}, tie_word_embeddings=True))
    model.generation_config.eos_token_id = [2, 9]
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=["full", "lora"])
def ended(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp(request.param)
    rows = write_rows(folder / "rows.jsonl", mixed_rows(20))
    settings = [f"model.path={base}", "data=jsonl", f"data.path={rows}", "tracker=[]", "optimizer.lr=1e-2", "steps=4"]
    adapter = LORA if request.param == "lora" else []
    where = [f"run.dir='{folder / 'run'}'", "checkpoint.every=2", "sharding=fsdp"]
    plan = api.compose([*settings, *adapter, *where], processes=2)
    api.check(plan)
    run = api.prepare(plan)
    said = [torch.from_numpy(one) for one in on_ranks(2, trained, run)]
    assert torch.equal(said[0], said[1])
    return Ended(run, base, said[0])


def opened(folder: Path) -> Any:
    """As transformers opens it, with nothing missing and nothing left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def far(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def test_the_training_changed_what_the_model_says(ended: Ended) -> None:
    assert far(logits(opened(ended.base)), ended.said) > 1e-2


def test_a_checkpoint_itself_opens_in_other_programs(ended: Ended) -> None:
    if (ended.checkpoint / "adapter").is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(opened(ended.base), ended.checkpoint / "adapter").eval()
        assert far(logits(model), ended.said) < 1e-6
        return
    folder = ended.checkpoint / "model"
    assert len(list(folder.glob("model-*-of-00002.safetensors"))) == 2, "each rank has written some"
    names = [name for file in folder.glob("*.safetensors") for name in load_file(file)]
    assert "lm_head.weight" not in names and len(names) == len(set(names))
    assert far(logits(opened(folder)), ended.said) < 1e-6


def test_scalar_heads_beside_a_model_do_not_disturb_who_knows_none(ended: Ended, tmp_path: Path) -> None:
    kind = "adapter" if (ended.checkpoint / "adapter").is_dir() else "model"
    folder = shutil.copytree(ended.checkpoint / kind, tmp_path / kind)
    save_file({"heads.reward.weight": torch.ones(1, 35)}, folder / "heads.safetensors")
    if kind == "adapter":
        from peft import PeftModel

        model = PeftModel.from_pretrained(opened(ended.base), folder).eval()
    else:
        model = opened(folder)
    assert far(logits(model), ended.said) < 1e-6


def test_an_export_says_what_the_training_model_said(ended: Ended, tmp_path: Path) -> None:
    out = api.export(ended.folder, tmp_path / "out")
    assert far(logits(opened(out)), ended.said) < 1e-5
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "warp"}], tokenize=False) == "warp"
    assert tokenizer("loom")["input_ids"] == AutoTokenizer.from_pretrained(ended.base)("loom")["input_ids"]
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 9]
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no draft is left"


def test_an_earlier_checkpoint_can_be_named(ended: Ended, tmp_path: Path) -> None:
    out = api.export(ended.folder, tmp_path / "out", checkpoint="2")
    assert far(logits(opened(out)), ended.said) > 1e-3


def test_the_command_says_where_the_model_is(ended: Ended, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["export", str(ended.folder)])
    assert leaving.value.code == 0
    out = Path(capsys.readouterr().out.strip())
    assert out == ended.folder / "export" / "huggingface"
    assert (out / "model.safetensors").is_file()
    with pytest.raises(SystemExit) as leaving:
        cli.main(["export", str(ended.folder)])
    assert leaving.value.code == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_next_run_begins_from_an_export(ended: Ended, tmp_path: Path) -> None:
    from loomtune.catalogue import installed

    model = installed().build("model", "huggingface", {"path": str(api.export(ended.folder, tmp_path / "out"))})
    model.check()
    source = model.weights(0)
    assert source.shapes()["model.embed_tokens.weight"] == (259, 35)


@pytest.fixture(scope="module")
def damaged(ended: Ended, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, to break."""
    return shutil.copytree(ended.folder, tmp_path_factory.mktemp("damaged") / "run", dirs_exist_ok=True)


def refused(what: str, folder: Path, out: Path, **more: Any) -> str:
    """An export that is refused; nothing is left of it. Gives the whole message."""
    beside = sorted(out.parent.iterdir())
    with pytest.raises(LoomtuneError, match=what) as caught:
        api.export(folder, out, **more)
    assert sorted(out.parent.iterdir()) == beside, "no draft is left"
    assert "cure: " in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_exported_is_refused_with_the_cure(ended: Ended, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--out" in refused("is a file", ended.folder, tmp_path / "file")
    assert "step-00000002, step-00000004" in refused("no 3 checkpoint", ended.folder, tmp_path / "a", checkpoint="3")
    assert "step-00000004" in refused("no ² checkpoint", ended.folder, tmp_path / "a", checkpoint="²")
    assert "step-00000004" in refused("no bset checkpoint", ended.folder, tmp_path / "a", checkpoint="bset")
    assert "huggingface" in refused("hugingface", ended.folder, tmp_path / "a", to="hugingface")
    refused("is no run's folder", ended.base, tmp_path / "a")


def test_a_run_without_a_checkpoint_has_nothing_to_export(ended: Ended, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(ended.folder / "run.yaml", tmp_path / "run")
    assert "train it first" in refused("no latest checkpoint", tmp_path / "run", tmp_path / "a")


def test_a_damaged_file_is_noticed_and_leaves_nothing(damaged: Path, tmp_path: Path) -> None:
    whole = damaged / "checkpoints" / "step-00000004" / "model" / "model-00001-of-00002.safetensors"
    file = whole if whole.is_file() else whole.parents[1] / "optimizer" / "policy-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused("is damaged", damaged, tmp_path / "a")


def test_a_disk_that_is_full_leaves_nothing(ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: Any, folder: Path, dtype: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HuggingFace, "save_config", full)
    refused("No space left on device", ended.folder, tmp_path / "a")


def test_a_place_where_nothing_can_be_made_is_refused(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"(?s)cannot be written: .*Not a directory.*--out"):
        api.export(ended.folder, tmp_path / "file" / "out")

    def forbidden(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    refused("cannot be written: .*Permission denied", ended.folder, tmp_path / "out")


def test_another_model_in_the_place_of_the_first_is_refused(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be mixed of two models would still open, and talk nonsense."""
    monkeypatch.setattr(Manifest, "read", _without("q_proj", Manifest.read))
    refused("differ in .*q_proj", ended.folder, tmp_path / "a")


def _without(part: str, read: Any) -> Any:
    def forgetful(folder: Path) -> Manifest:
        manifest: Manifest = read(folder)
        index = {name: entry for name, entry in manifest.index.items() if part not in name[1]}
        return dataclasses.replace(manifest, index=index)

    return forgetful


def test_a_scalar_head_that_was_trained_is_exported_beside_the_model(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the model did not have when the run began."""
    head, reading, known = "heads.reward.weight", Reader.read, Manifest.read

    def with_head(folder: Path) -> Manifest:
        manifest: Manifest = known(folder)
        entry = next(iter(manifest.index.values()))
        return dataclasses.replace(manifest, index={**manifest.index, ("policy", head, "weight"): entry})

    def of_head(reader: Reader, role: str) -> Any:
        read = reading(reader, role)
        return lambda name, kind, where: torch.full((1, 35), 3.0) if name == head else read(name, kind, where)

    monkeypatch.setattr(Manifest, "read", with_head)
    monkeypatch.setattr(Reader, "read", of_head)
    out = api.export(ended.folder, tmp_path / "out")
    assert torch.equal(load_file(out / "heads.safetensors")[head], torch.full((1, 35), 3.0))
    assert far(logits(opened(out)), ended.said) < 1e-5


def test_an_empty_folder_may_be_given(ended: Ended, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (api.export(ended.folder, tmp_path / "out") / "config.json").is_file()


def test_plugins_hear_of_an_export(ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[Path, Path]] = []
    ears = SimpleNamespace(exported=hookimpl(lambda folder, path: heard.append((folder, path))))
    plugins = [(Source(name, "loomtune", "1"), import_module(name)) for name in BUILT_IN]
    catalogue = Catalogue([*plugins, (Source("ears", "loomtune-ears", "1"), ears)])
    monkeypatch.setattr(export, "installed", lambda: catalogue)
    assert heard == [(ended.folder, api.export(ended.folder, tmp_path / "out"))]


@pytest.fixture
def leaving(base: Path, tmp_path: Path) -> Path:
    """A prepared run of two steps that exports what it ends with."""
    rows = write_rows(tmp_path / "rows.jsonl", mixed_rows(20))
    settings = [f"model.path={base}", "data=jsonl", f"data.path={rows}", "sharding=single", "steps=2"]
    return api.prepare(
        api.compose([*settings, "tracker=[console]", "exporter=[huggingface]", f"run.dir='{tmp_path}/run'"])
    )


def ends(folder: Path) -> int:
    """The exit code of a run of one process, here."""
    with signals_kept():
        return guarded(lambda: execute(Plan.load(folder), folder, toy.world()))


def test_a_run_leaves_by_the_exporters_that_it_chose(leaving: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(leaving) == 0
    out = leaving / "export" / "huggingface-step-00000002"
    assert f"model: {out}\n" in capsys.readouterr().out
    opened(out)
    assert ends(leaving) == 0, "a run that is complete leaves nothing a second time"


def test_a_run_that_is_not_complete_leaves_nothing(leaving: Path) -> None:
    api.prepare(api.resumed(leaving, ["stop_after=1"]))
    assert ends(leaving) == 0
    assert not (leaving / "export").exists()


def test_a_failed_export_is_told_and_the_run_stays_complete(
    leaving: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model: Any, folder: Path, dtype: str) -> None:
        raise ZeroDivisionError("no config")

    monkeypatch.setattr(HuggingFace, "save_config", broken)
    monkeypatch.setattr("loomtune.keeper.Keeper._servable", lambda self: None)
    assert ends(leaving) == 1
    told = "exporter=huggingface failed: ZeroDivisionError: no config"
    assert told in capsys.readouterr().err
    result = api.Result.of(leaving)
    assert (result.status, result.step, result.error) == ("completed", 2, told)
    monkeypatch.undo()
    assert ends(leaving) == 0, "the next start makes up for it"
    assert api.Result.of(leaving).error is None and (leaving / "export").is_dir()
