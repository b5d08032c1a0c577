"""Talking to a run's model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from loomtune import api
from loomtune.contracts import Sampling
from loomtune.run import Run
from loomtune.session import opened
from loomtune_plugins.commands.words import parser, read


def chat(words: Sequence[str]) -> int:
    """Reads a prompt a line from stdin, `\\n` in it standing for a new line, until the end of input."""
    asked = parser("chat", run=True, settings=False)
    asked.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    asked.add_argument("--max-tokens", type=int, default=128)
    options = read(asked, words)
    folder = Path(options.folder)
    with opened(api.resumed(folder, api.ALONE), folder) as run:
        stops = run.tokenizer.stops
        sampling = Sampling(max_tokens=options.max_tokens, temperature=options.temperature, stop=stops)
        if sys.stdin.isatty():
            print(f"{folder.name}, step {run.step}. A line is a prompt; Ctrl-D ends.")
        for line in sys.stdin:
            print(reply(run, line.rstrip("\n").replace("\\n", "\n"), sampling), flush=True)
    return 0


def reply(run: Run, prompt: str, sampling: Sampling) -> str:
    """The model's answer to a prompt in the form that the run was trained on."""
    (completion,) = run.generate([run.objective.prompt(_row(run, prompt), run.tokenizer)], sampling)
    return run.tokenizer.decode([token for token in completion if token not in sampling.stop])


def _row(run: Run, prompt: str) -> dict[str, object]:
    """A prompt as a row of the run's data, with an answer that only marks where the model's begins."""
    first = next(iter(run.data.rows("train")), {})
    if "messages" in first:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "."}]
        return {"messages": turns}
    return {"prompt": prompt, "completion": "."}
