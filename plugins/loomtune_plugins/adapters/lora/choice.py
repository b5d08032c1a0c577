"""What a LoRA is to be: the settings, with what an adapter to go on with says, and defaults where both are silent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loomtune.errors import Fault, UserError, near
from loomtune_plugins.adapters.patterns import by_end
from loomtune_plugins.adapters.settings import LoraSettings
from loomtune_plugins.adapters.told import misset
from loomtune_plugins.adapters.wrapped.files import PeftFolder
from loomtune_plugins.adapters.wrapped.targets import ALL_LINEAR

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora")
UNHEARD = {"eva": "data", "corda": "data", "lora_ga": "gradients", "loftq": "a quantised base", "mica": "a frozen B"}
"""peft's other first values, and what they need."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings without gaps. ranks, alphas: peft's patterns, of layers that differ."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    init: str
    targets: list[str]
    modules: list[str]
    tokens: list[int | str]
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    @property
    def residual(self) -> bool:
        """True where first values are taken out of the base's weights."""
        return self.init.startswith(("pissa", "olora"))


def choose(settings: LoraSettings, file: PeftFolder | None) -> Choice:
    """Raises UserError for every setting that has no sense or contradicts the file."""
    said = _said(file) if file else {}
    faults = [
        _contradiction(key, typed, said[key])
        for key in ("rank", "alpha", "rslora", "dora", "modules", "tokens")
        if key in said and (typed := getattr(settings, key)) not in (None, []) and not _same(key, typed, said[key])
    ]
    faults += [
        Fault(f"adapter.{key} is for a new adapter, and adapter.path has one", f"leave adapter.{key} out")
        for key in ("init", "targets")
        if file and getattr(settings, key) is not None
    ]
    choice = Choice(**_defaults(settings, said))
    if faults := [*faults, *_faults(settings, choice)]:
        raise UserError(*faults)
    return choice


def check_said(key: str, typed: Sequence[Any], meant: Iterable[Any], said: Sequence[Any]) -> None:
    """Raises UserError where what was typed means, in the model, something else than the file has."""
    if set(meant) != set(said):
        raise UserError(_contradiction(key, typed, said))


def _same(key: str, typed: Any, said: Any) -> bool:
    """False where the two contradict each other in any model; what names mean is seen once there is one."""
    if key == "modules":
        return all(any(by_end(name, pattern) for name in said) for pattern in typed)
    if key == "tokens":
        return bool(said) and (any(isinstance(token, str) for token in typed) or set(typed) == set(said))
    return bool(typed == said)


def _contradiction(key: str, typed: Any, said: Any) -> Fault:
    what = f"adapter.{key}={_shown(typed)} contradicts adapter.path, whose adapter has {_shown(said)}"
    return Fault(what, f"leave adapter.{key} out, or adapter.path")


def _said(file: PeftFolder) -> dict[str, Any]:
    config = file.config
    return {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": config.get("use_rslora", False),
        "dora": config.get("use_dora", False),
        "targets": list(file.layers),
        "modules": file.modules,
        "tokens": file.tokens,
        "ranks": config.get("rank_pattern") or {},
        "alphas": config.get("alpha_pattern") or {},
    }


def _defaults(settings: LoraSettings, said: dict[str, Any]) -> dict[str, Any]:
    usual = {"rank": 16, "alpha": 32, "dropout": 0.0, "rslora": False, "dora": False, "init": "kaiming"}
    usual |= {"targets": [ALL_LINEAR]} | said
    typed = {key: getattr(settings, key) for key in (*usual, "modules", "tokens") if hasattr(settings, key)}
    return usual | {
        key: value for key, value in typed.items() if value is not None and (value != [] or key not in said)
    }


def _faults(settings: LoraSettings, choice: Choice) -> list[Fault]:
    faults = misset(
        choice,
        ("rank", choice.rank >= 1, "is no rank", "a whole number from 1 on"),
        ("alpha", choice.alpha > 0, "would add nothing", "a number above 0"),
        ("dropout", 0 <= choice.dropout < 1, "is no probability below 1", "0 or more, below 1"),
        ("targets", bool(choice.targets), "adapts nothing", f"[{ALL_LINEAR}] or layers"),
    )
    faults += misset(settings, ("plus_ratio", settings.plus_ratio > 0, "is no ratio", "a number above 0"))
    if choice.dora and settings.under:
        faults.append(
            Fault("adapter.dora=true scales whole rows, so it cannot stand on adapter.under", "set adapter.dora=false")
        )
    return [*faults, *_init_faults(choice)]


def _init_faults(choice: Choice) -> list[Fault]:
    init, there = choice.init, ", ".join(INITS)
    if init == "orthogonal" and choice.rank % 2:
        return [
            Fault(f"adapter.init=orthogonal needs an even rank, not {choice.rank}", "set adapter.rank to an even one")
        ]
    if init in INITS[:4] or init == "olora" or re.fullmatch(r"pissa_niter_[1-9]\d*", init):
        return []
    if needs := UNHEARD.get(init):
        return [
            Fault(f"adapter.init={init} needs {needs}, which nothing here gives it", f"set adapter.init to {there}")
        ]
    return [Fault(f"adapter.init={init} is not known.{near(init, INITS)}", f"set adapter.init to {there}")]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
