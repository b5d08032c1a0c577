"""The parts of reports and comparisons, as text. Whatever comes from a run is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root { color-scheme: light; --ink: #1d2433; --soft: #667085; --line: #e6e8ee; --paper: #fff; --ground: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; margin: 0; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 40px 0 12px; font-weight: 600; }
header { display: flex; gap: 14px; align-items: center; flex-wrap: wrap; }
.status { padding: 2px 12px; border-radius: 99px; font-size: 13px; font-weight: 600; }
.failed { background: #fdecec; color: #a12622; }
.completed, .stopped { background: #e5f5ec; color: #146c3c; }
.unfinished, .preempted { background: #fdf3dc; color: #855b08; }
.error { background: #fdecec; color: #7c1d1a; padding: 12px 16px; border-radius: 10px; white-space: pre-wrap; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 24px; }
.facts div, figure, table { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; }
.facts div { padding: 14px 18px; }
.facts b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: 13px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px; }
figure { margin: 0; padding: 14px 16px 8px; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; overflow-wrap: anywhere; }
figure svg { width: 100%; height: auto; display: block; }
summary { font-size: 17px; font-weight: 600; margin: 40px 0 12px; cursor: pointer; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 13px; }
th { padding: 6px 16px; text-align: left; color: var(--soft); font-weight: 600; }
td { padding: 6px 16px; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
tr:first-child td { border-top: 0; }
td:first-child { color: var(--soft); width: 40%; }
td:last-child { font-family: ui-monospace, monospace; }
.grid td, .grid td:first-child { width: auto; color: var(--ink); white-space: pre-wrap; font: 12px ui-monospace; }
"""


def document(title: str, *parts: str) -> str:
    """A whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def heading(name: str, status: str, error: object) -> str:
    """The run's name and how it ended. error: what `result.json` says of it; nothing where there was none."""
    said = f'<p class="error">{escape(str(error))}</p>' if error else ""
    label = escape(status)
    return f'<header><h1>{escape(name)}</h1><span class="status {label}">{label}</span></header>{said}'


def facts(known: Mapping[str, str]) -> str:
    """A row of numbers with what they are."""
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for what, value in known.items())
    return f'<section class="facts">{cells}</section>'


def figures(title: str, drawn: Sequence[tuple[str, str]]) -> str:
    """A section of charts. drawn: (caption, svg) pairs; without any, nothing."""
    if not drawn:
        return ""
    cells = "".join(f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in drawn)
    return f'<section><h2>{escape(title)}</h2><div class="figures">{cells}</div></section>'


def table(title: str, rows: Mapping[str, str], *, folded: bool) -> str:
    """A section with two columns; without rows, nothing."""
    if not rows:
        return ""
    cells = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in rows.items())
    head = "<details>" if folded else "<details open>"
    return f"{head}<summary>{escape(title)}</summary><table>{cells}</table></details>"


def grid(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, folded: bool = True) -> str:
    """A section with a table of texts, whose lines' ends stay; without rows, nothing."""
    if not rows:
        return ""
    names = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f'<table class="grid"><tr>{names}</tr>{cells}</table>'
    head = "<details>" if folded else "<details open>"
    return f"{head}<summary>{escape(title)}</summary>{table}</details>"


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s` or `4.2 s`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02.0f} s" if minutes else f"{rest:.1f} s"
