"""What is foreseen, for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loomtune_plugins.page import duration

Said = Mapping[str, Any]
"""What `described` made."""

CONVENTIONS = (
    ("mfu", "parameters that a token meets, causal attention"),
    ("mfu_palm", "all parameters, whole attention"),
    ("hfu", "as computed"),
)
"""Of counting operations: `loomtune_plugins.planner.flops` has them in full."""


def show(said: Said, console: Console | None = None) -> None:
    """Prints all of it."""
    out = console or _console()
    for line in _head(said):
        out.print(Text(line))
    out.print(_memory(said))
    out.print(_arithmetic(said["arithmetic"]))
    out.print(_figures(said))
    out.print(_wire(said))
    for title, lines in (
        ("Assumed", (said["time"] or {}).get("assumptions", ())),
        ("Noted", said["notes"]),
        ("Not known", said["unknown"]),
    ):
        for line in lines:
            out.print(Text(f"{title.lower()}: {line}", style="dim"))
    for one in said["findings"]:
        out.print(Text(f"{'fault' if one['fatal'] else 'warning'}: {one['what']}\n    cure: {one['cure']}"))


def show_search(found: Said, console: Console | None = None) -> None:
    """Prints what a search found."""
    out = console or _console()
    for group in found["groups"]:
        out.print(_ranked(group, found))
        counts = [f"{group['tried']} of {group['candidates']} configurations tried"]
        counts += [f"{group['cannot_fit']} need more than one that does not fit"] if group["cannot_fit"] else []
        counts += [f"{group['cannot_be_better']} cannot be better"] if group["cannot_be_better"] else []
        counts += [f"{group['left_out']} left out for want of time"] if group["left_out"] else []
        out.print(Text("; ".join(counts), style="dim"))
        for reason, count in group["refused"].items():
            out.print(Text(f"refused ({count}): {reason}", style="dim"))
    for name, least in found["fewest"].items():
        said = name.replace("_", " ")
        if least is None:
            out.print(Text(f"fewest ranks {said}: none was found"))
            continue
        out.print(Text(f"fewest ranks {said}: {least['processes']}, with {' '.join(least['set']) or 'what is set'}"))
        out.print(_arithmetic(least["arithmetic"], ""))
    for line in found["notes"]:
        out.print(Text(f"noted: {line}", style="dim"))


def _ranked(group: Said, found: Said) -> Table:
    maths = ", ".join(f"{key}={value}" for key, value in group["maths"].items())
    title = f"{maths} on {found['hardware']}, {found['capacity_bytes'] / 2**30:.1f} GiB; best {found['by']} first"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("ranks", "GiB", "step s", "tokens/s", "USD a step"):
        table.add_column(name, justify="right")
    table.add_column("set", overflow="fold")
    for row in group["ranked"]:
        spans = [(row[key] and span(row[key])) or "" for key in ("step_seconds", "tokens_per_second", "usd_per_step")]
        table.add_row(str(row["processes"]), gib(row["peak_bytes"]), *spans, " ".join(row["set"]) or "as it is")
    if not group["ranked"]:
        table.add_row("", "", "", "", "", "nothing fits")
    return table


def _console() -> Console:
    """Wide enough for every column where nobody watches."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=160)


def _head(said: Said) -> Iterator[str]:
    world, model, hardware = said["world"], said["model"], said["hardware"]
    on = hardware["title"] or hardware["kind"] if hardware else "hardware that is not named"
    shape = f" (planned by model={model['shape']})" if model["shape"] else ""
    trained = model["trained_parameters"]
    nodes = f", {world['processes_per_node']} on each of {world['nodes']} nodes" if world["nodes"] > 1 else ""
    yield (
        f"{world['processes']} process{'es' * (world['processes'] > 1)}{nodes}, on {on}; "
        f"{model['parameters']:,} parameters{shape}, {trained:,} trained"
    )
    memory = said["memory"]
    room = f"a rank peaks at {gib(memory['peak_bytes'])} GiB, in {memory['peak_moment']}"
    if said["fits"] is None:
        yield f"{room}; whether that fits, time and cost: name hardware=<kind>, such as hardware=h100_80gb"
    else:
        yield f"fits: {'yes' if said['fits'] else 'no'}; {room}, of {gib(memory['capacity_bytes'])} GiB"


