"""Settings without what must not be published."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REMOVED = "(removed)"
_NAME = re.compile(r"key|token|secret|password", re.IGNORECASE)
_LEAST = 8
"""Shorter values of the environment (`1`, `true`) are no secrets, and would be found in everything."""


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same tree, with texts replaced whose key looks like a secret's or that hold one of the environment's secrets.

    Numbers stay: `max_tokens` is none.
    """
    secrets = tuple(value for name, value in os.environ.items() if _NAME.search(name) and len(value) >= _LEAST)
    return {key: _clean(key, value, secrets) for key, value in settings.items()}


def _clean(key: str, value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {inner: _clean(str(inner), entry, secrets) for inner, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(key, entry, secrets) for entry in value]
    if not isinstance(value, str) or not value:
        return value
    return REMOVED if _NAME.search(key) or any(secret in value for secret in secrets) else value
