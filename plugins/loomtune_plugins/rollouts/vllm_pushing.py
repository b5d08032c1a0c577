"""Ways of a run's weights to servers: a folder with an adapter, a folder with all weights."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loomtune.contracts import Engine, Model
from loomtune.contracts.saved import HEADS
from loomtune.errors import UserError
from loomtune.world import World
from loomtune_plugins.rollouts.vllm_http import Refused, Server, Unanswered
from loomtune_plugins.rollouts.vllm_meeting import Met, settled

Tensors = Iterator[tuple[str, Tensor]]

UNTOUCHED = "default"
"""What vLLM calls the weights that it began with."""

FILE_BYTES = 2_000_000_000
"""Of a file of weights: so much of them is in memory beside the model."""


class Push(ABC):
    """One way. `stream` is called on every rank, the others on rank 0 alone, in a thread.

    counts: whether a server keeps the version of its weights, which says whether it still has those that it was given.
    """

    counts = True

    def prepare(self, servers: Sequence[Server], version: str) -> None:
        """What must be done before weights stream; nothing, as here, for most."""
        return

    @abstractmethod
    def stream(self, engine: Engine, world: World, version: str) -> BaseException | None:
        """Takes the weights from the ranks, and gives what went wrong with them on this one, if anything did."""

    @abstractmethod
    def tell(self, servers: Sequence[Server], version: str) -> str:
        """Has servers take them, and gives the name of the model to ask for."""

    def close(self, servers: Sequence[Server]) -> None:
        """Lets go of what is not needed any more."""
        return


def consumed(world: World, tensors: Tensors, consume: Callable[[Tensors], None]) -> BaseException | None:
    """Rank 0's use of tensors that all ranks gather. Where it fails the others' gathering goes on nevertheless."""
    error: BaseException | None = None
    if world.leads:
        try:
            consume(tensors)
        except Exception as raised:
            error = raised
    for _ in tensors:
        pass
    return error


def merged(engine: Engine, tensors: Tensors) -> Tensors:
    """The base's tensors, under the names that its files have, with the adapter in them."""
    return ((name, tensor) for name, tensor in engine.spec.adapter.merged(tensors) if not name.startswith(HEADS))


