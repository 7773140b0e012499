"""Charts as inline SVG: text in the reader's own fonts, sharp at any size, a few kB each, no dependency."""

import math
from dataclasses import dataclass
from html import escape

# Okabe and Ito (2008): colours that colour-blind readers can tell apart, and that differ in lightness in print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT = 340, 200  # px; the width of a phone's column
LEFT, RIGHT, TOP, BOTTOM = 60, 15, 10, 26  # room for 100000.3 on the left, and for half of 4000 on the right
STRONG = ' stroke-width="1.7"'
DENSE = ' stroke-width="1.1" stroke-opacity="0.7"'  # a noisy line must not hide one with fewer points
MAX_POINTS = 240  # about what the plot's pixels can show; with more points neighbours are averaged


@dataclass(frozen=True)
class Series:
    """One line of a chart: its name and its points (x, y). Points with a y that is not finite are left out."""

    label: str
    points: list[tuple[float, float]]


def points_of(log: list[dict], metric: str) -> list[tuple[float, float]]:
    """(step, value) of each log line with a number under this name."""
    return [(row["step"], row[metric]) for row in log if "step" in row and isinstance(row.get(metric), int | float)]


def bar_chart(title: str, bars: list[tuple[float, float, float]], *, x_label: str) -> str:
    """A <figure> with bars (left, right, height), as in a histogram, and a line at x = 0 if the bars span it."""
    x0, x1 = min(left for left, _, _ in bars), max(right for _, right, _ in bars)
    ticks = nice_ticks(0, max(height for _, _, height in bars) or 1, 4)

    def across(x: float) -> float:
        return round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    def up(y: float) -> float:
        return round(HEIGHT - BOTTOM - y / ticks[-1] * (HEIGHT - TOP - BOTTOM), 1)

    parts = [_level(up(tick), short(tick)) for tick in ticks]
    for left, right, height in bars:
        width = max(across(right) - across(left) - 1, 1)
        size = f'width="{width:.1f}" height="{up(0) - up(height):.1f}"'
        parts.append(f'<rect x="{across(left)}" y="{up(height)}" {size} fill="{COLOURS[0]}"/>')
    parts += [_below(across(tick), HEIGHT, short(tick)) for tick in nice_ticks(x0, x1, 5) if x0 <= tick <= x1]
    if x0 < 0 < x1:
        parts.append(f'<line x1="{across(0)}" x2="{across(0)}" y1="{TOP}" y2="{up(0)}" stroke="#1c1f23"/>')
    return _figure(title, [], _svg(title, HEIGHT, parts), x_label)


def _svg(title: str, height: int, parts: list[str]) -> str:
    box = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}"'
    return f"<svg {box}>{''.join(parts)}</svg>"


def _level(y: float, label: str) -> str:
    """A horizontal line of the grid, with its label on the left."""
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
    return f'{line}<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>'


def _below(x: float, height: int, label: str) -> str:
    """A label of the horizontal axis."""
    return f'<text x="{x}" y="{height - BOTTOM + 15}" text-anchor="middle">{label}</text>'


def _figure(title: str, series: list[Series], drawing: str, x_label: str) -> str:
    keys = "".join(
        f'<span class="key"><i style="background:{colour}"></i>{escape(s.label)}</span>'
        for s, colour in zip(series, COLOURS * len(series), strict=False)
    )
    caption = f"<figcaption><b>{escape(title)}</b> {keys}</figcaption>"
    return f'<figure>{caption}{drawing}<small class="axis">{escape(x_label)}</small></figure>'


