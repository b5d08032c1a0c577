"""Checkpoints: safetensors and JSON, written without stopping, committed by one rename, readable under any layout."""

from loomtune.checkpoint.folder import best, latest, mark_best, name_of, step_of, validate
from loomtune.checkpoint.manifest import Manifest
from loomtune.checkpoint.reader import Reader
from loomtune.checkpoint.saver import Saver
from loomtune.checkpoint.snapshot import Servable

__all__ = ["Manifest", "Reader", "Saver", "Servable", "best", "latest", "mark_best", "name_of", "step_of", "validate"]
