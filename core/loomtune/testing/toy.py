"""The smallest network that keeps the contracts: for checks, never for training. Imports torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from loomtune.contracts import (
    Adapter,
    Batch,
    Engine,
    EngineSpec,
    Kernel,
    Model,
    Objective,
    Optimizer,
    ParameterGroup,
    Reader,
    Role,
    StateKind,
    Tokenizer,
    Tracker,
    WeightSource,
)
from loomtune.contracts.batch import NO_PARENT, NO_SEGMENT
from loomtune.events import Events
from loomtune.plan import Plan
from loomtune.run import Run
from loomtune.settings import Settings
from loomtune.toolkit.network import Network
from loomtune.world import World, derive

SPECIAL = 3
WIDTH = 16
CONTEXT = 256


class ToyTokenizer(Tokenizer):
    """Bytes, after a padding, a begin and an end token."""

    pad_id, bos_id, eos_id = 0, 1, 2

    def encode(self, text: str) -> list[int]:
        return [SPECIAL + byte for byte in text.encode()]

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return bytes(token - SPECIAL for token in tokens if token >= SPECIAL).decode(errors="replace")

    def render(self, messages: Sequence[Mapping[str, Any]], *, reply: bool = False, tools: Any = None) -> str:
        said = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return said + "assistant: " if reply else said

    @property
    def fingerprint(self) -> str:
        return "toy"

    def save(self, folder: Path) -> None:
        (folder / "toy").touch()


class Block(nn.Module):
    """One head of attention and what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        scores = (query @ key.transpose(-1, -2) / math.sqrt(WIDTH)).masked_fill(~visible, -torch.inf)
        result: Tensor = x + self.out(torch.tanh(scores.softmax(-1) @ value))
        return result


class Decoder(nn.Module):
    """Embeddings, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(SPECIAL + 256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, SPECIAL + 256, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        x: Tensor = self.tokens(tokens) + self.places(positions)
        for block in self.blocks:
            x = block(x, visible)
        return x


class Drawn(WeightSource):
    """Normal numbers, each tensor's from its own seed."""

    def __init__(self, seed: int) -> None:
        with torch.device("meta"):
            self._shapes = {name: tuple(tensor.shape) for name, tensor in Decoder().state_dict().items()}
        self._seed = seed

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(derive(self._seed, name))
        whole = 0.3 * torch.randn(self._shapes[name], generator=generator)
        return whole if where is None else whole[where]


class ToyModel(Model):
    """A decoder of width 16 over bytes, whose weights are drawn."""

    def check(self) -> None:
        return None

    def tokenizer(self) -> Tokenizer:
        return ToyTokenizer()

    def vocabulary(self) -> int:
        return SPECIAL + 256

    def context(self) -> int:
        return CONTEXT

    def fingerprint(self) -> str:
        return "toy"

    def skeleton(self) -> nn.Module:
        return Decoder()

    def weights(self, seed: int) -> WeightSource:
        return Drawn(seed)

    def restore_buffers(self, module: nn.Module) -> None:
        return None

    def hidden(
        self, module: nn.Module, batch: Batch, attention: Mapping[str, Any], extras: dict[str, Tensor] | None = None
    ) -> Tensor:
        hidden: Tensor = module(batch.tokens, batch.positions, attention["visible"])
        return hidden

    def head(self, module: nn.Module) -> nn.Module:
        return cast(Decoder, module).head

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        return list(cast(Decoder, module).blocks)

    def save_config(self, folder: Path, dtype: str = "float32") -> None:
        (folder / "config.json").write_text(json.dumps({"dtype": dtype}))


class ToyKernel(Kernel):
    """Which tokens each token sees: those before it in its own segment and in its ancestors."""

    def attention(self, batch: Batch, dtype: Any) -> Mapping[str, Any]:
        count = len(batch.parents)
        lineage = torch.eye(count + 1, dtype=torch.bool)  # the last row is padding's, which `NO_SEGMENT` (-1) reads
        for child, parent in enumerate(batch.parents.tolist()):
            if parent != NO_PARENT:
                lineage[child] |= lineage[parent]
        assert NO_SEGMENT == -1
        related = lineage[batch.segments[:, :, None], batch.segments[:, None, :]]
        visible = related & (batch.positions[:, None, :] <= batch.positions[:, :, None])
        return {"visible": visible | torch.eye(batch.tokens.shape[1], dtype=torch.bool)}


