"""Bad records, counted; the first of them are told one by one."""

from __future__ import annotations

from loomtune.errors import UserError
from loomtune_plugins.data.values import RecordError

SHOWN = 5
"""How many faults are told one by one."""


class Faults:
    """Counts bad records and remembers the first of them."""

    def __init__(self, cure: str) -> None:
        self.count, self._shown, self._cures = 0, list[str](), {cure: True}

    def add(self, where: str, error: RecordError) -> None:
        self.count += 1
        self._cures |= {error.cure: True} if error.cure else {}
        if len(self._shown) < SHOWN:
            self._shown.append(f"{where}: {error}")

    def tell(self) -> None:
        """Raises UserError if there was any."""
        if self.count:
            rows = "1 row" if self.count == 1 else f"{self.count} rows"
            more = f"\n  and {self.count - SHOWN} more" if self.count > SHOWN else ""
            listed = "".join(f"\n  {what}" for what in self._shown)
            raise UserError.of(f"{rows} cannot be read:{listed}{more}", "; or ".join(self._cures))
