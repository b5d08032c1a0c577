import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loomtune.errors import UserError
from loomtune_plugins.models.tokenizer import HuggingFaceTokenizer
from plugins.models.conftest import SHARED

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def template(tmp_path):
    file = tmp_path / "talk.jinja"
    file.write_text(TEMPLATE)
    return str(file)


def altered(words, folder, **settings):
    shutil.copytree(words, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
    return folder


def test_text_comes_back_exactly(words):
    tokenizer = HuggingFaceTokenizer(words)
    for text in ("SELECT a , b ;", "  two  spaces\n\tand tabs ", "naïve — ✓", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nothing_is_added_and_what_is_written_out_is_recognised(words):
    tokenizer = HuggingFaceTokenizer(words)
    ids = tokenizer.encode("<s>a</s>")
    assert ids == [1, *tokenizer.encode("a"), 2]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, special=True) == "<s>a</s>"


def test_padding_never_equals_the_end_and_is_never_written_back(words, tmp_path):
    same = HuggingFaceTokenizer(altered(words, tmp_path / "same", pad_token="</s>"))
    assert (same.pad_id, same.eos_id) == (0, 2)
    same.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["pad_token"] == "</s>"
    none = HuggingFaceTokenizer(words)
    assert none.pad_id == 0
    none.save(tmp_path / "none")
    assert json.loads((tmp_path / "none" / "tokenizer_config.json").read_text()).get("pad_token") is None


def test_a_padding_token_of_its_own_is_kept(words, tmp_path):
    assert HuggingFaceTokenizer(altered(words, tmp_path / "own", pad_token="<s>")).pad_id == 1


def test_conversations_follow_the_template(words, template):
    tokenizer = HuggingFaceTokenizer(words, template)
    assert tokenizer.render(TALK) == "[user] hi</s>[assistant] hello</s>"
    assert tokenizer.render(TALK[:1], reply=True) == "[user] hi</s>[assistant] "


def test_without_a_template_the_cure_is_named(words):
    with pytest.raises(UserError, match=r"model\.chat_template=FILE"):
        HuggingFaceTokenizer(words).render(TALK)


def test_what_the_template_objects_to_is_said(words, template):
    with pytest.raises(UserError, match="no robots"):
        HuggingFaceTokenizer(words, template).render([{"role": "robot", "content": "beep"}])


def test_a_saved_tokenizer_renders_and_encodes_as_before(words, template, tmp_path):
    tokenizer = HuggingFaceTokenizer(altered(words, tmp_path / "old", chat_template="old"), template)
    tokenizer.save(tmp_path / "saved")
    again = HuggingFaceTokenizer(tmp_path / "saved")
    assert again.render(TALK) == tokenizer.render(TALK)
    assert again.encode("hello") == tokenizer.encode("hello")
    assert again.fingerprint == tokenizer.fingerprint


def test_the_fingerprint_follows_the_template_and_the_special_tokens(words, template, tmp_path):
    plain = HuggingFaceTokenizer(words).fingerprint
    copy = shutil.copytree(words, tmp_path / "copy")
    assert HuggingFaceTokenizer(copy).fingerprint == plain
    assert HuggingFaceTokenizer(words, template).fingerprint != plain
    assert HuggingFaceTokenizer(altered(words, tmp_path / "end", eos_token="<s>")).fingerprint != plain


def test_a_tokenizer_without_an_end_is_refused_unless_the_config_names_one(words, tmp_path):
    folder = altered(words, tmp_path / "endless", eos_token=None)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        HuggingFaceTokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert HuggingFaceTokenizer(folder).eos_id == 2


def test_a_missing_template_file_is_named(words):
    with pytest.raises(UserError, match=r"nowhere\.jinja"):
        HuggingFaceTokenizer(words, "nowhere.jinja")


def test_neither_offers_nor_checks_nor_tokenizers_import_torch(saved):
    program = """
import sys
from loomtune_plugins.models import models
assert len(models()) == 3 and "transformers" not in sys.modules
from loomtune_plugins.models.huggingface import HuggingFace
from loomtune_plugins.models.random import Random
from loomtune_plugins.models.settings import HuggingFaceSettings
chosen = HuggingFace(HuggingFaceSettings(path=sys.argv[1]))
chosen.check()
chosen.tokenizer().encode("a")
chosen.vocabulary(), chosen.context(), chosen.fingerprint()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(saved("llama"))], check=True)


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason=f"{SHARED / 'models'} is absent")
def test_a_published_tokenizer_is_read_as_transformers_reads_it():
    from transformers import AutoTokenizer

    folder = Path(SHARED / "models" / "stories260k")
    ours, theirs = HuggingFaceTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "Once upon a time, Lily said: “héllo”."
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.pad_id == 0
