"""Where memory is taken, said aloud for a rehearsal: all its tensors are of one device, those in host memory too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

HOSTED: ContextVar[bool] = ContextVar("HOSTED", default=False)
"""Whether what is allocated now lies in host memory, where the run has an accelerator."""


@contextmanager
def on_host(hosted: bool = True) -> Iterator[None]:
    """Within it memory is taken of the host, or not."""
    token = HOSTED.set(hosted)
    try:
        yield
    finally:
        HOSTED.reset(token)