def line_chart(
    title: str, series: list[Series], *, percent: bool = False, x_range: tuple[float, float] | None = None,
    x_label: str = "step",
) -> str:  # fmt: skip
    """A <figure> with the lines on common axes; "" if no point is finite.

    percent: y goes from 0 to 100 %, provided that all points are in this range. (A user's own metric may have the name
    of a share without being one.)
    x_range: at least this range of x is shown.
    """
    series = [Series(s.label, [p for p in s.points if math.isfinite(p[1])]) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs = [*(x for s in series for x, _ in s.points), *(x_range or ())]
    series = [Series(s.label, _thinned(s.points)) for s in series]
    percent = percent and all(0 <= y <= 1 for s in series for _, y in s.points)
    ys = [0.0, 1.0] if percent else [y for s in series for _, y in s.points]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs), 5), nice_ticks(min(ys), max(ys), 4)
    if any(tick % 1 for tick in x_ticks) and all(x % 1 == 0 for x in xs):  # there is no half step
        x_ticks = [tick for tick in x_ticks if tick % 1 == 0]
    x0, x1 = min(xs), max(max(xs), min(xs) + 1e-9)
    y0, y1 = min([*ys, y_ticks[0]]), max([*ys, y_ticks[-1]])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        up = (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    labels = [f"{tick:.0%}" for tick in y_ticks] if percent else _labels(y_ticks)
    parts = [_level(place(x0, tick)[1], label) for tick, label in zip(y_ticks, labels, strict=True)]
    parts += [_below(place(tick, y0)[0], HEIGHT, short(tick)) for tick in x_ticks if x0 <= tick <= x1]
    for s, colour in zip(series, COLOURS * len(series), strict=False):
        placed = [place(x, y) for x, y in s.points]
        path = " ".join(f"{x},{y}" for x, y in placed)
        few = len(placed) <= 24
        parts.append(f'<polyline points="{path}" stroke="{colour}"{STRONG if few else DENSE}/>')
        if few:  # dots mark the measured points
            parts += [f'<circle cx="{x}" cy="{y}" r="2.4" fill="{colour}"/>' for x, y in placed]
    return _figure(title, series, _svg(title, HEIGHT, parts), x_label)


def interval_chart(title: str, rows: list[tuple[str, float, float, float]]) -> str:
    """A <figure> with a dot and its interval for each row (label, share, low, high), on a common axis in percent, and a
    vertical line at one half. "" if there are no rows."""
    if not rows:
        return ""
    left, line = 128, 22
    height = TOP + line * len(rows) + BOTTOM
    values = [0.5, *(x for _, *numbers in rows for x in numbers)]
    ticks = nice_ticks(min(values), max(values), 4)
    x0, x1 = ticks[0], ticks[-1]

    def across(x: float) -> float:
        return round(left + (x - x0) / (x1 - x0) * (WIDTH - left - RIGHT - 8), 1)

    parts = []
    for tick in ticks:
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(_below(x, height, f"{tick:.0%}"))
    x = across(0.5)
    parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{height - BOTTOM}" stroke="{COLOURS[1]}"/>')
    for i, (label, share, low, high) in enumerate(rows):
        y = TOP + line * (i + 0.5)
        parts.append(f'<text x="{left - 8}" y="{y + 3.5}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<line x1="{across(low)}" x2="{across(high)}" y1="{y}" y2="{y}" stroke="{COLOURS[0]}"{STRONG}/>')
        parts.append(f'<circle cx="{across(share)}" cy="{y}" r="3.2" fill="{COLOURS[0]}"/>')
    return f"<figure><figcaption><b>{escape(title)}</b></figcaption>{_svg(title, height, parts)}</figure>"


def heat_table(labels: list[str], matrix: list[list[float | None]]) -> str:
    """A table of numbers from -1 to 1: blue above 0, orange below, stronger away from 0. None is an empty cell."""
    head = "".join(f'<th><span class="up">{escape(label)}</span></th>' for label in labels)
    body = []
    for label, row in zip(labels, matrix, strict=True):
        cells = []
        for x in row:
            rgb = "0 114 178" if (x or 0) >= 0 else "213 94 0"
            style = "" if x is None else f' style="background:rgb({rgb} / {min(abs(x), 1) * 0.55:.2f})"'
            cells.append(f"<td{style}>{'' if x is None else f'{x:.2f}'}</td>")
        body.append(f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>")
    table = f'<table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """About `about` round numbers that enclose [low, high]; their distance is 1, 2 or 5 times a power of ten."""
    if low == high == 0:  # mostly a count or a share that stays at 0, which is never below it
        high = 1.0
    elif high <= low:
        low, high = low - abs(low) * 0.1, high + abs(low) * 0.1
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _labels(ticks: list[float]) -> list[str]:
    """The labels of the ticks: short(), or more digits if two labels would be equal."""
    texts = [short(tick) for tick in ticks]
    return texts if len(set(texts)) == len(ticks) else [f"{tick:.7g}" for tick in ticks]


def short(value: float) -> str:
    """A number in a few characters: 12000 -> 12k, 0.00001 -> 1e-05, 0.25 -> 0.25."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if abs(value) < 0.001:
        return f"{value:.2g}"
    return f"{value:.4g}"


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
