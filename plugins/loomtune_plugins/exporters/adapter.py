"""The adapter without its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loomtune.contracts import Exporter, Trained
from loomtune.contracts.saved import HEADS, HEADS_FILE
from loomtune_plugins.exporters.settings import AdapterSettings

if TYPE_CHECKING:
    from torch import Tensor


class AdapterAlone(Exporter):
    """What `PeftModel.from_pretrained` opens on the base, and servers such as vLLM load beside it."""

    def __init__(self, settings: AdapterSettings) -> None:
        self._settings = settings

    def export(self, trained: Trained, folder: Path) -> None:
        """The adapter's files name the base; tokenizer and chat template are those that it was trained with."""
        from safetensors.torch import save_file

        added: dict[str, Tensor] = dict(trained.added())
        heads = {name: added.pop(name).contiguous() for name in list(added) if name.startswith(HEADS)}
        trained.adapter.save(folder, iter(added.items()), _found(trained.base))
        if heads:
            save_file(heads, folder / HEADS_FILE, metadata={"format": "pt"})
        trained.model.tokenizer().save(folder)


def _found(base: str) -> str:
    """A folder's whole path, which means the same wherever a server is started; an id stays what it is."""
    here = Path(base).expanduser()
    return str(here.absolute()) if here.is_dir() else base
