"""Tensor parallelism: layers cut over ranks as the model's plan says (Shoeybi and others 2019, arXiv:1909.08053).

Parameters become DTensors on the `tensor` mesh, which fully_shard then cuts again; each rank computes with its own part
as a plain tensor, so that nothing but the four collectives below knows of the others. All ranks have the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from loomtune.errors import UserError
from loomtune.toolkit.dropout import SeededDropout
from loomtune.toolkit.network import Network
from loomtune_plugins.shardings.collectives import copied, gathered, split, summed

CUT_OUTPUTS, CUT_INPUTS = "colwise", "rowwise"
"""Styles whose activations between them are cut by channel."""


def cut(network: Network, mesh: DeviceMesh) -> None:
    """Cuts a network, still without storage, over the ranks of a mesh of one dimension.

    Raises UserError where the model has no plan, a planned layer is not a plain one, or dropout would see cut channels.
    """
    base = network.base
    plan = network.spec.model.tensor_plan(base, mesh.size())
    for name, style in plan.items():
        if style not in STYLES:
            raise UserError.of(f"'{style}', the cut of the layer '{name}', is unknown", "set sharding.tensor=1")
    _check_dropout(base, plan)
    ties = _ties(network)
    for name, style in plan.items():
        module = base.get_submodule(name)
        kind, apply = STYLES[style]
        if not isinstance(module, kind) or next(module.children(), None) is not None:
            what = f"the layer '{name}' is a {type(module).__name__}, which cannot be cut as '{style}'"
            raise UserError.of(what, "set sharding.tensor=1")
        apply(module, mesh)
    for (module, name), *others in ties:
        for other, its_name in others:
            other.register_parameter(its_name, module.get_parameter(name))


def _check_dropout(base: nn.Module, plan: Mapping[str, str]) -> None:
    """Masks are drawn by channel number, so dropout may not stand where each rank has channels of its own."""
    starts, ends = (
        {n.rpartition(".")[0] for n, s in plan.items() if s == style} for style in (CUT_OUTPUTS, CUT_INPUTS)
    )
    for name, module in base.named_modules():
        if isinstance(module, SeededDropout) and any(name.startswith(f"{part}.") for part in starts & ends):
            raise UserError.of(
                f"the dropout '{name}' stands between layers that are cut, where masks would depend on the ranks",
                "set it to 0 in the model's config, or set sharding.tensor=1",
            )


def _ties(network: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places of each parameter that has several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def _columns(module: nn.Module, mesh: DeviceMesh) -> None:
    """A whole input, and an output cut by channel: weight and bias are cut by output."""
    _distribute(module, mesh, weight=Shard(0), bias=Shard(0))
    group = mesh.get_group()
    _wrap(module, lambda forward, x: forward(copied(x, group)))


def _columns_gathered(module: nn.Module, mesh: DeviceMesh) -> None:
    _distribute(module, mesh, weight=Shard(0), bias=Shard(0))
    group = mesh.get_group()
    _wrap(module, lambda forward, x: gathered(forward(copied(x, group)), group))


def _rows(module: nn.Module, mesh: DeviceMesh) -> None:
    """An input cut by channel, and a whole output: the weight is cut by input, the bias added once."""
    _distribute(module, mesh, weight=Shard(1), bias=Replicate())
    _wrap(module, _add_up(module, mesh.get_group()))


def _rows_split(module: nn.Module, mesh: DeviceMesh) -> None:
    _distribute(module, mesh, weight=Shard(1), bias=Replicate())
    group, add_up = mesh.get_group(), _add_up(module, mesh.get_group())
    _wrap(module, lambda forward, x: add_up(forward, split(x, group)))


def _add_up(module: nn.Module, group: dist.ProcessGroup) -> Callable[..., Tensor]:
    def forward(inner: Callable[..., Tensor], x: Tensor) -> Tensor:
        bias = module._parameters["bias"]
        module._parameters["bias"] = None
        try:
            whole = summed(inner(x), group)
        finally:
            module._parameters["bias"] = bias
        return whole if bias is None else whole + bias

    return forward


def _partial(module: nn.Module, mesh: DeviceMesh) -> None:
    """A whole parameter that meets this rank's channels only, such as a norm of heads: its gradients are added up."""
    _distribute(module, mesh, **{name: Replicate() for name, _ in module.named_parameters()})
    _wrap(module, lambda forward, x: forward(x), gradient=Partial())


def _vocabulary(module: nn.Module, mesh: DeviceMesh) -> None:
    """An embedding cut by rows: each rank looks up what it has, the others add nothing to it."""
    assert isinstance(module, nn.Embedding)
    _distribute(module, mesh, weight=Shard(0))
    group, rows = mesh.get_group(), module.num_embeddings // mesh.size()
    first, padding = rows * mesh.get_local_rank(), module.padding_idx
    module.padding_idx = None if padding is None or not first <= padding < first + rows else padding - first

    def look_up(forward: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        mine = (tokens >= first) & (tokens < first + rows)
        found = forward(torch.where(mine, tokens - first, 0))
        return summed(torch.where(mine.unsqueeze(-1), found, 0.0), group)

    _wrap(module, look_up)


STYLES: Mapping[str, tuple[type[nn.Module], Callable[[nn.Module, DeviceMesh], None]]] = {
    CUT_OUTPUTS: (nn.Linear, _columns),
    "colwise_gather_output": (nn.Linear, _columns_gathered),
    CUT_INPUTS: (nn.Linear, _rows),
    "rowwise_split_input": (nn.Linear, _rows_split),
    "replicated_with_grad_allreduce": (nn.Module, _partial),
    "embedding_rowwise": (nn.Embedding, _vocabulary),
}
"""Cuts in transformers' words (5.23, `distributed/tensor_parallel.py`), with the modules that they fit."""


def _distribute(module: nn.Module, mesh: DeviceMesh, **placements: Placement) -> None:
    for name, parameter in list(module.named_parameters()):
        part = distribute_tensor(parameter, mesh, [placements[name]], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _wrap(module: nn.Module, around: Callable[..., Tensor], gradient: Placement | None = None) -> None:
    """Runs the module's own forward, within `around`, with this rank's parts as its parameters.

    gradient: what each rank's gradient is of a parameter that all hold whole; None: the whole gradient.
    """
    forward = module.forward

    def wrapped(*arguments: Any) -> Tensor:
        with _parts(module, gradient):
            return around(forward, *arguments)

    module.forward = wrapped


@contextmanager
def _parts(module: nn.Module, gradient: Placement | None) -> Iterator[None]:
    held: dict[str, Any] = dict(module._parameters)
    placements = None if gradient is None else [gradient]
    parts: dict[str, Any] = {
        name: parameter.to_local(grad_placements=placements) if isinstance(parameter, DTensor) else parameter
        for name, parameter in held.items()
    }
    module._parameters.update(parts)
    try:
        yield
    finally:
        module._parameters.update(held)
