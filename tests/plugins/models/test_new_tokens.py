"""Tokens that a tokenizer lacks become special ones, and the embedding has rows for them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loomtune import api
from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune.plan import Finding, Plan, findings
from loomtune_plugins.models import new_tokens
from loomtune_plugins.models.huggingface import HuggingFace, Tiny
from loomtune_plugins.models.settings import HuggingFaceSettings, TinySettings
from loomtune_plugins.models.tokenizer import HuggingFaceTokenizer
from plugins.models.conftest import batch, born

TWO = ["<|user|>", "<|end|>"]
TALK = [{"role": "user", "content": "hi"}]
ENDS = {"llama": ["model.embed_tokens.weight", "lm_head.weight"], "llama_tied": ["model.embed_tokens.weight"]}


def model(path: Path, tokens: list[str] | None = None, **settings: Any) -> HuggingFace:
    return HuggingFace(HuggingFaceSettings(path=str(path), new_tokens=TWO if tokens is None else tokens, **settings))


@pytest.fixture(scope="module")
def full(saved, tmp_path_factory):
    """Gives a copy of a family's model whose 300 rows the tokenizer's 259 tokens fill, but for the last two."""

    def folder(family: str) -> Path:
        copy = shutil.copytree(saved(family), tmp_path_factory.mktemp("full") / family)
        pieces = json.loads((copy / "tokenizer.json").read_text())
        pieces["model"]["vocab"] |= {f"filling{number}": number for number in range(259, 299)}
        (copy / "tokenizer.json").write_text(json.dumps(pieces))
        return copy

    return folder


def said(chosen: HuggingFace, tokens: torch.Tensor) -> torch.Tensor:
    network = born(chosen).eval()
    logits: torch.Tensor = chosen.head(network)(chosen.hidden(network, batch(tokens), {}))
    return logits


def test_each_new_token_is_one_id_inside_of_a_text_and_is_hidden_like_a_special_one(words):
    tokenizer = HuggingFaceTokenizer(words, new_tokens=TWO)
    plain = HuggingFaceTokenizer(words)
    assert tokenizer.new_ids == {"<|user|>": 259, "<|end|>": 260}
    assert tokenizer.encode("a<|user|> b<|end|>") == [*plain.encode("a"), 259, *plain.encode(" b"), 260]
    assert tokenizer.decode([259, *plain.encode("a"), 260]) == "a"
    assert tokenizer.decode([259], special=True) == "<|user|>"
    assert (tokenizer.eos_id, tokenizer.pad_id) == (plain.eos_id, plain.pad_id)


def test_the_fingerprint_of_the_tokenizer_follows_the_new_tokens_and_their_order(words):
    sorts = [HuggingFaceTokenizer(words, new_tokens=tokens).fingerprint for tokens in ([], TWO, TWO[:1], TWO[::-1])]
    assert len(set(sorts)) == 4


def test_a_chat_template_that_writes_new_tokens_gives_their_ids(words, tmp_path):
    (tmp_path / "talk.jinja").write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}")
    tokenizer = HuggingFaceTokenizer(words, str(tmp_path / "talk.jinja"), new_tokens=TWO)
    assert tokenizer.encode(tokenizer.render(TALK)) == [259, *tokenizer.encode("hi"), 260]


OLD = {"added_tokens_decoder": {"2": {"content": "</s>", "special": True}}, "additional_special_tokens": ["<s>"]}
FILES = [{}, OLD, {"extra_special_tokens": ["<s>"]}, {"extra_special_tokens": {"image_token": "<s>"}}, None]


@pytest.mark.parametrize("settings", FILES, ids=["plain", "version 4", "version 5", "named", "bare"])
def test_what_is_saved_opens_elsewhere_with_the_new_tokens_special(words, tmp_path, settings):
    from transformers import AutoTokenizer

    folder = shutil.copytree(words, tmp_path / "old")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **(settings or {})}))
    if settings is OLD:
        (folder / "added_tokens.json").write_text("{}")
        (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<s>"]}))
    tokenizer = HuggingFaceTokenizer(folder, new_tokens=TWO)
    tokenizer.save(tmp_path / "new")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert {"<s>", *TWO} <= set(theirs.all_special_tokens)
    assert theirs("x<|end|>", add_special_tokens=False)["input_ids"] == tokenizer.encode("x<|end|>")
    assert theirs.decode([259, 260], skip_special_tokens=True) == ""
    again = HuggingFaceTokenizer(tmp_path / "new")
    assert again.fingerprint == HuggingFaceTokenizer(tmp_path / "new", new_tokens=TWO).fingerprint
    assert again.fingerprint == tokenizer.fingerprint or settings == FILES[3]
    if settings is OLD:
        assert json.loads((tmp_path / "new" / "added_tokens.json").read_text()) == tokenizer.new_ids
        decoder = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        assert [decoder[number]["content"] for number in ("2", "259", "260")] == ["</s>", *TWO]


def test_a_tokenizer_of_other_files_is_saved_with_the_new_tokens(tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "old").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "old" / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "old" / "config.json").write_text('{"model_type": "bert", "eos_token_id": 3}')
    tokenizer = HuggingFaceTokenizer(tmp_path / "old", new_tokens=TWO)
    tokenizer.save(tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text('{"model_type": "bert"}')
    assert AutoTokenizer.from_pretrained(tmp_path / "new").convert_tokens_to_ids(TWO) == [7, 8]


WRONG = [
    (["a"], "'a', which is an ordinary token of the tokenizer already"),
    (["x<|end|>", "<|end|>", ""], "a token of no characters"),
    ([" "], "a token of no characters"),
    (["<|a|>", "<|b|>", "<|a|>"], r"names '<\|a\|>' more than once"),
]


@pytest.mark.parametrize(("tokens", "reason"), WRONG)
def test_what_can_be_no_new_token_is_refused_with_the_cure(saved, tokens, reason):
    with pytest.raises(UserError, match=f"(?s){reason}.*cure: "):
        model(saved("llama"), tokens).check()


def test_what_needs_no_tokenizer_is_refused_before_any_file_is_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"(?s)more than once.*pad_vocabulary_to=0 is no multiple"):
        model("somebody/elsewhere", ["<a>", "<a>"], pad_vocabulary_to=0).find()


def test_an_added_token_that_is_not_special_is_refused_too(words, tmp_path):
    folder = shutil.copytree(words, tmp_path / "added")
    pieces = json.loads((folder / "tokenizer.json").read_text())
    pieces["added_tokens"].append({**pieces["added_tokens"][0], "id": 259, "content": "<|u", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(pieces))
    with pytest.raises(UserError, match=r"'<\|u', which is an ordinary token"):
        HuggingFaceTokenizer(folder, new_tokens=["<|u"])


class Splitting:
    """A tokenizer of code of its own, which knows no added tokens when it cuts text."""

    added_tokens_decoder: Mapping[int, Any] = {}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text)}

    def add_special_tokens(self, *_: Any, **__: Any) -> None:
        return

    def convert_tokens_to_ids(self, token: str) -> int:
        return 7


def test_a_token_that_would_not_come_out_as_itself_is_refused():
    with pytest.raises(UserError, match=r"'<a>' of model\.new_tokens does not come out of the tokenizer as one token"):
        new_tokens.add(Splitting(), ["<a>"], {"a": 1})


def test_ids_that_other_tokens_have_are_never_given(words, tmp_path):
    folder = shutil.copytree(words, tmp_path / "gaps")
    pieces = json.loads((folder / "tokenizer.json").read_text())
    pieces["model"]["vocab"]["far"] = 260  # 260 tokens, of which one has the id that the first new one would be given
    (folder / "tokenizer.json").write_text(json.dumps(pieces))
    with pytest.raises(UserError, match=r"the id 260, which another token has"):
        HuggingFaceTokenizer(folder, new_tokens=["<|a|>"])


def test_one_that_is_special_already_stays_as_it_is(words):
    tokenizer = HuggingFaceTokenizer(words, new_tokens=["</s>", "<|a|>"])
    assert tokenizer.new_ids == {"</s>": 2, "<|a|>": 259}


def test_spare_rows_are_used_before_the_embedding_grows(saved):
    chosen = model(saved("llama"))
    chosen.check()
    assert chosen.vocabulary() == chosen.config().vocab_size == 300
    assert chosen.fingerprint() == model(saved("llama"), []).fingerprint()
    tokens = torch.tensor([[4, 259, 260]])
    assert torch.equal(said(chosen, tokens), said(model(saved("llama"), []), tokens))


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_new_rows_are_the_mean_of_those_there_and_the_others_stay_as_they_are(full, family):
    chosen = model(folder := full(family))
    chosen.check()
    assert chosen.vocabulary() == chosen.config().vocab_size == 301
    weights, stored = chosen.weights(0), load_file(folder / "model.safetensors")
    assert weights.shapes() == {
        name: tuple(t.shape) for name, t in chosen.ghost().state_dict().items() if name in stored
    }
    for name, tensor in stored.items():
        whole = weights.read(name)
        assert torch.equal(whole[: len(tensor)], tensor)
        grown = whole[len(tensor) :]
        assert len(grown) == (name in ENDS[family])
        assert torch.equal(grown, tensor.double().mean(0, keepdim=True).float()[: len(grown)])


def test_slices_across_the_border_equal_what_is_cut_from_the_whole(full):
    weights = model(full("llama"), [f"<|{number}|>" for number in range(9)]).weights(0)
    whole = weights.read("lm_head.weight")
    assert whole.shape == (308, 32)
    for start, stop, step in ((0, 308, 1), (290, 304, 1), (299, 308, 3), (300, 308, 1), (0, 300, 1), (308, 308, 1)):
        for columns in (slice(None), slice(3, 7), slice(5, 5)):
            where = (slice(start, stop, step), columns)
            with torch.device("meta"):
                part = weights.read("lm_head.weight", where)
            assert torch.equal(part, whole[where]) and part.is_contiguous(), where


def test_the_mean_is_the_same_however_many_rows_are_held_at_once(full, monkeypatch):
    chosen = model(full("llama"))
    whole = chosen.weights(0).read("lm_head.weight")
    monkeypatch.setattr("loomtune_plugins.models.growth.AT_ONCE", 33)
    assert torch.allclose(chosen.weights(0).read("lm_head.weight"), whole, rtol=1e-7, atol=0)


def test_weights_in_half_precision_stay_so(full):
    folder = full("llama")
    halved = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(halved, folder / "model.safetensors")
    grown = model(folder).weights(0).read("lm_head.weight")
    assert grown.dtype == torch.bfloat16
    assert torch.equal(grown[300], halved["lm_head.weight"].double().mean(0).bfloat16())


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "gpt2"])
def test_what_the_model_says_of_other_tokens_stays_and_a_new_one_is_as_likely_as_the_mean(full, family):
    tokens = torch.tensor([[5, 9, 77, 120]])
    before, after = said(model(folder := full(family), []), tokens), said(model(folder), tokens)
    assert after.shape[-1] == 301
    assert torch.allclose(after[..., :300], before, atol=1e-5)
    if family != "gemma2":  # which caps its logits
        assert torch.allclose(after[..., 300], before.mean(-1), atol=1e-5)


def test_the_bias_of_a_head_grows_alike(tmp_path, words):
    from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    theirs = PhiForCausalLM(PhiConfig(vocab_size=259, **small))
    torch.nn.init.normal_(theirs.lm_head.bias)
    theirs.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(words).save_pretrained(tmp_path)
    bias = model(tmp_path).weights(0).read("lm_head.bias")
    assert torch.equal(bias[:259], theirs.lm_head.bias)
    assert torch.allclose(bias[259:], theirs.lm_head.bias.mean().expand(2))


def test_the_rows_can_be_made_a_multiple(full, saved):
    assert model(full("llama"), pad_vocabulary_to=64).vocabulary() == 320
    padded = model(saved("llama"), [], pad_vocabulary_to=64)
    padded.check()
    assert padded.vocabulary() == padded.config().vocab_size == 320
    weights = padded.weights(0)
    rows = [weights.read("lm_head.weight", (slice(row, row + 1),)) for row in (300, 319)]
    assert torch.equal(*rows)
    assert padded.fingerprint() != model(saved("llama"), []).fingerprint()


def test_the_config_that_is_saved_has_the_new_rows(full, tmp_path):
    from transformers import AutoConfig

    model(full("llama")).save_config(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 301


def test_the_fingerprint_of_the_weights_follows_their_rows(full):
    folder = full("llama")
    assert model(folder).fingerprint() != model(folder, []).fingerprint()
    assert model(folder, ["<|a|>"]).fingerprint() == model(folder, []).fingerprint(), "one row was spare"


def test_another_models_tokenizer_is_refused_as_before(full, saved, tmp_path):
    other = full("llama")
    pieces = json.loads((other / "tokenizer.json").read_text())
    pieces["model"]["vocab"] |= {f"more{number}": number for number in range(299, 400)}
    (other / "tokenizer.json").write_text(json.dumps(pieces))
    with pytest.raises(UserError, match="has ids up to 399, the embedding 300 rows"):
        model(saved("llama"), tokenizer=str(other)).check()


def test_the_shipped_model_takes_new_tokens_too():
    chosen = Tiny(TinySettings(new_tokens=TWO))
    chosen.check()
    assert chosen.vocabulary() == 1468
    assert chosen.weights(0).shapes()["model.embed_tokens.weight"][0] == 1468


def test_no_torch_is_needed_to_add_tokens(saved):
    program = """
