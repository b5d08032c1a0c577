"""A teacher that is read once: its likeliest tokens of every target, kept on disk, and what is learned from them.

Let S be the teacher's k likeliest tokens at a target. Both distributions are taken over k + 1 classes, the tokens of S
and the rest of the vocabulary as one: p(rest) = sum of p over what is not in S, and the same of the policy. The
divergence is the usual one of these. No mass is thrown away and none is made up, as it is where both are normalised
over S alone: the policy still learns how much the teacher leaves to other tokens, though not to which. Merging classes
never makes a divergence larger (the log sum inequality), and with k = vocabulary nothing is merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Batch, Record, View
from loomtune.contracts.objective import Roles
from loomtune.errors import Fault, UserError
from loomtune_plugins.objectives.distill_settings import DistillSettings
from loomtune_plugins.objectives.encoding import refuse

if TYPE_CHECKING:
    from torch import Tensor

NAME = "teacher"
"""Of the role, and of the column that holds what it says."""

NOTHING = -1e4
"""Log-probability of what cannot be: finite, so that 0 times it is 0, and so small that its exponential is 0."""


def faults(settings: DistillSettings) -> Iterator[Fault]:
    """What is wrong with the settings, and which would have no effect."""
    if settings.teacher_logits not in ("live", "stored"):
        what = f"objective.teacher_logits={settings.teacher_logits} is not known"
        yield Fault(what, "set objective.teacher_logits to live or stored")
    if settings.top_k < 1:
        yield Fault(f"objective.top_k={settings.top_k} keeps nothing", "set objective.top_k to at least 1")
    if settings.teacher_logits == "live" and settings.top_k != DistillSettings().top_k:
        what = f"objective.top_k={settings.top_k} has no effect while the teacher is read in each step"
        yield Fault(what, "leave it out, or set objective.teacher_logits=stored")
    if settings.teacher_logits == "stored" and settings.on_policy > 0:
        what = "objective.teacher_logits=stored says nothing of the answers that objective.on_policy will bring"
        yield Fault(what, "set objective.teacher_logits=live, or objective.on_policy=0")


def too_many(k: int, vocabulary: int) -> list[Fault]:
    """The fault of more tokens than a teacher has."""
    if k <= vocabulary:
        return []
    what = f"objective.top_k={k} is more than the teacher's {vocabulary} tokens"
    return [Fault(what, f"set objective.top_k to at most {vocabulary}")]


def records(settings: DistillSettings) -> Mapping[str, Record]:
    """What is stored of the teacher."""
    if settings.teacher_logits == "live":
        return {}
    k, temperature = settings.top_k, settings.temperature
    read = partial(_read, k=k, temperature=temperature)
    return {NAME: Record(role=NAME, read=read, width=2 * k + 3, of={"k": k, "temperature": temperature})}


def _read(roles: Roles, batch: Batch, k: int, temperature: float) -> Tensor:
    """What is kept of the teacher's logits, a chunk of targets at a time."""
    import torch

    from loomtune_plugins.objectives.distill_divergence import CHUNK

    def reader(view: View) -> Tensor:
        head = view.heads[roles[NAME].head]
        return torch.cat([kept(head(some).float(), k, temperature) for some in torch.split(view.states, CHUNK)])

    found: Tensor = roles[NAME].read(batch, reader)
    return found


def kept(logits: Tensor, k: int, temperature: float) -> Tensor:
    """`(n, 2 k + 3)` of logits `(n, vocabulary)`: log-probabilities of the k likeliest tokens, their ids, and

    the log-probability of the rest, that at the temperature, and what log-probabilities divided by the temperature
    exceed those at it by. Ids are exact in fp32 up to 16 million tokens.
    """
    import torch

    refuse(too_many(k, logits.shape[-1]))
    log_p = logits.log_softmax(-1)
    top, ids = log_p.topk(k, -1)
    beyond = (log_p / temperature).logsumexp(-1, keepdim=True)
    rests = [_rest(log_p, ids), _rest(log_p / temperature, ids) - beyond]
    return torch.cat([top, ids.float(), *rests, beyond], -1)


def divergence_of(policy: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """`(n,)`: `divergence` over k + 1 classes, of the policy's logits and what is `kept` of the teacher's."""
    import torch

    from loomtune_plugins.objectives.distill_divergence import divergence

    top, ids, _, rest, beyond = _parts(teacher)
    if len(ids) and int(ids.max()) >= policy.shape[-1]:
        what = f"the teacher gives token {int(ids.max())}, and the policy has {policy.shape[-1]} embeddings"
        raise UserError.of(what, "set roles.teacher.model.path to a model with as many embeddings")
    theirs = torch.cat([top / temperature - beyond, rest], -1)
    return divergence(_merged(policy / temperature, ids), theirs, beta)


def observed_of(policy: Tensor, teacher: Tensor) -> Tensor:
    """`(n, 2)`: KL(teacher || policy) over k + 1 classes, without the temperature, and the policy's entropy."""
    import torch

    from loomtune.toolkit import kl

    top, ids, rest, *_ = _parts(teacher)
    ours = policy.log_softmax(-1)
    apart = kl(torch.cat([top, rest], -1), _merged(ours, ids))
    return torch.stack([apart, -(ours.exp() * ours).sum(-1)], -1)


def _merged(logits: Tensor, ids: Tensor) -> Tensor:
    """`(n, k + 1)` logits of some tokens, and of all others together."""
    import torch

    return torch.cat([logits.gather(-1, ids), _rest(logits, ids)], -1)


def _rest(logits: Tensor, ids: Tensor) -> Tensor:
    """`(n, 1)`: of all tokens but some. Added up, not what these leave of 1, of which rounding would leave nothing."""
    return logits.scatter(-1, ids, NOTHING).logsumexp(-1, keepdim=True)


def _parts(teacher: Tensor) -> tuple[Any, ...]:
    """Log-probabilities `(n, k)`, ids `(n, k)`, and the three `(n, 1)` numbers behind them."""
    k = (teacher.shape[-1] - 3) // 2
    rest, cooled, beyond = (teacher[:, [2 * k + i]] for i in range(3))
    return teacher[:, :k], teacher[:, k : 2 * k].long(), rest, cooled, beyond
