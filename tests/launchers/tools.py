"""Small stand-ins for an engine's command line: each call is written down, and answered from a folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

SCRIPT = """#!{python} -S
import json, pathlib, sys
folder, words = pathlib.Path({folder!r}), sys.argv[1:]
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
for answer in json.loads((folder / "answers.json").read_text()):
    if all(word in words for word in answer["words"]):
        print(answer["says"])
        sys.exit(answer["code"])
"""


class Tool:
    """One of them, on PATH."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.answers: list[dict[str, object]] = []
        (self.folder / "answers.json").write_text("[]")
        (self.folder / "bin").mkdir()
        program = self.folder / "bin" / name
        program.write_text(SCRIPT.format(python=sys.executable, folder=str(self.folder)))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def answer(self, *words: str, says: str = "", code: int = 0) -> None:
        """What is said to a call with all these words; the last one that fits counts."""
        self.answers.insert(0, {"words": words, "says": says, "code": code})
        (self.folder / "answers.json").write_text(json.dumps(self.answers))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
