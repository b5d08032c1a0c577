"""A server on this machine with the endpoints of vLLM 0.32 that a run uses, which misbehaves as it is told.

It answers with a small model of transformers, so that log-probabilities are real and pushed weights change what comes.
What it does was seen of a real server: it keeps what it computed with weights of before until its cache is reset.
"""

from __future__ import annotations

import copy
import json
import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FAILURES = ("500", "503", "disconnect", "half", "empty", "abort")


class No(Exception):
    """An error as vLLM tells it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Served:
    """behave: from an endpoint and the number of the request there to what is done with it: "well" or a failure.

    asked: bodies by endpoint. here: requests that are under way. logprobs: `raw` or `processed`.
    """

    path: Path
    behave: Callable[[str, int], str] = lambda endpoint, number: "well"
    version: str = "0.32.0"
    longest: int = 64
    logprobs: str = "processed"
    develops: bool = True
    loras: bool = True
    backend: str = ""
    cap: int = 0
    port: int = 0
    asked: dict[str, list[Any]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    here: int = 0
    keys: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.going = threading.Event()
        self.wire: queue.Queue[torch.Tensor] = queue.Queue(1)
        self.received: dict[str, torch.Tensor] = {}
        self.restart()
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)

    def restart(self) -> None:
        """As a server is that was started anew."""
        self.model = AutoModelForCausalLM.from_pretrained(self.path).float().eval()
        self.cached = self.model  # whose blocks the prefix cache has
        self.adapters: dict[str, Any] = {}
        self.weights = "default"
        self.going.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def name(self) -> str:
        return str(self.path)

    # Endpoints

    def answer(self, method: str, path: str, body: Any) -> Any:
        parts = urlsplit(path)
        known = {
            "/health": lambda: "",
            "/version": lambda: {"version": self.version},
            "/v1/models": self.models,
            "/tokenize": lambda: self.tokenize(body),
            "/v1/completions": lambda: self.completions(body),
        }
        if self.loras:
            known["/v1/load_lora_adapter"] = lambda: self.load(body)
            known["/v1/unload_lora_adapter"] = lambda: self.unload(body)
        if self.develops:
            known |= {
                "/server_info": self.info,
                "/pause": lambda: self.pause(parts.query),
                "/resume": self.resume,
                "/collective_rpc": lambda: self.reload(body),
                "/reset_prefix_cache": self.reset,
                "/update_weight_version": lambda: self.commit(body),
                "/weight_info": lambda: {"weight_version": self.weights},
                "/get_world_size": lambda: {"world_size": 2},
                "/init_weight_transfer_engine": lambda: self.noted("init"),
                "/start_weight_update": lambda: self.noted("start"),
                "/update_weights": lambda: self.receive(body["update_info"]),
                "/finish_weight_update": self.finish,
                "/shutdown_weight_transfer_engine": lambda: self.noted("shutdown"),
            }
        if parts.path not in known:
            raise No(404, "Not Found")
        return known[parts.path]()

    def models(self) -> Any:
        card = {"object": "model", "owned_by": "vllm", "max_model_len": None}
        base = card | {"id": self.name, "root": self.name, "parent": None, "max_model_len": self.longest}
        added = [card | {"id": name, "root": "/some", "parent": self.name} for name in self.adapters]
        return {"object": "list", "data": [*added, base]}

    def info(self) -> Any:
        backend = {"backend": self.backend} if self.backend else None
        return {"vllm_config": {"model_config": {"dtype": "torch.float32"}, "weight_transfer_config": backend}}

    def tokenize(self, body: Any) -> Any:
        tokens = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return {"count": len(tokens), "max_model_len": self.longest, "tokens": tokens}

    def pause(self, query: str) -> Any:
        assert query == "mode=wait"
        self.going.clear()
        return {"status": "paused"}

    def resume(self) -> Any:
        self.going.set()
        return {"status": "resumed"}

    def reload(self, body: Any) -> Any:
        assert body["method"] == "reload_weights"
        assert not self.going.is_set(), "weights change under who generates"
        files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
        assert files, "vLLM dies of this"
        self.take({name: tensor for file in files for name, tensor in load_file(file).items()})
        return {"results": [None]}

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        self.model = copy.deepcopy(self.model)
        lost = self.model.load_state_dict(tensors, strict=False)
        assert not lost.unexpected_keys and not lost.missing_keys

    def noted(self, what: str) -> Any:
        return {"message": what}

    def receive(self, info: Any) -> Any:
        """What comes by another way than HTTP: `wire` has a tensor for each name."""
        try:
            got = [self.wire.get(timeout=10) for _ in info["names"]]
        except queue.Empty:
            raise No(500, "the trainer is gone") from None
        assert [list(tensor.shape) for tensor in got] == info["shapes"]
        assert {f"torch.{name}" for name in info["dtype_names"]} == {str(tensor.dtype) for tensor in got}
        self.received = dict(zip(info["names"], got, strict=True))
        return self.noted("updated")

    def finish(self) -> Any:
        assert not self.going.is_set(), "weights change under who generates"
        self.take(self.received)
        return self.noted("finished")

    def reset(self) -> Any:
        self.cached = self.model
        return {"success": True}

    def commit(self, body: Any) -> Any:
        self.weights = body["new_version"]
        return {"success": True, "new_version": self.weights}

    def load(self, body: Any) -> Any:
        from peft import PeftModel

        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            raise No(404, f"Loading lora {body['lora_name']} failed: No adapter found")
        if body["lora_name"] in self.adapters and not body["load_inplace"]:
            raise No(400, "The lora adapter has already been loaded.")
        self.adapters[body["lora_name"]] = PeftModel.from_pretrained(
            copy.deepcopy(self.model), body["lora_path"]
        ).eval()
        return "Success: LoRA adapter added successfully."

    def unload(self, body: Any) -> Any:
        if self.adapters.pop(body["lora_name"], None) is None:
            raise No(404, "The lora adapter cannot be found.")
        return "Success: LoRA adapter removed successfully."

    def completions(self, body: Any) -> Any:
        rows = self.model.config.vocab_size
        if body["model"] != self.name and body["model"] not in self.adapters:
            raise No(404, f"The model `{body['model']}` does not exist.")
        if any(token >= rows for token in body["prompt"]):
            raise No(400, "Token id is out of vocabulary")
        if any(token >= rows for token in body.get("allowed_token_ids", ())):
            raise No(400, "allowed_token_ids contains out-of-vocab token id!")
        if not self.going.wait(20):
            raise No(503, "paused")
        with self.lock:
            return self._choices(body)

    def _choices(self, body: Any) -> Any:
        network = self.adapters.get(body["model"], self.cached)
        room = min(body["max_tokens"], self.longest - len(body["prompt"]), self.cap or body["max_tokens"])
        tokens, said, reason = [], [], "length"
        noise = torch.Generator().manual_seed(body["seed"])
        for _ in range(room):
            likely, token, one = self._next(network, [*body["prompt"], *tokens], body, noise)
            tokens.append(token)
            said.append((one, likely))
            if token in body.get("stop_token_ids", ()):
                reason = "stop"
                break
        choice = {
            "index": 0,
            "text": "whatever",
            "logprobs": {
                "token_logprobs": [one for one, _ in said],
                "top_logprobs": [{"token": likely} for _, likely in said],
                "tokens": ["token"] * len(tokens),
            },
            "finish_reason": reason,
            "stop_reason": tokens[-1] if reason == "stop" else None,
            "token_ids": tokens if body.get("return_token_ids") else None,
        }
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}

    def _next(self, network: Any, tokens: list[int], body: Any, noise: torch.Generator) -> tuple[float, int, float]:
        """The likeliest token's log-probability, the token that is drawn, and its own."""
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].double()
        divided = logits / body["temperature"] if body.get("temperature") else logits
        if body.get("top_k"):
            divided[divided < divided.topk(body["top_k"]).values[-1]] = -torch.inf
        if body.get("temperature"):
            token = int(torch.multinomial(divided.softmax(-1), 1, generator=noise))
        else:
            token = int(logits.argmax())
        said = (divided if self.logprobs == "processed" else logits).log_softmax(-1)
        return float(said.max()), token, float(said[token])


