"""The parts of a page of a report: sections, tables, a grid of figures, and the style sheet they share."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from ._version import __version__
from .disk import write_atomic


class Html(str):
    """Text that is markup already; everything else is escaped."""


def bar(value: float, form: str, drawn: bool) -> str:
    """The number in this format; drawn: over a bar as long as its share of 1."""
    number = form.format(value)
    return Html(f'<span class="bar" style="--w:{100 * value:.0f}%">{number}</span>') if drawn else number


def table(rows: list[list[str]]) -> str:
    def cell(tag, value):
        return f"<{tag}>{value if isinstance(value, Html) else escape(str(value))}</{tag}>"

    head = "".join(cell("th", value) for value in rows[0])
    body = "".join(f"<tr>{cell('th', r[0])}{''.join(cell('td', v) for v in r[1:])}</tr>" for r in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def grid(figures: Iterable[str]) -> str:
    drawn = "".join(figures)
    return f'<div class="figures">{drawn}</div>' if drawn else ""


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def write_page(path: Path, title: str, body: Iterable[str]) -> Path:
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{POLICY}<title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{''.join(body)}<footer>rlhf_fast {__version__}</footer></body></html>\n"
    )
    write_atomic(path, page)
    return path


# Nothing is loaded and no script runs, whatever a page quotes. The bars and charts have style attributes.
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'\">"
)


STYLE = """
:root { color-scheme: light; --ink: #1c1f23; --soft: #667; --rule: #e3e5e8; --tint: #dbe9f4; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 70rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Hiragino Sans", "Noto Sans CJK JP",
  "Yu Gothic", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
h4 { margin: 0; font-size: .8rem; font-weight: 600; color: var(--soft); }
p { margin: 0 0 .75rem; max-width: 44rem; }
.lead { font-size: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 500; }
thead th { color: var(--soft); font-size: .8rem; }
th:first-child { text-align: left; white-space: normal; }
.bar { display: inline-block; min-width: 4rem; padding: 0 .3rem;
  background: linear-gradient(to right, var(--tint) var(--w), transparent var(--w)); }
.heat td { padding: .35rem .5rem; min-width: 3rem; text-align: center; }
.heat thead th { vertical-align: bottom; } .heat .up { writing-mode: vertical-rl; transform: rotate(180deg); }
.verdict { padding: .6rem .9rem; border-left: 4px solid #007a55; background: #f3f8f6; }
.verdict.no { border-color: #b3420a; background: #fbf4f0; }
.scroll + .figures, .scroll + p, .figures + .scroll { margin-top: 1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
figcaption { font-size: .85rem; line-height: 1.4; margin-bottom: .25rem; }
figcaption b { font-weight: 600; margin-right: .4rem; }
.key { color: var(--soft); white-space: nowrap; margin-right: .6rem; }
.key i { display: inline-block; width: .9em; height: 3px; margin-right: .3em; vertical-align: middle; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); }
svg polyline { fill: none; stroke-linejoin: round; }
.axis { display: block; text-align: right; color: var(--soft); font-size: .72rem; line-height: 1; }
article { margin: 0 0 1.5rem; padding: .9rem 1rem; border: 1px solid var(--rule); border-radius: 6px; }
.prompt { font-weight: 500; overflow-wrap: anywhere; white-space: pre-wrap; }
.replies { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); gap: 1rem; }
.replies p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .15rem 0; max-height: 13em; overflow-y: auto; }
small { color: var(--soft); }
.ok { color: #007a55; } .bad { color: #b3420a; } .none { color: var(--soft); }
details { margin-top: 1.5rem; } summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 3rem; color: var(--soft); font-size: .8rem; }
"""