import sys
from loomtune_plugins.models.huggingface import HuggingFace
from loomtune_plugins.models.settings import HuggingFaceSettings
chosen = HuggingFace(HuggingFaceSettings(path=sys.argv[1], new_tokens=["<|a|>"]))
chosen.check()
assert chosen.tokenizer().encode("<|a|>") == [259]
chosen.vocabulary(), chosen.fingerprint(), chosen.stored()
chosen.tokenizer().save(__import__("pathlib").Path(sys.argv[2]))
assert "torch" not in sys.modules
"""
    folder = saved("llama")
    subprocess.run([sys.executable, "-c", program, str(folder), str(folder.parent / "no torch")], check=True)


WORDS = 'model.new_tokens=["<|user|>","<|end|>"]'


def doubts(plan: Plan) -> list[Finding]:
    """What is said of new tokens before the run."""
    return [one for one in findings(plan, installed()) if "new_tokens" in one.what]


def test_a_frozen_base_is_warned_of_with_the_cure_and_a_trained_one_is_not(tmp_path):
    def warned(*settings: str) -> list[Any]:
        plan = api.compose(["model=tiny", *settings, f"run.dir={tmp_path / 'run'}"])
        return doubts(plan)

    assert warned(WORDS) == warned("adapter=lora") == []
    (found,) = warned(WORDS, "adapter=lora")
    assert not found.fatal and "adapter=lora does not train the rows" in found.what
    assert "adapter.tokens" in found.cure or "adapter=full" in found.cure


HEADS = [("llama", "[]", 1), ("llama", "[lm_head]", 0), ("llama", "['*']", 0), ("llama_tied", "[]", 0)]


@pytest.mark.parametrize(("family", "modules", "told"), HEADS)
def test_a_head_of_its_own_that_nothing_trains_is_warned_of(saved, tmp_path, family, modules, told):
    rows = ["adapter=lora", 'adapter.tokens=["<|end|>"]', f"adapter.modules={modules}"]
    plan = api.compose([f"model.path={saved(family)}", WORDS, *rows, f"run.dir={tmp_path / 'run'}"])
    found = doubts(plan)
    assert [one.cure for one in found] == ["set adapter.modules=[lm_head], unless they are only read"] * told
    assert not any(one.fatal for one in found)


def test_new_tokens_are_part_of_the_maths(tmp_path):
    plain, more = (api.compose(["model=tiny", *words, f"run.dir={tmp_path / 'run'}"]) for words in ((), (WORDS,)))
    assert more.chosen("model")["new_tokens"] == TWO
    assert plain.hash != more.hash
