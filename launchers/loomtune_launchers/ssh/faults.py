"""Why a host cannot take part, each with its cure: what ssh or the shell said, or what the hello says."""

from __future__ import annotations

import importlib.metadata
import shlex
from typing import Any

from loomtune.errors import Fault
from loomtune_launchers.ssh.link import Link

_OF_SSH = (
    ("host key verification failed", "accept its key: connect once by hand, or add it with ssh-keyscan"),
    (
        "permission denied",
        "let your key in there, or name another: launcher.options=[-i,KEY]; no password is asked for",
    ),
    ("could not resolve", "correct its name, or give it one in ~/.ssh/config"),
)
"""What ssh says, in small letters, and what mends it."""


def unreached(link: Link, command: tuple[str, ...], seconds: float) -> Fault:
    """Why no hello came. command: that was run for the host."""
    said, host, code = "; ".join(list(link.tail)[-3:]), link.host.written, link.code
    python = shlex.split(command[-1])[1]
    by_hand = shlex.join([*command[:-1], "true"])
    if code is None:
        return Fault(f"{host}: no answer in {seconds:g} s", f"try by hand: {by_hand}")
    if code == 255:
        cure = next((cure for sign, cure in _OF_SSH if sign in said.lower()), f"try by hand: {by_hand}")
        return Fault(f"{host}: ssh cannot connect: {said}", cure)
    if "No module named" in said:
        return Fault(f"{host}: loomtune is not installed in {python} there: {said}", _install())
    if code in (126, 127):
        return Fault(f"{host}: there is no Python at {python}: {said}", "set launcher.python= to the hosts' Python")
    return Fault(f"{host}: {python} ended with exit code {code}: {said}", f"try by hand: {shlex.join(command)}")


def unfit(link: Link, hello: dict[str, Any], order: dict[str, Any]) -> list[Fault]:
    """What of a hello forbids that the host takes part."""
    host, ours = link.host.written, importlib.metadata.version("loomtune")
    if hello["loomtune"] != ours:
        said = f"{host} has loomtune {hello['loomtune']}, here is {ours}"
        return [Fault(said, _install())]
    faults = []
    if hello["attempt"] != order["attempt"]:
        faults.append(Fault(f"{host} does not see {order['run']}", "set run.dir= to a folder that all hosts share"))
    if not hello["folder"]:
        faults.append(Fault(f"{host} has no folder {order['folder']}", "set launcher.folder= to one that it has"))
    if not hello["resolves"]:
        cure = "set launcher.address= to a name or address of the first host that all of them know"
        faults.append(Fault(f"{host} does not know the name {order['address']}", cure))
    return faults


def together(links: list[Link], hellos: list[dict[str, Any]], order: dict[str, Any]) -> list[Fault]:
    """What of all hellos forbids the start."""
    faults = [fault for link, hello in zip(links, hellos, strict=True) for fault in unfit(link, hello, order)]
    if not hellos[0]["port"]:
        said = f"port {order['port']} of {links[0].host.written} is taken"
        faults.append(Fault(said, "set launcher.port=0, or another"))
    versions = {hello["torch"].partition("+")[0] for hello in hellos}  # behind the +: for which device it was built
    if len(versions) > 1:
        said = ", ".join(f"{link.host.written} {hello['torch']}" for link, hello in zip(links, hellos, strict=True))
        faults.append(Fault(f"the hosts have different versions of torch: {said}", "install the same one on all"))
    return faults


def _install() -> str:
    version = importlib.metadata.version("loomtune")
    return f"install loomtune=={version} there, or set launcher.python= to a Python that has it"
