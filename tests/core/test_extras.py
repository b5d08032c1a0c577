"""What an extra lacks is known from what is installed, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loomtune.extras import lacking

Installed = Callable[..., None]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Makes distributions that ask for others, and hold no code at all."""

    def make(name: str, version: str = "1.0", *lines: str) -> None:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*head, *lines]) + "\n")

    monkeypatch.syspath_prepend(tmp_path)
    lacking.cache_clear()
    return make


def asks(text: str, extra: str = "fast", also: str = "") -> str:
    return f"Requires-Dist: {text}; extra == '{extra}'{also}"


def test_what_is_not_installed_is_named_with_the_version_asked_for(installed: Installed) -> None:
    own = ["Requires-Dist: acme-never", "Requires-Dist: acme-nor; python_version > '3'"]  # of no extra
    installed("acme-loom", "1.0", *own, asks("acme-warp>=2"), asks("acme-weft"))
    assert lacking("acme-loom", "fast") == (
        "acme-warp>=2, which is not installed",
        "acme-weft, which is not installed",
    )


def test_what_is_installed_is_not_lacking_though_it_cannot_be_imported(installed: Installed) -> None:
    installed("acme-loom", "1.0", asks("acme-warp>=2"))
    installed("acme-warp", "2.1rc1")
    assert lacking("acme-loom", "fast") == ()


def test_another_version_is_lacking_and_both_are_told(installed: Installed) -> None:
    installed("acme-loom", "1.0", asks("acme-warp>=2"))
    installed("acme-warp", "1.9")
    assert lacking("acme-loom", "fast") == ("acme-warp>=2 (1.9 is installed)",)


def test_what_another_platform_needs_is_not_lacking(installed: Installed) -> None:
    installed("acme-loom", "1.0", asks("acme-warp", also=" and sys_platform == 'vms'"))
    assert lacking("acme-loom", "fast") == ()


def test_an_extra_may_name_others(installed: Installed) -> None:
    installed("acme-loom", "1.0", asks("acme-loom[fast]", "all"), asks("acme-warp"))
    assert lacking("acme-loom", "all") == ("acme-warp, which is not installed",)


@pytest.mark.parametrize("asked", [("acme-loom", ""), ("acme-loom", "slow"), ("acme-nowhere", "fast")])
def test_nothing_is_said_of_no_extra_or_an_unknown_one(asked: tuple[str, str], installed: Installed) -> None:
    installed("acme-loom", "1.0", asks("acme-warp"))
    assert lacking(*asked) == ()
