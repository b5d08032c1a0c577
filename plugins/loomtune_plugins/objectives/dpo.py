"""Direct preference optimisation and its family: pairs of answers, compared with a frozen reference."""

from __future__ import annotations

from collections.abc import Mapping

from loomtune.contracts import RoleSpec
from loomtune_plugins.objectives.dpo_settings import DpoSettings
from loomtune_plugins.objectives.pairs import Pairwise


class Dpo(Pairwise):
    """Rafailov et al. 2023, "Direct Preference Optimization"; the loss is `sigmoid` where none is chosen."""

    refers = True

    def __init__(self, settings: DpoSettings) -> None:
        super().__init__(settings)

    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy, and what it began as."""
        return {"policy": RoleSpec(trained=True), "reference": RoleSpec(trained=False, twin_of="policy")}
