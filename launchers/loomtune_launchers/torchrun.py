"""The one place where torchrun's command and the environment of a job are made."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from loomtune.contracts import JobSpec

SCRUBBED = ("TORCHELASTIC_", "PET_", "SLURM_", "MASTER_", "GROUP_", "ROLE_", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SCRUBBED_NAMES = ("RANK", "WORLD_SIZE")
"""What an outer launcher left in the environment, which torchrun or the ranks would take for theirs."""


def command(spec: JobSpec) -> tuple[str, ...]:
    """Starts the job's ranks on one machine. One process needs no rendezvous: it is started by itself."""
    worker = ("-m", spec.module, str(spec.run))
    if spec.procs == 1 and spec.nodes == (1, 1) and not spec.restarts:
        return (sys.executable, *worker)
    group = ("--standalone", f"--nproc-per-node={spec.procs}", f"--max-restarts={spec.restarts}")
    patience = (f"--shutdown-timeout={spec.grace}",)
    others = ",".join(f"{rank}:3" for rank in range(1, spec.procs))
    quiet = (f"--redirects={others}",) if others else ()
    return (
        sys.executable,
        "-m",
        "loomtune_launchers.agent",
        str(spec.run / "logs"),
        *group,
        *patience,
        *quiet,
        *worker,
    )


def environment(spec: JobSpec, outer: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the job: the outer one without what belongs to another job, and the spec's own."""
    kept = {
        name: value
        for name, value in (os.environ if outer is None else outer).items()
        if not name.startswith(SCRUBBED) and name not in SCRUBBED_NAMES
    }
    # torch 2.13: without this a replaced process cannot join again and restarts mostly fail.
    return {**kept, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **spec.environment}
