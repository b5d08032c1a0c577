"""By what it is noticed that an adapter's files were changed."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(*files: Path) -> str:
    """SHA-256 of the files' contents, which are small enough to be read whole; empty of none."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest() if files else ""
