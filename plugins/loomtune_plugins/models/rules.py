"""What the settings of a model make doubtful beside other choices, said before any process exists. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

from loomtune import hookimpl
from loomtune.offers import Trait
from loomtune.plan import Finding, Plan

ROWS = ("tokens", "modules")
"""Settings by which an adapter trains rows of the embedding, or all of it, beside what it adds."""
HEAD = "lm_head"


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    """Warns of new tokens whose rows nothing trains: an adapter that can be switched off leaves the base as it is."""
    model, adapter = (next(iter(plan.choices(axis).values()), {}) for axis in ("model", "adapter"))
    frozen = provided.get(Trait.ADAPTER_OFF)
    if not model.get("new_tokens") or frozen is None:
        return []
    return list(_untrained(model, adapter, frozen))


def _untrained(model: Mapping[str, Any], adapter: Mapping[str, Any], frozen: str) -> Iterator[Finding]:
    if not any(adapter.get(key) for key in ROWS):
        named = ", ".join(f'"{token}"' for token in model["new_tokens"])
        cure = f"set 'adapter.tokens=[{named}]'" if "tokens" in adapter else "set adapter=full"
        what = f"{frozen} does not train the rows of model.new_tokens, and a token that is new means nothing untrained"
        yield Finding(what, cure, fatal=False)
    elif not any(fnmatchcase(HEAD, name) for name in adapter.get("modules") or ()) and _has_rows_of_its_own(model):
        # The mean of rows never has the largest product with anything.
        what = f"{frozen} does not train the head, whose rows of model.new_tokens are means, so it never writes them"
        yield Finding(what, "set adapter.modules=[lm_head], unless they are only read", fatal=False)


def _has_rows_of_its_own(settings: Mapping[str, Any]) -> bool:
    """Whether the head is not tied to the embedding; False where nobody can say it yet, as of drawn weights."""
    if "shape" in settings:
        return False
    from loomtune_plugins.models.huggingface import HuggingFace
    from loomtune_plugins.models.settings import HuggingFaceSettings

    known = {field.name for field in fields(HuggingFaceSettings)} & settings.keys()
    model = HuggingFace(HuggingFaceSettings(**{name: settings[name] for name in known}))
    return model.at_hand() and not model.tied()
