"""The adapter without its base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loomtune.contracts import Exporter, Trained
from loomtune.contracts.saved import HEADS, HEADS_FILE
from loomtune_plugins.exporters.settings import AdapterSettings

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from loomtune.contracts.exporter import Opener


class AdapterAlone(Exporter):
    """What `PeftModel.from_pretrained` opens on the base, and servers such as vLLM load beside it."""

    def __init__(self, settings: AdapterSettings) -> None:
        self.check = settings.check

    def export(self, trained: Trained, folder: Path) -> None:
        """The adapter's files name the base; tokenizer and chat template are those that it was trained with."""
        from safetensors.torch import save_file

        added: dict[str, Tensor] = dict(trained.added())
        heads = {name: added.pop(name).contiguous() for name in list(added) if name.startswith(HEADS)}
        trained.adapter.save(folder, iter(added.items()), trained.model.origin)
        if heads:
            save_file(heads, folder / HEADS_FILE, metadata={"format": "pt"})
        trained.model.tokenizer().save(folder)

    def reopened(self, trained: Trained, folder: Path) -> Opener:
        """As the adapter says that its files are opened."""
        return lambda module: trained.adapter.reopen(module, folder)
