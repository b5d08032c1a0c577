"""Generation during training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loomtune.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

    from loomtune.contracts.role import Role
    from loomtune.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens, and where to end.

    temperature: 0 is greedy. stop: token ids that end a completion, eos always included.
    max_tokens: of a completion. max_length: of prompt and completion together; 0: as many as the model was made for.
    """

    max_tokens: int
    max_length: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """What came of a prompt.

    tokens: without the prompt, with the stop token where one came.
    log_probs: of each token as the engine had it, in nats: logits divided by the temperature (by 1 where it is 0),
        before anything was cut off; empty where the engine does not say.
    """

    tokens: Sequence[int]
    log_probs: Sequence[float] = ()


class Rollout(ABC):
    """Generates completions with the weights that are being trained.

    heed: the run's, which raises Preempted on every rank where one was asked to leave; every rank calls it equally
    often in a long wait.
    ranks: how many of the world's last ranks train nothing and run `serve`; its settings' key of that name says so.
    ahead: how many batches an online objective begins before it needs them, 0 or 1.
    apart: mean and largest difference, in nats, that its log-probabilities may have from training's; None: rounding's.
    """

    heed: Callable[[], None] = staticmethod(lambda: None)
    ranks: int = 0
    ahead: int = 0
    apart: tuple[float, float] | None = None

    @abstractmethod
    def generate(
        self, role: Role, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, world: World
    ) -> list[Completion]:
        """Completions of this rank's prompts, in order.

        keys: a number below 2^63 for each prompt, of which alone (with the place in the completion) its noise is a
        function: neither rank, world size nor batch shape changes what is drawn.
        Every rank calls it, with no prompts where it has none; parameters are gathered once for the call. A prompt that
        leaves no room within `max_length` is completed by nothing.
        """

    def begin(
        self, role: Role, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, world: World
    ) -> Callable[[], list[Completion]]:
        """Begins `generate` with the weights as they are now, and gives what waits for its end.

        An engine that generates elsewhere lets training go on meanwhile; here it is done at once. Both are called on
        every rank. Where more is begun in between (an evaluation), what is under way is ended first, before weights
        change, and its completions are kept for who waits for them. What waits may raise Preempted, and is then asked
        again.
        """
        done = self.generate(role, prompts, keys, sampling, world)
        return lambda: done

    def connect(self, store: dist.Store, rank: int, names: Sequence[str]) -> Any:
        """What becomes `World.aside`, on every rank, before anything is built; only where there are `ranks`.

        It is closed (`close()`) when this rank's part of the run is over, however it ended.

        store: in which all ranks find each other. rank: this one's number among all. names: of all, for messages.
        """
        raise self._stays()

    def serve(self, role: Role, world: World) -> None:
        """Generates for the ranks that train until they are done; on each of the last `ranks` ranks.

        role: the policy, whole on this rank alone, as the run began. world: a single process', with its `aside`.
        """
        raise self._stays()

    def _stays(self) -> UserError:
        what = f"{type(self).__name__} does not generate on ranks of its own"
        return UserError.of(what, "set rollout.ranks=0, or choose another rollout engine")

    def close(self) -> None:
        """Lets go of what lies elsewhere; at the run's end, on every rank. Raises PeerLost where it is gone."""
        return
