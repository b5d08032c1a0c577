"""Stand-ins for Slurm's commands, as a line of shell each."""

from __future__ import annotations

from pathlib import Path

import pytest


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Puts them, and nothing of ours, on PATH."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
