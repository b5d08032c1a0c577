"""The adapter alone, as peft and servers take it, and what is refused where there is none or it cannot be merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loomtune import api
from loomtune.contracts import Adapter, Trained
from loomtune.errors import ExportError, UserError
from loomtune.plan import Plan
from loomtune.testing import toy
from loomtune.worker import execute, guarded
from loomtune_plugins.adapters.lora.lora import Lora
from loomtune_plugins.exporters.adapter import AdapterAlone
from runs.exporting import logits
from support import mixed_rows, signals_kept, tiny_llama, write_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("base"), tied=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def ended(base: Path, folder: Path, *settings: str) -> Path:
    """A run of one process, here."""
    rows = write_rows(folder / "rows.jsonl", mixed_rows(12))
    given = [f"model.path={base}", "data=jsonl", f"data.path={rows}", "sharding=single", "steps=2", "tracker=[]"]
    run = api.prepare(api.compose([*given, "optimizer.lr=1e-2", *settings, f"run.dir='{folder}/run'"]))
    with signals_kept():
        assert guarded(lambda: execute(Plan.load(run), run, toy.world())) == 0
    return run


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def measured(out: Path) -> Any:
    """What the proof has written down."""
    return json.loads((out / "export.json").read_text())["compared"]


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = "adapter.targets=[all-linear]"
    return ended(base, tmp_path_factory.mktemp("lora"), "adapter=lora", "adapter.rank=4", targets)


def test_it_says_on_its_base_what_the_merged_model_says(adapted: Path, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    alone = api.export(adapted, tmp_path / "alone", to="adapter")
    merged = logits(opened(api.export(adapted, tmp_path / "merged")))
    assert far(logits(PeftModel.from_pretrained(opened(base), alone).eval()), merged) < 1e-5
    assert far(logits(opened(base)), merged) > 1e-2


def test_its_folder_has_what_a_server_needs(adapted: Path, base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = api.export(adapted, tmp_path / "out", to="adapter")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.absolute()) and config["peft_type"] == "LORA"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "warp"}], tokenize=False) == "warp"
    assert not list(out.glob("model*.safetensors")) and not (out / "config.json").exists()


def test_it_is_opened_on_its_base_and_says_there_what_was_trained(adapted: Path, tmp_path: Path) -> None:
    exported = measured(api.export(adapted, tmp_path / "out", to="adapter"))["exported"]
    assert exported["largest"] < 1e-5 and exported["bound"] == 1e-4


@pytest.mark.parametrize("adapter", ["prefix", "bottleneck"])
def test_so_is_what_cannot_be_merged(adapter: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt tuning: below, where a merge of it is refused."""
    run = ended(base, tmp_path, f"adapter={adapter}")
    assert measured(api.export(run, to="adapter"))["exported"]["largest"] < 1e-5
    broken(shift_a_tensor, monkeypatch)
    with pytest.raises(ExportError, match="what was exported differs from what was trained by"):
        api.export(run, tmp_path / "out", to="adapter")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [
    *("ptuning", "ia3", "adalora", "oft", "coft"),
    *(f"lora adapter.{setting}" for setting in ("dora=true", "init=pissa", "modules=[model.norm]", "tokens=[3,9]")),
])  # fmt: skip
def test_so_is_whatever_peft_opens(adapter: str, base: Path, tmp_path: Path) -> None:
    run = ended(base, tmp_path, *f"adapter={adapter}".split())
    assert measured(api.export(run, to="adapter"))["exported"]["largest"] < 1e-5


def factor_lost(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensors[name] for name in sorted(tensors)[:-1]}, folder / WEIGHTS)


def shift_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, (last := sorted(tensors)[-1]): tensors[last] + 0.1}, folder / WEIGHTS)


