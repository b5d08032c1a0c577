"""The ranks of a world as a grid. No torch: checked before any process exists."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.errors import UserError


@dataclass(frozen=True, slots=True)
class Grid:
    """Ranks numbered `(replicate, shard, sequence, tensor)`, the last varying fastest: neighbours share a node.

    Ranks that differ only in `sequence` or `tensor` get the same rows.
    """

    replicate: int
    shard: int
    sequence: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, world_size: int, *, replicate: int = 1, sequence: int = 1, tensor: int = 1) -> Grid:
        """The grid of a world; `shard` is what remains. Raises UserError naming the nearest number that divides it."""
        asked = {"tensor": tensor, "sequence": sequence, "replicate": replicate}
        left = world_size
        for name, value in asked.items():
            if value < 1 or left % value:
                raise _undivided(world_size, asked, name, left)
            left //= value
        return cls(replicate, left, sequence, tensor)

    @property
    def sharing(self) -> int:
        """Ranks that get the same rows."""
        return self.sequence * self.tensor

    def replica(self, rank: int) -> tuple[int, int]:
        """(index, how many) among those that get different rows; see `Sharding.replicas`."""
        return rank // self.sharing, self.replicate * self.shard

    def place(self, rank: int) -> tuple[int, int, int, int]:
        """(replicate, shard, sequence, tensor) of a rank, each counted from 0."""
        rest, tensor = divmod(rank, self.tensor)
        rest, sequence = divmod(rest, self.sequence)
        replicate, shard = divmod(rest, self.shard)
        return replicate, shard, sequence, tensor


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of a number that lies nearest to what was wanted; the smaller of two."""
    return min((n for n in range(1, max(number, 1) + 1) if number % n == 0), key=lambda n: abs(n - wanted))


def _undivided(world_size: int, asked: dict[str, int], name: str, left: int) -> UserError:
    set_ones = [f"sharding.{key}={value}" for key, value in asked.items() if value != 1]
    together = 1
    for value in asked.values():
        together *= max(value, 1)
    return UserError.of(
        f"{world_size} processes cannot be divided by {' x '.join(set_ones)}",
        f"set sharding.{name}={nearest_divisor(left, asked[name])}, or launch a multiple of {together} processes",
    )