def tied(model: Model) -> dict[str, list[str]]:
    """The other names of each parameter that has several, by its first."""
    with torch.device("meta"):
        named = list(model.skeleton().named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in named:
        names.setdefault(id(parameter), []).append(name)
    return {first: others for first, *others in names.values() if others}


def at_all(servers: Sequence[Server], do: Callable[[Server], Any]) -> list[Any]:
    """What comes of something done with every server at once."""
    with ThreadPoolExecutor(len(servers), "vllm") as pool:
        return list(pool.map(do, servers))


class AdapterPush(Push):
    """LoRA by `/v1/load_lora_adapter`, each time as another adapter in a folder of its own.

    Loaded in the place of the last one, blocks of the prefix cache that were computed with that would be used again:
    vLLM 0.32 says so in its log. A server that was started anew meanwhile does not know the name, and refuses.
    """

    counts = False

    def __init__(self, met: Sequence[Met], folder: Path) -> None:
        self._met, self._folder = met, folder
        self._last = ""

    def prepare(self, servers: Sequence[Server], version: str) -> None:
        """Looks, where a server says it, whether the base below the adapter is still that of its files."""
        for server, met in zip(servers, self._met, strict=True):
            if met.develops and (found := settled(server)) != UNTOUCHED:
                what = f"{server.url} has other weights than its model's files: {found}, which a run pushed there"
                raise UserError.of(f"{what}, and an adapter goes on top of them", "start it anew")

    def stream(self, engine: Engine, world: World, version: str) -> BaseException | None:
        added, adapter = _added(engine), engine.spec.adapter

        def save(tensors: Tensors) -> None:
            (self._folder / version).mkdir(parents=True)
            adapter.save(self._folder / version, tensors, engine.spec.model.origin)
            _check_served(self._folder / version)

        return consumed(world, engine.stream_weights(added), save)

    def tell(self, servers: Sequence[Server], version: str) -> str:
        body = {"lora_name": version, "lora_path": str(self._folder / version), "load_inplace": True}
        at_all(servers, lambda server: _loaded(server, body))
        self._unload(servers)
        self._last = version
        return version

    def _unload(self, servers: Sequence[Server]) -> None:
        if self._last:
            for server in servers:
                with suppress(Refused, Unanswered):  # it was started anew
                    server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": self._last}, again=False, seconds=30)
            shutil.rmtree(self._folder / self._last, ignore_errors=True)

    def close(self, servers: Sequence[Server]) -> None:
        self._unload(servers)
        self._last = ""


def _added(engine: Engine) -> Callable[[str], bool]:
    adapter = engine.spec.adapter
    return lambda name: not name.startswith(HEADS) and adapter.base_name(name) is None


def serves_adapter(engine: Engine) -> bool:
    """Whether training changes nothing but what an adapter added."""
    base = engine.spec.adapter.base_name
    return all(name.startswith(HEADS) or base(name) is None for name in engine.trained())


def _check_served(folder: Path) -> None:
    """Raises UserError where it is not the adapter that vLLM serves."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        what = "vLLM serves LoRA alone, without DoRA and without whole modules beside it, and the adapter is another"
        raise UserError.of(what, "set rollout.push=disk, by which the weights go with the adapter merged in")


def _loaded(server: Server, body: dict[str, Any]) -> None:
    cure = "start it with --enable-lora, --max-lora-rank at least adapter.rank, and in its environment"
    cure += " VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; rollout.folder must be the same folder there"
    try:
        server.ask("POST", "/v1/load_lora_adapter", body)
    except Refused as error:
        raise UserError.of(f"{server.url} does not load the adapter {body['lora_path']}: {error}", cure) from error
    except Unanswered as error:
        raise Unanswered(f"{error}\n    cure: {cure}") from error


class PausedPush(Push):
    """All weights, while a server generates nothing; then it forgets what it computed with those before."""

    def __init__(self, met: Sequence[Met]) -> None:
        for one in met:
            if not one.develops:
                what = "a server takes weights in development mode alone, and is not in it"
                raise UserError.of(what, "start it with VLLM_SERVER_DEV_MODE=1 in its environment")
        self._model = met[0].model
        self._dtype: torch.dtype = getattr(torch, met[0].dtype, torch.float32)
        self._tied: dict[str, list[str]] | None = None

    def typed(self, engine: Engine, tensors: Tensors) -> Tensors:
        """In the servers' own type: what they hold is rounded once, here or there. Tied ones come under all names.

        vLLM 0.32 on a CPU packs an output head for itself: reloading the embedding that it is tied to leaves it as it
        was. Where the two are one tensor there, writing it twice does no harm.
        """
        self._tied = tied(engine.spec.model) if self._tied is None else self._tied
        for name, tensor in merged(engine, tensors):
            sent = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            for one in (name, *self._tied.get(name, ())):
                yield one, sent

    def tell(self, servers: Sequence[Server], version: str) -> str:
        at_all(servers, lambda server: server.ask("POST", "/pause?mode=wait"))
        self.hand_over(servers, version)
        at_all(servers, lambda server: _begin_anew(server, version))
        return self._model

    @abstractmethod
    def hand_over(self, servers: Sequence[Server], version: str) -> None:
        """The weights themselves, to servers that pause."""


def _begin_anew(server: Server, version: str) -> None:
    if not server.ask("POST", "/reset_prefix_cache")["success"]:
        raise Unanswered(f"{server.url} keeps its prefix cache, which other weights computed: it is not idle")
    server.ask("POST", "/update_weight_version", {"new_version": version})
    server.ask("POST", "/resume")
    if (found := settled(server)) != version:
        raise Unanswered(f"{server.url} was given weights {version}, and says that it has {found}")


class DiskPush(PausedPush):
    """Safetensors in a folder, from which each server reloads: `reload_weights` by `/collective_rpc`."""

    def __init__(self, met: Sequence[Met], folder: Path) -> None:
        super().__init__(met)
        self._folder = folder

    def stream(self, engine: Engine, world: World, version: str) -> BaseException | None:
        target = self._folder / version

        def save(tensors: Tensors) -> None:
            target.mkdir(parents=True)
            _write(target, self.typed(engine, tensors))

        return consumed(world, engine.stream_weights(), save)

    def hand_over(self, servers: Sequence[Server], version: str) -> None:
        target = self._folder / version
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(target)}}
        try:
            at_all(servers, lambda server: server.ask("POST", "/collective_rpc", body, again=False))
        except Unanswered as error:
            cure = "rollout.folder must be the same folder there: vLLM 0.32 dies where it is told of one that is not"
            raise Unanswered(f"{error}\n    cure: {cure}; and what it serves the same model") from error
        finally:
            shutil.rmtree(target, ignore_errors=True)


def _write(folder: Path, tensors: Tensors) -> None:
    """In files that are not too large to be held in memory; each tensor once, wherever it lay."""
    part: dict[str, Tensor] = {}
    held = number = 0
    for name, tensor in tensors:
        if part and held + tensor.nbytes > FILE_BYTES:
            save_file(part, folder / f"model-{number:05d}.safetensors")
            part, held, number = {}, 0, number + 1
        part[name] = tensor.detach().to("cpu", copy=True).contiguous()
        held += tensor.nbytes
    save_file(part, folder / f"model-{number:05d}.safetensors")
