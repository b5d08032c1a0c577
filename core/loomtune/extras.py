"""Which libraries an optional dependency group asks for and are not here, decided without importing any of them."""

from __future__ import annotations

from functools import cache
from importlib import metadata

from packaging.requirements import Requirement


@cache
def lacking(distribution: str, extra: str) -> tuple[str, ...]:
    """What is wrong with the libraries of `distribution[extra]`, one phrase for each: `x>=2, which is not installed`.

    Empty where all are here, where there is no extra, and where its distribution does not declare it.
    """
    try:
        asked = metadata.requires(distribution) if extra else None
    except metadata.PackageNotFoundError:
        return ()
    found: list[str] = []
    for requirement in map(Requirement, asked or ()):
        if _belongs(requirement, extra):
            found += [fault] if (fault := _fault(requirement)) else _nested(requirement)
    return tuple(found)


def _belongs(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _fault(requirement: Requirement) -> str:
    name = f"{requirement.name}{requirement.specifier}"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{name}, which is not installed"
    return "" if requirement.specifier.contains(version, prereleases=True) else f"{name} ({version} is installed)"


def _nested(requirement: Requirement) -> list[str]:
    """What the extras lack that an extra names in its turn, as in `all = ["acme[fast]"]`."""
    return [fault for extra in sorted(requirement.extras) for fault in lacking(requirement.name, extra)]
