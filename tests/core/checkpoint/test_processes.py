"""The real thing: two processes, gloo, a tiny Llama, and other programs that open what was saved."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loomtune.checkpoint import latest, validate

transformers = pytest.importorskip("transformers")

RANK = """
import shutil, sys
from pathlib import Path
import torch
from checkpoint_fakes import KINDS, FakeEngine, full, rows
from safetensors.torch import load_file
from loomtune import world
from loomtune.checkpoint import Reader, Saver
from loomtune.signals import end

folder = Path(sys.argv[1])
tensors = {n: {"weight": w, "exp_avg": w * 2} for n, w in load_file(folder / "model.safetensors").items()}
here = world.join()
saver = Saver(folder / "checkpoints", here, run="r", attempt="a", background=True, kinds=KINDS)
engine = FakeEngine(tensors, rows(here.rank, [1, 2]))
saver.start(3, {"policy": engine}, {"samples": 24}, full(describe=lambda to: shutil.copy(folder / "config.json", to)))
for parameter in tensors.values():
    parameter["weight"].zero_()
path = saver.finish()
part = engine.read(Reader(path, here).read("policy"))
first = next(iter(part.values()))
assert torch.equal(first["weight"] * 2, first["exp_avg"]) and first["weight"].any()
here.barrier()
world.leave()
end(0)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    shared = {**os.environ, "PYTHONPATH": paths, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", RANK, str(folder)]
    ranks = [subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": "0"}) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    path = latest(folder / "checkpoints")
    assert path is not None
    return path


def test_two_processes_commit_one_checkpoint(saved: Path) -> None:
    manifest = validate(saved, deep=True)
    assert manifest.world_size == 2
    assert {"model/config.json", "model/model-00001-of-00002.safetensors", "optimizer/policy-00001.safetensors"} <= set(
        manifest.files
    )
    on_disk = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert on_disk == {*manifest.files, "manifest.json"}, "every file is vouched for"


def test_the_model_opens_with_transformers_as_it_was_when_the_save_began(saved: Path) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(saved / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    read = {}
    for file in (saved / "model").glob("*.safetensors"):
        read |= load_file(file)
    parameters = dict(model.named_parameters())
    assert read.keys() == parameters.keys()
    assert all(torch.equal(read[name], parameters[name]) and read[name].any() for name in read)


def test_the_ranks_share_the_model_out_by_bytes(saved: Path) -> None:
    sizes = [path.stat().st_size for path in (saved / "model").glob("*.safetensors")]
    assert len(sizes) == 2
    assert max(sizes) < 2 * min(sizes)
