"""An export proves itself before it gets its name: logits of what left against those of what was trained."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loomtune import api, cli, verify
from loomtune.catalogue import installed
from loomtune.contracts import Trained
from loomtune.errors import ExportError, UserError
from loomtune.plan import Plan
from loomtune.samples import open_samples
from loomtune.testing import toy
from loomtune.worker import execute, guarded
from loomtune_plugins.adapters.lora.lora import Lora
from loomtune_plugins.exporters.huggingface import HuggingFace
from loomtune_plugins.models.tokenizer import HuggingFaceTokenizer
from runs.exporting import logits
from support import SHAPE, byte_tokenizer, mixed_rows, signals_kept, write_rows

LORA = ["adapter=lora", "adapter.rank=4", "adapter.targets=[all-linear]"]
LAYER = "model.layers.1.self_attn.o_proj.weight"
"""Square, so that it could be transposed."""

Change = Callable[[dict[str, Tensor], dict[str, Tensor]], None]
"""What a fault does to merged tensors, given the base's."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases and tied embeddings, in bf16 but for its norms, which are in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True)).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    typed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in weights.items()}
    save_file(typed, folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    return folder


def prepared(base: Path, folder: Path, *settings: str, rows: list[dict[str, str]] | None = None) -> Path:
    path = write_rows(folder / "rows.jsonl", rows or mixed_rows(20))
    given = [f"model.path={base}", "data=jsonl", f"data.path={path}", "data.holdout=0.2", "sharding=single", "steps=3"]
    return api.prepare(api.compose([*given, "tracker=[]", "optimizer.lr=1e-2", *settings, f"run.dir='{folder}/run'"]))


def ends(folder: Path) -> int:
    """The exit code of a run of one process, here."""
    with signals_kept():
        return guarded(lambda: execute(Plan.load(folder), folder, toy.world()))


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained an adapter."""
    folder = prepared(base, tmp_path_factory.mktemp("adapted"), *LORA)
    assert ends(folder) == 0
    return folder


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained the model itself."""
    folder = prepared(base, tmp_path_factory.mktemp("whole"))
    assert ends(folder) == 0
    return folder


@pytest.fixture(params=["whole", "adapted"])
def ended(request: pytest.FixtureRequest) -> Path:
    """Either."""
    found: Path = request.getfixturevalue(request.param)
    return found


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_weights_leave_in_the_types_in_which_the_base_stores_them(ended: Path, base: Path, tmp_path: Path) -> None:
    out = api.export(ended, tmp_path / "out")
    left, began = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in left.items()} == {name: t.dtype for name, t in began.items()}
    assert {tensor.dtype for tensor in left.values()} == {torch.bfloat16, torch.float32}
    assert "lm_head.weight" not in left, "what is tied stays tied"
    model = opened(out)
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_weight_is_rounded_once(ended: Path, tmp_path: Path) -> None:
    exact = load_file(api.export(ended, tmp_path / "a", ["exporter.huggingface.dtype=fp32"]) / "model.safetensors")
    rounded = load_file(api.export(ended, tmp_path / "b") / "model.safetensors")
    assert all(torch.equal(exact[name].to(tensor.dtype), tensor) for name, tensor in rounded.items())
    assert not torch.equal(exact[LAYER], rounded[LAYER].float())


