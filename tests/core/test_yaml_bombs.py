"""YAML whose aliases would grow to more than any memory holds is refused before it is expanded."""

import subprocess
import sys
from pathlib import Path

LAUGHS = "\n".join(
    ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
)

PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
from loomtune.compose import compose
from loomtune.errors import UserError
from loomtune.plan import Plan

text = compose([]).dump()
taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (taken + (500 << 20),) * 2)
signal.alarm(10)
folder = Path(sys.argv[1])
bomb = (folder / "recipe" / "bomb.yaml").read_text()
for refused in (
    lambda: compose(["recipe=bomb"], config_dirs=(folder,)),
    lambda: Plan.parse(bomb),
    lambda: Plan.parse(text.replace("settings:", bomb + "\\nsettings: &s", 1)),
):
    try:
        refused()
    except UserError as error:
        print(str(error).splitlines()[0])
"""


def test_aliases_in_a_config_of_the_users_own_and_in_run_yaml_are_not_expanded(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "bomb.yaml").write_text(LAUGHS)
    program = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    config, *runs = done.stdout.splitlines()
    assert "uses YAML aliases" in config
    assert len(runs) == 2 and all("run.yaml cannot be read" in run and "uses aliases" in run for run in runs)