def _memory(said: Said) -> Table:
    """Moments down, causes across, GiB."""
    memory = said["memory"]
    causes = sorted({cause for one in memory["moments"].values() for cause, n in one["causes_bytes"].items() if n})
    table = Table(title="Memory of a rank (GiB)", title_justify="left", box=None, pad_edge=False)
    table.add_column("moment")
    for cause in (*causes, "all"):
        table.add_column(cause, justify="right")
    for name, one in memory["moments"].items():
        cells = [gib(one["causes_bytes"].get(cause, 0)) for cause in causes]
        style = "bold" if name == memory["peak_moment"] else ""
        table.add_row(name, *cells, gib(one["bytes"]), style=style)
    return table


def _figures(said: Said) -> Table:
    table = Table(title="A step, and the run", title_justify="left", box=None, pad_edge=False, show_header=False)
    for name, value in figures(said).items():
        table.add_row(name, value)
    return table


def figures(said: Said) -> dict[str, str]:
    """Name to value of what is known."""
    time, cost, saved, memory = said["time"], said["cost"], said["checkpoint"], said["memory"]
    found = {"tokens a step": f"{said['step']['tokens']:,.0f}, in {said['step']['micro_batches']} micro-batches a rank"}
    for name, key in CONVENTIONS:
        used = said["compute"][name]
        share = f", {used[0]:.1%} to {used[1]:.1%} of its peak" if used else ""
        found[f"{name} ({key})"] = f"{said['compute'][f'{name}_flops_per_step']:.4g} operations of a rank{share}"
    if time:
        found["time of a step"] = f"{span(time['step_seconds'])} s"
        for name in ("cause", "phase"):
            parts = time[f"{name}s_seconds"].items()
            found[f"by {name}, s"] = ", ".join(f"{part} {span(seconds)}" for part, seconds in parts)
        found["tokens/s, all ranks"] = span(time["tokens_per_second"])
        if time["total_seconds"]:
            low, high = (duration(one) for one in time["total_seconds"])
            found["the run"] = f"{time['steps']} steps in {low} to {high}"
    if cost:
        said_cost = [f"{span(cost['device_hours'])} device hours"]
        said_cost += [f"{span(cost['usd'])} USD"] if cost["usd"] else []
        said_cost += [f"{span(cost['energy_kwh'])} kWh"] if cost["energy_kwh"] else []
        found["cost"] = ", ".join(said_cost)
    took = f", saved in {span(saved['save_seconds'])} s" if saved["save_seconds"] else ""
    found["checkpoint"] = f"{saved['bytes'] / 1e9:,.1f} GB{took}; the run's folder {saved['disk_bytes'] / 1e9:,.1f} GB"
    of = memory["host_capacity_bytes_per_node"]
    found["host memory of a node"] = f"{gib(memory['host_bytes_per_node'])} GiB{f' of {gib(of)}' if of else ''}"
    return found


def _arithmetic(lines: Sequence[Said], title: str = "How the peak comes about (GiB)") -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    for line in lines:
        table.add_row(line["what"], gib(line["bytes"]), line["reasoning"])
    return table


def _wire(said: Said) -> Table:
    sent = said["communication"]
    table = Table(title="Sent by a rank in a step (GB)", title_justify="left", box=None, pad_edge=False)
    for name in ("collective", "phase"):
        table.add_column(name)
    for name in ("count", "inside nodes", "between nodes"):
        table.add_column(name, justify="right")
    for one in sent["by"]:
        inside, between = one["sent_bytes_inside_node"] / 1e9, one["sent_bytes_between_nodes"] / 1e9
        count = f"{one['collectives_per_step']:,.0f}"
        table.add_row(one["operation"], one["phase"], count, f"{inside:,.3f}", f"{between:,.3f}")
    inside, between = sent["sent_bytes_inside_node_per_step"], sent["sent_bytes_between_nodes_per_step"]
    table.add_row("all", "", f"{sent['collectives_per_step']:,.0f}", f"{inside / 1e9:,.3f}", f"{between / 1e9:,.3f}")
    return table


def gib(count: float) -> str:
    """With one digit; small ones with three."""
    value = count / 2**30
    if not count:
        return "0"
    return f"{value:,.1f}" if abs(value) >= 0.95 else f"{value:.3f}"


def span(low_high: Sequence[float]) -> str:
    """`low to high`, one number where they are one."""
    low, high = map(four, low_high)
    return low if low == high else f"{low} to {high}"


def four(number: float) -> str:
    """With four digits; those of large ones written out."""
    return f"{float(f'{number:.4g}'):,.0f}" if abs(number) >= 1000 else f"{number:.4g}"
