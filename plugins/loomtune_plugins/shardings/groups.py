"""Parameter groups: no weight decay on norms and biases, and the adapter's factors of the learning rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from loomtune.contracts import Adapter, ParameterGroup
from loomtune.toolkit.network import saved_name


def parameter_groups(trainable: Mapping[str, nn.Parameter], adapter: Adapter) -> list[ParameterGroup]:
    """Groups by (decays, factor), each in the order of the module. Vectors and scalars are norms and biases.

    Parameters on different meshes are kept apart too: torch's optimizers that take many tensors at once take one mesh.
    """
    members: dict[tuple[bool, float, DeviceMesh | None], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in trainable.items():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        members[parameter.ndim >= 2, adapter.learning_rate_scale(saved_name(name)), mesh].append(parameter)
    return [ParameterGroup(parameters, decays, scale) for (decays, scale, _), parameters in members.items()]
