"""What a rank knows without asking another: versions, limits, processors, memory, network interfaces."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import platform
import resource
import socket
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from loomtune.catalogue import installed

DISTRIBUTIONS = (
    "loomtune", "transformers", "tokenizers", "safetensors", "peft", "datasets", "deepspeed", "bitsandbytes", "numpy",
    "hydra-core", "pluggy",
)  # fmt: skip

SOURCES = ("loomtune", "loomtune_plugins", "loomtune_launchers", "loomtune_conf")
"""Packages whose files are compared: two checkouts of one version may differ."""

SET = ("NCCL_", "GLOO_", "TORCH_", "OMP_NUM_THREADS")
"""What is compared of the environment."""

CONTROL_GROUP = Path("/sys/fs/cgroup")


def facts(local_rank: int, master: str = "") -> dict[str, Any]:
    """All of it. The files of loomtune are read by the first rank of a node alone."""
    return {
        "versions": versions(),
        "sources": sources() if local_rank == 0 else None,
        "environment": environment(),
        "limits": limits(),
        **cores(),
        "threads": torch.get_num_threads(),
        "memory": memory(),
        "interface": interface(master),
    }


def environment() -> dict[str, str]:
    """Variables that steer communication, but for files of the node's own."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(SET) and "_FILE" not in name}


def versions() -> dict[str, str]:
    """Name to version of everything that must be the same on all nodes; what is not there is left out."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            found[name] = distribution(name).version
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    catalogue = installed()
    found |= {f"plugin {name}": of for name, of in catalogue.versions().items()}
    return found | {f"broken plugin {name}": reason for name, reason in catalogue.broken.items()}


def sources() -> str:
    """A digest of loomtune's own files, as Python finds them."""
    digest = hashlib.sha256()
    for package in SOURCES:
        spec = find_spec(package)
        roots = list(spec.submodule_search_locations or ()) if spec else []
        for path in sorted(path for root in roots for path in Path(root).rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def limits() -> dict[str, int]:
    """Soft limits; -1 for none."""
    return {
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "infiniband": len(list(Path("/sys/class/infiniband").glob("*"))),
    }


def cores() -> dict[str, Any]:
    """Processors that this process may use: as bits of a hexadecimal number, and the control group's share of time."""
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found: dict[str, Any] = {"affinity": f"{sum(1 << core for core in here):x}", "quota": None}
    with suppress(OSError, ValueError):
        quota, period = (CONTROL_GROUP / "cpu.max").read_text().split()
        found["quota"] = int(quota) / int(period)
    return found


def memory() -> dict[str, int]:
    """Bytes of the node, or of the control group where that has fewer; and of swap in use."""
    there, swap = psutil.virtual_memory(), psutil.swap_memory()
    total, available = there.total, there.available
    with suppress(OSError, ValueError):
        bound = int((CONTROL_GROUP / "memory.max").read_text())
        used = int((CONTROL_GROUP / "memory.current").read_text())
        total, available = min(total, bound), min(available, bound - used)
    return {"total": total, "available": available, "swap": swap.used}


def interface(master: str) -> dict[str, Any]:
    """Interfaces: gloo's (GLOO_SOCKET_IFNAME, else that of the host name's address), and which reaches rank 0."""
    resolved, routed = _resolved(), _routed(master) if master else ""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    taken = named or _named_after(resolved) or _named_after(routed)
    speed = psutil.net_if_stats().get(taken)
    loops = bool(resolved) and ipaddress.ip_address(resolved).is_loopback
    return {
        "gloo": taken,
        "named": bool(named),
        "host resolves to": resolved,
        "loopback": loops,
        "towards rank 0": _named_after(routed),
        "megabits": speed.speed if speed else 0,
        "all": [name for name in psutil.net_if_addrs() if name != "lo"],
    }


def _resolved() -> str:
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return ""


def _routed(master: str) -> str:
    """Our address towards a host; connecting a datagram socket sends nothing."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((master, 9))
        return str(way.getsockname()[0])
    return ""


def _named_after(address: str) -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return str(name)
    return ""
