"""The real server, with a model that is made here: what it draws, what it says of it, and that it takes weights.

LOOMTUNE_VLLM names a Python that has vLLM, where it is not this one; any build will do, one for CPUs too.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from runs.worlds import free_port
from vllm_runs import PROMPTS, SAMPLING, alone, furthest, learn, model_for_real, policy, vllm

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

KEYS = [3, 4, 5, 6, 2**63 - 1]
NEAR = 1e-4
"""Nats in fp32, of other kernels."""

Start = Callable[..., str]


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get("LOOMTUNE_VLLM") or (sys.executable if importlib.util.find_spec("vllm") else "")
    if not found:
        pytest.skip("vLLM is not installed; LOOMTUNE_VLLM names a Python that has it")
    return found


@contextmanager
def started(python: str, model: Path, *more: str) -> Iterator[str]:
    """The address of `vllm serve`, which the rollout waits for."""
    port = str(free_port())
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    command += ["--port", port, "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8", *more]
    place = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
    place |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = model / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=os.environ | place, stdout=file, stderr=file, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
    except BaseException:
        sys.stderr.write(log.read_text()[-4000:])
        raise
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_adapters_reach_the_real_server(python: str, tmp_path: Path, tied: bool) -> None:
    model = model_for_real(tmp_path, tied=tied)
    with started(python, model, "--enable-lora", "--logprobs-mode", "processed_logprobs") as url:
        for adapter in ("lora", "full"):  # in this order: what `full` pushes stays
            role, rollout = policy(model, adapter), vllm(url, patience=300.0)
            for temperature in (1.0, 0.6):
                sampling = replace(SAMPLING, temperature=temperature)
                made = rollout.generate(role, PROMPTS, KEYS, sampling, alone())
                assert furthest(role, PROMPTS, made, temperature) < NEAR
                assert rollout.generate(role, PROMPTS, KEYS, sampling, alone()) == made
                learn(role)
            greedy = replace(SAMPLING, temperature=0.0)
            whole = rollout.generate(role, PROMPTS[:1], KEYS, greedy, alone())[0].tokens
            short = rollout.generate(role, PROMPTS[:1], KEYS, replace(greedy, stop=(whole[1],)), alone())[0].tokens
            assert list(short) == list(whole[: list(whole).index(whole[1]) + 1])
            nothing, one = rollout.generate(role, [[70] * 64, [70] * 63], KEYS, SAMPLING, alone())
            assert (len(nothing.tokens), len(one.tokens)) == (0, 1)
            rollout.close()


def test_raw_log_probabilities_will_do_at_a_temperature_of_1(python: str, tmp_path: Path) -> None:
    model = model_for_real(tmp_path, tied=False)
    with started(python, model) as url:
        role, rollout = policy(model), vllm(url, patience=300.0)
        cut = replace(SAMPLING, top_k=5, top_p=0.9)
        assert furthest(role, PROMPTS, rollout.generate(role, PROMPTS, KEYS, cut, alone())) < NEAR
