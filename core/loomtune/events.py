"""The events of one run, on a plugin manager of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from pluggy import PluginManager

from loomtune import hookspecs


class Events:
    """Tells every observer, in the same order on every rank; one that fails is named once and told no more.

    pluggy alone would let one raising observer silence those after it. Here each is called by itself.
    """

    def __init__(self, plugins: Iterable[tuple[str, object]]) -> None:
        self.manager = PluginManager("loomtune")
        self.manager.add_hookspecs(hookspecs)
        for name, plugin in plugins:
            self.manager.register(plugin, name=name)
        self.broken: dict[str, str] = {}

    def tell(self, event: str, **arguments: Any) -> None:
        """Calls an event hook of every observer, in the order of registration."""
        # pluggy keeps the last registered last in this list and would call it first; observers hear in plugin order.
        for implementation in getattr(self.manager.hook, event).get_hookimpls():
            name = implementation.plugin_name
            if name in self.broken:
                continue
            try:
                implementation.function(*(arguments[argument] for argument in implementation.argnames))
            except Exception as error:
                self.broken[name] = f"{type(error).__name__}: {error}"
                print(f"loomtune: {name} failed in {event} and is left out from here on: {error}", file=sys.stderr)  # noqa: T201

    def ask(self, question: str, **arguments: Any) -> Any:
        """Calls a `firstresult` hook: the first answer that is not None; third parties are asked before built-ins."""
        return getattr(self.manager.hook, question)(**arguments)
