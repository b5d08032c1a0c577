"""loomtune: fine-tuning where every part is a plugin and the maths never depends on the machine."""

from importlib.metadata import PackageNotFoundError, version

from pluggy import HookimplMarker

hookimpl = HookimplMarker("loomtune")
"""Marks a function of a plugin as the implementation of the hook of the same name (see `loomtune.hookspecs`)."""

try:
    __version__ = version("loomtune")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__", "hookimpl"]