class ToyAdapter(Adapter):
    """Adds nothing and trains everything."""

    saves_base = True

    def weave(self, module: nn.Module, weights: WeightSource, seed: int) -> tuple[nn.Module, WeightSource]:
        return module.requires_grad_(True), weights

    def base(self, module: nn.Module) -> nn.Module:
        return module

    def off(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def base_name(self, name: str) -> str | None:
        return name

    def learning_rate_scale(self, name: str) -> float:
        return 1.0

    def merged(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return tensors

    def save(self, folder: Path, tensors: Iterator[tuple[str, Tensor]], base: str) -> None:
        return None


class ToyOptimizer(Optimizer):
    """Gradient descent with momentum, so that there is state to keep."""

    learning_rate = 0.1
    clip = 0.0

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(group.parameters)} for group in groups], lr=0.1, momentum=0.9)

    def state(self) -> Mapping[str, StateKind]:
        return {"momentum_buffer": StateKind.LIKE}


class BareEngine:
    """Only the forward of an engine, and gradients to look at."""

    def __init__(self, spec: EngineSpec) -> None:
        self.network = Network(spec).to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(self.network.initial(name, None))
        spec.model.restore_buffers(self.network.base)

    def forward(self, batch: Batch, reader: Reader, *, adapter: bool = True) -> Any:
        return self.network(batch, reader, adapter)

    def evaluating(self) -> AbstractContextManager[None]:
        return torch.no_grad()


def world() -> World:
    """One process on the CPU, which joins nobody."""
    return World(0, 1, 0, torch.device("cpu"))


def spec(
    model: Model | None = None, *, trained: bool = True, heads: Sequence[str] = ("lm",), seed: int = 0
) -> EngineSpec:
    """What an engine of the toy network, or of another model, is made of."""
    return EngineSpec(
        model=model or ToyModel(),
        adapter=ToyAdapter(),
        kernel=ToyKernel(),
        optimizer=ToyOptimizer() if trained else None,
        precision="fp32",
        seed=seed,
        heads=tuple(heads),
    )


def roles(objective: Objective, model: Model | None = None) -> dict[str, Role]:
    """The roles that an objective wants, each with an engine of its own that can do nothing but compute.

    What is nobody's twin has weights of its own; what shares its twin's engine is another head there.
    """
    made: dict[str, Role] = {}
    wanted = objective.roles()
    for name, role in wanted.items():
        if role.shares and role.twin_of:
            made[name] = dataclasses.replace(made[role.twin_of], name=name, head=role.head)
            continue
        heads = [role.head, *(r.head for r in wanted.values() if r.shares and r.twin_of == name)]
        seed = int(name != "policy" and role.twin_of is None)
        engine = BareEngine(spec(model, trained=role.trained, heads=heads, seed=seed))
        made[name] = Role(name, cast(Engine, engine), head=role.head, trained=role.trained)
    return made


def move(role: Role) -> None:
    """Changes every parameter a little, the same each time."""
    with torch.no_grad():
        for parameter in cast(BareEngine, role.engine).network.parameters():
            parameter.mul_(1.05)


def run(folder: Path, trackers: Mapping[str, Tracker]) -> Run:
    """A run that has only what observers may look at; its parts that compute are absent."""
    absent = cast(Any, None)
    settings = Settings()
    plan = Plan({**dataclasses.asdict(settings), "model": {"name": "toy"}}, {"toy": "toy 1.0"})
    return Run(
        plan=plan,
        settings=settings,
        folder=folder,
        world=world(),
        events=Events(trackers.items()),
        model=ToyModel(),
        tokenizer=ToyTokenizer(),
        data=cast(Any, SimpleNamespace(window=0)),
        objective=absent,
        optimizer=ToyOptimizer(),
        schedule=absent,
        kernel=ToyKernel(),
        rollout=None,
        evaluators={},
        guards=[],
        trackers=trackers,
        splits={},
        sampler=absent,
        steps=2,
        attempt="toy",
    )
