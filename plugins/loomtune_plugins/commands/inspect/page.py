"""The same as a page that stands by itself: no script, no link, for light and dark. Everything is escaped here."""

from __future__ import annotations

import html
from collections.abc import Sequence

from loomtune.plan import Finding
from loomtune_plugins.commands.inspect.rows import REJECTED, ShownLine, ShownPart, ShownRow, Stretch
from loomtune_plugins.commands.inspect.spelling import visible
from loomtune_plugins.commands.inspect.summary import Summary

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #667085; --line: #e6e8ee; --paper: #fff; --ground: #f6f7f9;
  --learned: #d7f2e1; --learned-ink: #0d4f2b; --sign: #4a5fc1; --end: #17804a; --end-ink: #fff;
  --not: #fbe0de; --not-ink: #7d1b16; --not-end: #b3362f; --bar: #4caf7d;
  --alarm: #fdf3dc; --alarm-ink: #6f4a05; --token: #98a2b3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ee; --soft: #98a2b3; --line: #2b3242; --paper: #181d29;
  --ground: #10141d; --learned: #153d29; --learned-ink: #b6f0cd; --sign: #9db0ff; --end: #3ecf83; --end-ink: #06210f;
  --not: #47201f; --not-ink: #ffc4bf; --not-end: #f0837b;
  --bar: #3c9a6a; --alarm: #3a2d0c; --alarm-ink: #f6d98b; --token: #5b6579; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; margin: 0; font-weight: 650; }
h2 { font-size: 17px; margin: 40px 0 12px; font-weight: 600; }
.under, .legend, .head span, .part { color: var(--soft); font-size: 13px; }
.facts, .row, .chart, .doubt { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 7px 20px;
  margin: 20px 0 14px; padding: 16px 20px; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.chart { padding: 14px 20px; }
.chart svg { width: 100%; height: auto; display: block; }
.chart text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.chart rect { fill: var(--bar); }
.doubt { background: var(--alarm); color: var(--alarm-ink); border-color: transparent;
  padding: 10px 16px; margin: 10px 0; }
.doubt small { display: block; opacity: .85; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin-bottom: 12px; }
.row { margin: 0 0 12px; overflow: hidden; }
.packed { border-left: 4px solid var(--bar); padding-left: 12px; margin: 0 0 20px; }
.head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 20px; padding: 9px 18px;
  border-bottom: 1px solid var(--line); font-weight: 600; font-size: 14px; overflow-wrap: anywhere; }
.head span { font-weight: 400; }
.part { padding: 10px 18px 0; }
.part b { color: var(--ink); font-weight: 600; }
pre { margin: 0; padding: 12px 18px 14px; font: 13.5px/1.7 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.learned, .end, .sign { border-radius: 3px; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.learned { background: var(--learned); color: var(--learned-ink); }
.sign { color: var(--sign); }
.end { background: var(--end); color: var(--end-ink); }
.rejected .learned { background: var(--not); color: var(--not-ink); }
.rejected .end { background: var(--not-end); }
.packed > .head { border: 0; padding: 0 4px 8px; }
.apart span { box-shadow: inset -1px 0 var(--token); }
"""


def page(lines: Sequence[ShownLine], summary: Summary, doubts: Sequence[Finding], learned: str, *, apart: bool) -> str:
    """A whole page. learned: what targets are. apart: show where tokens end, and their ids."""
    title = _told(summary.title)
    body = [
        f'<header><h1>{title}</h1><div class="under">{_told(summary.subtitle)}</div></header>',
        *(f'<div class="doubt">{_told(one.what)}<small>{_told(one.cure)}</small></div>' for one in doubts),
        _facts(summary),
        f'<div class="chart">{_chart(summary.histogram)}</div>',
        f"<h2>Rows</h2>{_legend(learned)}" if lines else "",
        *(_line(number, line, apart=apart) for number, line in enumerate(lines, start=1)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _told(text: str) -> str:
    """What is said of rows, in one line; their text has its signs already."""
    return html.escape(visible(text, lines=False))


def _facts(summary: Summary) -> str:
    told = "".join(f"<dt>{_told(name)}</dt><dd>{_told(said)}</dd>" for name, said in summary.facts)
    return f'<dl class="facts">{told}</dl>'


def _legend(learned: str) -> str:
    shown = (("given", "given"), ("learned", learned), ("sign", "special token"), ("end", "target that ends"))
    words = "".join(f'<span><span class="{kind}">{_told(word)}</span></span>' for kind, word in shown)
    return f'<div class="legend">{words}<span>⏎ new line</span><span>· blank at an edge</span></div>'


def _line(number: int, line: ShownLine, *, apart: bool) -> str:
    rows = "".join(_row(row, apart=apart) for row in line.rows)
    if len(line.rows) == 1:
        return rows
    head = f"Packed row {number}<span>{len(line.rows)} rows · {line.tokens:,} of {line.width:,} tokens</span>"
    return f'<section class="packed"><div class="head">{head}</div>{rows}</section>'


def _row(row: ShownRow, *, apart: bool) -> str:
    numbers = "".join(f" · {_told(name)}={value:g}" for name, value in row.numbers.items())
    said = f"{row.tokens:,} tokens · {row.learned:,} targets{numbers}"
    parts = "".join(_part(part, apart=apart) for part in row.parts)
    return f'<article class="row"><div class="head">{_told(row.origin)}<span>{said}</span></div>{parts}</article>'


def _part(part: ShownPart, *, apart: bool) -> str:
    told = f"{part.tokens:,} tokens · {part.learned:,} targets"
    head = f'<div class="part"><b>{_told(part.name)}</b> {told}</div>' if part.name else ""
    text = "".join(_stretch(stretch, apart=apart) for stretch in part.stretches)
    shown = " ".join([*(["apart"] if apart else []), *(["rejected"] if part.name == REJECTED else [])])
    return f'{head}<pre class="{shown}">{text}</pre>'


def _stretch(stretch: Stretch, *, apart: bool) -> str:
    title = f' title="{", ".join(map(str, stretch.tokens))}"' if apart else ""
    return f'<span class="{stretch.kind}"{title}>{html.escape(stretch.text)}</span>'


def _chart(histogram: Sequence[tuple[int, int, int]]) -> str:
    """Samples by length, as bars with their counts above and their lengths below."""
    if not histogram:
        return ""
    each, height = 72, 120
    most = max(count for *_, count in histogram) or 1
    drawn = []
    for at, (begin, end, count) in enumerate(histogram):
        tall = max(1.0, count / most * height) if count else 0.0
        left, middle, top = at * each + 6, at * each + each / 2, 18 + height - tall
        drawn.append(f'<rect x="{left}" y="{top:.1f}" width="{each - 12}" height="{tall:.1f}" rx="3"/>')
        drawn.append(f'<text x="{middle}" y="{top - 5:.1f}" text-anchor="middle">{count:,}</text>')
        drawn.append(f'<text x="{middle}" y="{height + 34}" text-anchor="middle">{begin:,}–{end:,}</text>')
    width = each * len(histogram)
    said = "<title>samples by their length in tokens</title>"
    return f'<svg viewBox="0 0 {width} {height + 42}" role="img">{said}{"".join(drawn)}</svg>'
