"""The reward that the guide shows is one."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loomtune.contracts import Answer

GUIDE = Path(__file__).parents[3] / "docs" / "plugins.md"


def test_the_reward_that_the_guide_shows_scores_answers(
    run: Any, answered: Callable[..., list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "class Words(" in block)
    module = ModuleType("shown")
    monkeypatch.setitem(sys.modules, "shown", module)
    shown: dict[str, Any] = vars(module)
    exec(code, shown)
    words = shown["Words"](shown["WordsSettings"](weight=0.5))
    *scores, unasked = words.score(run, [*answered(["a b", "b", ""], words="a b"), *answered(["a"])])
    assert scores == [1.0, 0.5, 0.0] and math.isnan(unasked) and words.weight == 0.5