class _Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def log_message(self, *said: Any) -> None:
        return

    def do_GET(self) -> None:
        self._do("GET", None)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"] or 0)
        self._do("POST", json.loads(self.rfile.read(length)) if length else None)

    def _do(self, method: str, body: Any) -> None:
        served, endpoint = self.served, urlsplit(self.path).path
        with served.lock:
            number = served.counts[endpoint]
            served.counts[endpoint] += 1
            served.asked.setdefault(endpoint, []).append(body)
            served.here += 1
            served.keys.append(self.headers["Authorization"])
        try:
            self._behave(served.behave(endpoint, number), method, body)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with served.lock:
                served.here -= 1

    def _behave(self, how: str, method: str, body: Any) -> None:
        if how in ("500", "503"):
            self._say(int(how), {"error": {"message": "EngineCore encountered an issue.", "code": int(how)}})
        elif how == "hang":
            time.sleep(30)
        elif how == "disconnect":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif how == "empty":
            self._say(200, {})
        else:
            try:
                told = self.served.answer(method, self.path, body)
            except No as no:
                self._say(no.status, {"error": {"message": str(no), "code": no.status}})
                return
            if how == "abort":
                told["choices"][0] |= {"finish_reason": "abort", "token_ids": [], "logprobs": {"token_logprobs": []}}
            self._say(200, told, cut=how == "half")

    def _say(self, status: int, told: Any, *, cut: bool = False) -> None:
        text = told if isinstance(told, str) else json.dumps(told)
        sent = text[: len(text) // 2] if cut else text
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent.encode())


@contextmanager
def serving(path: Path, **how: Any) -> Iterator[Served]:
    """A server of the model in a folder."""
    served = Served(path, **how)
    handler = type("Handler", (_Handler,), {"served": served})
    server = ThreadingHTTPServer(("127.0.0.1", served.port), handler)
    server.daemon_threads = True
    served.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