def test_what_was_measured_is_written_and_said(ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = json.loads((api.export(ended, tmp_path / "out") / "export.json").read_text())
    merged, exported = about["compared"]["merged"], about["compared"]["exported"]
    assert merged["largest"] < 1e-5 < merged["bound"] == verify.EXACT
    assert 1e-4 < exported["largest"] < exported["bound"] == verify.ROUNDED[torch.bfloat16]
    assert 0 < exported["rms"] < exported["largest"]
    assert (
        about["step"] == 3
        and about["run"] == Plan.load(ended).hash
        and {"torch", "loomtune_plugins.exporters"} <= about["versions"].keys()
    )
    said = capsys.readouterr().err
    assert f"{exported['largest']:.1e}" in said and "bound 3e-02" in said and f"{about['tokens']} tokens" in said


def test_rows_that_were_held_out_are_compared_first(adapted: Path, tmp_path: Path) -> None:
    about = json.loads((api.export(adapted, tmp_path / "out") / "export.json").read_text())
    splits = json.loads((adapted / "samples.json").read_text())
    held_out = open_samples(*(kind(splits["validation"][key]) for kind, key in ((Path, "cache"), (str, "key"))))
    assert 0 < len(held_out) < verify.ROWS == len(about["rows"])
    assert about["rows"][: len(held_out)] == [held_out.origin(row) for row in range(len(held_out))]


def test_drawn_tokens_are_compared_where_the_samples_are_gone(adapted: Path, tmp_path: Path) -> None:
    run = shutil.copytree(adapted, tmp_path / "run")
    (run / "samples.json").unlink()
    about = json.loads((api.export(run, tmp_path / "out") / "export.json").read_text())
    assert about["rows"] == ["drawn"] and about["tokens"] == verify.TOKENS and about["compared"]


def test_no_two_models_are_in_memory_at_once(adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    before: list[int] = []

    class Watched(verify.Network):
        def __init__(self, *given: Any) -> None:
            before.append(len(alive))
            super().__init__(*given)
            alive.add(self)

    monkeypatch.setattr(verify, "Network", Watched)
    api.export(adapted, tmp_path / "out")
    assert before == [0, 0, 0]


def forgotten(merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    """The base leaves instead."""
    merged.update(base)


def one_forgotten(merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    merged[LAYER] = base[LAYER]


def scaled(merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    """As by alpha in the place of alpha / rank."""
    merged.update({name: base[name] + 4 * (tensor - base[name]) for name, tensor in merged.items()})


def transposed(merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    merged[LAYER] = base[LAYER] + (merged[LAYER] - base[LAYER]).T


def biasless(merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    name = LAYER.replace("o_proj.weight", "v_proj.bias")
    merged[name] = merged[name] + 0.1


def embedding(merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    """The rows of another tokenizer."""
    merged["model.embed_tokens.weight"] = merged["model.embed_tokens.weight"].roll(1, 0)


def lost(merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    del merged[LAYER]


FAULTS: list[Change] = [forgotten, one_forgotten, scaled, transposed, biasless, embedding, lost]


def faulty(fault: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on merging goes wrong in this way."""
    right = Trained.merged

    def wrong(self: Trained) -> Iterator[tuple[str, Tensor]]:
        merged = dict(right(self))
        fault(merged, {name: self.weights.read(name).float() for name in merged})
        return iter(merged.items())

    monkeypatch.setattr(Trained, "merged", wrong)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_merge_is_refused_and_leaves_nothing(
    adapted: Path, fault: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights are rounded to bf16 as well, behind which a fault could hide."""
    faulty(fault, monkeypatch)
    with pytest.raises((ExportError, UserError), match=r"(?s)differs from what was trained|lacks|missing"):
        api.export(adapted, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", [one_forgotten, embedding])
def test_so_it_is_without_an_adapter_and_in_fp32(
    ended: Path, fault: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(fault, monkeypatch)
    with pytest.raises(ExportError, match="what was exported differs from what was trained"):
        api.export(ended, tmp_path / "out", ["exporter.huggingface.dtype=fp32"])


def test_a_refusal_names_the_difference_the_row_the_bound_and_the_cure(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty(scaled, monkeypatch)
    with pytest.raises(SystemExit) as leaving:
        cli.main(["export", str(adapted), "--out", str(tmp_path / "out")])
    assert leaving.value.code == 1
    told = capsys.readouterr().err
    for part in ("of the largest logit", "rows.jsonl:", "bound is 1e-04", "cure: ", "--no-check"):
        assert part in told


def test_a_fault_of_writing_is_refused(adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge is right, and the file is not."""
    right = HuggingFace._typed

    def wrong(self: HuggingFace, *given: Any) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor * (1 if name != LAYER else 1.5)) for name, tensor in right(self, *given))

    monkeypatch.setattr(HuggingFace, "_typed", wrong)
    with pytest.raises(ExportError, match="what was exported differs"):
        api.export(adapted, tmp_path / "out")


def test_numbers_that_are_none_are_refused(adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(lambda merged, base: merged[LAYER].fill_(torch.nan), monkeypatch)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="by inf of the largest"):
        api.export(adapted, tmp_path / "out")


@pytest.mark.parametrize(("file", "text", "what"), [
    ("chat_template.jinja", "{{ messages }}", "conversations"),
    ("chat_template.jinja", "{{ messages[0]['content'] }}", "chat templates"),
    ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<s>"}', "special tokens"),
])  # fmt: skip
def test_another_tokenizer_or_template_is_refused(
    adapted: Path, file: str, text: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = HuggingFaceTokenizer.save

    def wrong(self: HuggingFaceTokenizer, folder: Path) -> None:
        right(self, folder)
        (folder / file).write_text(text)

    monkeypatch.setattr(HuggingFaceTokenizer, "save", wrong)
    with pytest.raises(ExportError, match=f"gives other {what}"):
        api.export(adapted, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_to_be_checked_leaves_unproven_and_says_so(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty(scaled, monkeypatch)
    with pytest.raises(SystemExit) as leaving:
        cli.main(["export", str(adapted), "--out", str(tmp_path / "out"), "--no-check"])
    assert leaving.value.code == 0
    assert "was not compared with what was trained: it was not asked for" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "export.json").read_text())["compared"] is None


def test_a_wrong_merge_at_a_runs_end_is_told_and_the_run_stays_complete(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(scaled, monkeypatch)
    folder = prepared(base, tmp_path, *LORA, "exporter=[huggingface]")
    assert ends(folder) == 1
    result = api.Result.of(folder)
    assert result.status == "completed" and "exporter=huggingface failed: ExportError" in str(result.error)
    assert list((folder / "export").iterdir()) == []


def test_a_run_whose_model_is_too_large_to_be_compared_leaves_without(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(verify, "Network")
    folder = prepared(base, tmp_path, *LORA, "exporter=[huggingface]", "exporter.huggingface.check=false")
    assert ends(folder) == 0
    about = json.loads((folder / "export" / "huggingface-step-00000003" / "export.json").read_text())
    assert about["compared"] is None and about["why"] == "it was not asked for"


def test_models_are_compared_by_an_attention_that_runs_anywhere(base: Path) -> None:
    model = installed().build("model", "huggingface", {"path": str(base), "attention": "flash_attention_2"})
    assert (model.exact().attention, model.attention) == ("", "flash_attention_2")


def test_only_settings_of_the_exporter_may_be_given(adapted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)other maths: seed.*exporter\.huggingface"):
        api.export(adapted, tmp_path / "out", ["seed=8"])


def test_frozen_parts_of_an_adapter_come_from_where_they_came_from_in_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint holds what is trained: here B alone."""
    weave = Lora.weave

    def half_frozen(self: Lora, *given: Any) -> Any:
        woven, source = weave(self, *given)
        for name, parameter in woven.named_parameters():
            parameter.requires_grad_("lora_B" in name)
        return woven, source

    monkeypatch.setattr(Lora, "weave", half_frozen)
    folder = prepared(base, tmp_path, *LORA)
    assert ends(folder) == 0
    index = (folder / "checkpoints" / "step-00000003" / "manifest.json").read_text()
    assert "lora_B" in index and "lora_A.default.weight/weight" not in index
    assert (api.export(folder) / "model.safetensors").is_file()
    from peft import PeftModel

    alone = PeftModel.from_pretrained(opened(base).float(), api.export(folder, to="adapter")).eval()
    assert float((logits(alone) - logits(opened(base).float())).abs().max()) > 0.1, "parts of both are in the files"


def test_new_tokens_leave_with_their_rows_and_the_tokenizer(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokens = ["model.new_tokens=['<call>']", "adapter.tokens=['<call>']"]
    rows = [{"prompt": f"{word} ", "completion": f"<call>{word}"} for word in ["warp", "weft", "loom", "reed"] * 3]
    folder = prepared(base, tmp_path, *LORA, *tokens, rows=rows)
    assert ends(folder) == 0
    out = api.export(folder, tmp_path / "out")
    (number,) = AutoTokenizer.from_pretrained(out)("<call>", add_special_tokens=False)["input_ids"]
    assert number == SHAPE["vocab_size"]
    left = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    model = opened(out)
    assert model.config.vocab_size == len(left) == len(model.get_input_embeddings().weight) > number
    model_of_run = Plan.load(folder).build(installed(), "model")
    began = model_of_run.weights(0).read("model.embed_tokens.weight")
    assert left.dtype == torch.bfloat16 and torch.equal(left[:number], began[:number])
    assert float((left[number].float() - began[number].float()).abs().max()) > 1e-3, "it was trained"