def other_alpha(folder: Path) -> None:
    """As where alpha / rank is taken for alpha."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] / config["r"]}))


def target_lost(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"target_modules": config["target_modules"][1:]}))


@pytest.mark.parametrize("fault", [factor_lost, shift_a_tensor, other_alpha, target_lost])
def test_what_is_saved_otherwise_than_it_was_trained_is_refused_and_leaves_nothing(
    adapted: Path, fault: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(fault, monkeypatch)
    with pytest.raises(ExportError, match="what was exported differs from what was trained by"):
        api.export(adapted, tmp_path / "out", to="adapter")
    assert list(tmp_path.iterdir()) == []


def broken(fault: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on what is saved goes wrong in this way."""
    right = AdapterAlone.export

    def wrong(self: AdapterAlone, trained: Trained, folder: Path) -> None:
        right(self, trained, folder)
        fault(folder)

    monkeypatch.setattr(AdapterAlone, "export", wrong)


def test_a_setting_leaves_the_proof_out_and_that_is_said(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(other_alpha, monkeypatch)
    out = api.export(adapted, tmp_path / "out", ["exporter.adapter.check=false"], to="adapter")
    assert measured(out) is None and "it was not asked for" in capsys.readouterr().err


def test_what_nobody_else_opens_leaves_unproven_and_that_is_said(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Lora, "reopen", Adapter.reopen)
    out = api.export(adapted, tmp_path / "out", to="adapter")
    assert measured(out) is None and "nothing here opens this format" in capsys.readouterr().err


def test_it_holds_what_was_trained_and_not_what_it_began_with(adapted: Path, tmp_path: Path) -> None:
    left = load_file(api.export(adapted, tmp_path / "out", to="adapter") / "adapter_model.safetensors")
    saved = load_file(adapted / "checkpoints" / "step-00000002" / "adapter" / "adapter_model.safetensors")
    assert left.keys() == saved.keys() and all(torch.equal(left[name], tensor) for name, tensor in saved.items())
    assert all(bool(tensor.any()) for name, tensor in left.items() if "lora_B" in name), "B begins with zeros"


def test_full_fine_tuning_has_no_adapter_to_leave(base: Path, tmp_path: Path) -> None:
    run = ended(base, tmp_path)
    with pytest.raises(UserError, match=r"(?s)adds nothing that could leave alone.*--to huggingface$"):
        api.export(run, to="adapter")
    assert not (run / "export").exists()


def test_what_cannot_be_merged_is_told_so_before_anything_is_written_and_leaves_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    run = ended(base, tmp_path, "adapter=prompt")
    made: list[Path] = []
    monkeypatch.setattr(Path, "mkdir", lambda self, *_, **__: made.append(self))
    with pytest.raises(UserError, match=r"(?s)exporter=huggingface does not go with adapter=prompt.*--to adapter$"):
        api.export(run)
    assert not made
    monkeypatch.undo()
    out = api.export(run, to="adapter")
    assert measured(out)["exported"]["largest"] < 1e-5
    alone = PeftModel.from_pretrained(opened(base), out)
    assert far(logits(alone)[:, -8:], logits(opened(base))) > 1e-3


@pytest.mark.parametrize(("exporter", "adapter"), [
    ("huggingface", "prompt"), ("huggingface", "prefix"), ("huggingface", "ptuning"), ("huggingface", "bottleneck"),
    ("adapter", "full"),
])  # fmt: skip
def test_a_run_that_could_not_leave_so_is_refused_before_it_begins(base: Path, exporter: str, adapter: str) -> None:
    plan = api.compose([f"model.path={base}", f"adapter={adapter}", f"exporter=[{exporter}]"])
    with pytest.raises(UserError, match=f"exporter={exporter} does not go with adapter={adapter}"):
        api.check(plan)


def test_what_qlora_learned_is_merged_into_the_base_as_stored_and_both_distances_are_told(
    base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    run = ended(base, tmp_path, "adapter=qlora", "adapter.rank=4", "adapter.targets=[all-linear]")
    out = api.export(run)
    about = measured(out)
    alone = measured(api.export(run, to="adapter"))
    assert alone["exported"]["largest"] < 1e-5 and alone["approximate"] == about["approximate"]
    assert about["exported"]["largest"] < 1e-5, "of the adapter on the base in its own precision"
    assert 1e-3 < about["approximate"]["largest"] < about["approximate"]["bound"], "of the base in 4 bits"
    began, left = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    norm = "model.norm.weight"
    assert torch.equal(left[norm], began[norm]) and left.keys() == began.keys()
