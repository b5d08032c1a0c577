"""Seeds of everything that is drawn."""

from __future__ import annotations

import hashlib


def derive(*parts: object) -> int:
    """A seed from parts such as (seed, "dropout", layer): 63 bits, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
