"""The plots of the report, as SVG."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

COLOURS = {"float64": "#1f4e9c", "float32": "#c0571a", "bfloat16": "#2c7a4b"}
LEFT, RIGHT, TOP, ROW = 270, 20, 44, 17  # pixels
WIDTH, HEIGHT, GAP, AXIS = 900, 260, 50, 70
JAX, TORCH = "#1f4e9c", "#e08214"
SMALLEST = 1e-17  # errors below this are drawn here
Scale = Callable[[float], float]


def errors(cases: Sequence[dict[str, Any]]) -> str:
    """A row for each case; a dot for JAX and a ring for PyTorch in every precision."""
    names = list(dict.fromkeys(case["name"] for case in cases))
    drawn = [case for case in cases if case["difference"] is not None]
    largest = max((value for case in drawn for value in _values(case)), default=1.0)
    low, high = math.log10(SMALLEST), math.ceil(math.log10(max(largest, 1e-3)))

    def x(value: float) -> float:
        share = (math.log10(max(value, SMALLEST)) - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    bottom = TOP + ROW * len(names)
    parts = [_legend(), *_decades(x, int(low), high, bottom)]
    for index, name in enumerate(names):
        y = TOP + ROW * (index + 0.5)
        parts.append(_text(LEFT - 8, y + 4, name, "end"))
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "#eee"))
        for case in drawn:
            if case["name"] == name:
                parts += _marks(case, x, y)
    return _svg(WIDTH, bottom + 34, parts)


def _values(case: dict[str, Any]) -> tuple[float, float]:
    """Of JAX and PyTorch; where there is nothing to be off, their difference."""
    difference = case["difference"]
    found = (case["error_jax"], case["error_torch"])
    jax, torch = (difference if value is None else value for value in found)
    return min(jax, 1e3), min(torch, 1e3)


def _marks(case: dict[str, Any], x: Scale, y: float) -> list[str]:
    jax, torch = _values(case)
    colour = COLOURS[case["dtype"]] if case["passed"] else "#d00"
    title = f"<title>{escape(case['name'])}, {case['dtype']}: {jax:.2g}, {torch:.2g}</title>"
    dot = f'<circle cx="{x(jax):.1f}" cy="{y}" r="3.2" fill="{colour}">{title}</circle>'
    outline = f'fill="none" stroke="{colour}" stroke-width="1.6"'
    ring = f'<circle cx="{x(torch):.1f}" cy="{y}" r="5" {outline}>{title}</circle>'
    return [dot, ring]


def _legend() -> str:
    parts, at = [_text(LEFT, 14, "error relative to the array: dot JAX, ring PyTorch")], LEFT
    for dtype, colour in COLOURS.items():
        parts.append(f'<circle cx="{at + 5}" cy="28" r="4" fill="{colour}"/>')
        parts.append(_text(at + 14, 32, dtype))
        at += 90
    return "".join(parts)


def _decades(x: Scale, low: int, high: int, bottom: float) -> list[str]:
    parts = []
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(_line(at, TOP, at, bottom, "#ddd" if power % 3 else "#bbb"))
        if power % 3 == 0:
            parts.append(_text(at, bottom + 16, f"1e{power}", "middle"))
    return parts


# Training runs ------------------------------------------------------------------------------------


def curves(name: str, run: dict[str, Any]) -> str:
    """Above, the loss of both tracks; below, their distance and the drift of equal runs."""
    bottom = TOP + HEIGHT + GAP + HEIGHT // 2
    steps = len(run["jax"])
    ends = [
        _text(AXIS, bottom + 18, "step 1"),
        _text(WIDTH - RIGHT, bottom + 18, f"{steps}", "end"),
    ]
    return _svg(WIDTH, bottom + 30, [*_losses(name, run), *_distances(run), *ends])


def _losses(name: str, run: dict[str, Any]) -> list[str]:
    jax, torch, drift = run["jax"], run["torch"], run["drift"]
    x, right = _steps(len(jax)), WIDTH - RIGHT
    finite = [value for value in (*jax, *torch) if math.isfinite(value)] or [0.0, 1.0]
    y = _between(min(finite), max(finite), TOP + HEIGHT, TOP)
    places = list(enumerate(zip(jax, drift, strict=True)))
    band = [(x(i), y(loss + d)) for i, (loss, d) in places]
    band += [(x(i), y(loss - d)) for i, (loss, d) in reversed(places)]
    return [
        _text(AXIS, 16, f"{name}: loss by step"),
        *_axis(y, min(finite), max(finite)),
        f'<polygon points="{_points(band)}" fill="#c9d7ee"/>',
        _path([(x(i), y(v)) for i, v in enumerate(jax)], JAX, 2.4),
        _path([(x(i), y(v)) for i, v in enumerate(torch)], TORCH, 1.2),
        _line(right - 175, 12, right - 155, 12, JAX, 2.4),
        _text(right - 150, 16, "JAX"),
        _line(right - 115, 12, right - 95, 12, TORCH, 1.2),
        _text(right - 90, 16, "PyTorch"),
    ]


def _distances(run: dict[str, Any]) -> list[str]:
    drift, top = run["drift"], TOP + HEIGHT + GAP
    apart = [abs(a - b) for a, b in zip(run["jax"], run["torch"], strict=True)]
    positive = [v for v in (*apart, *drift) if 0 < v < math.inf] or [1e-9, 1.0]
    low = math.floor(math.log10(min(positive)))
    high = max(math.ceil(math.log10(max(positive))), low + 1)
    x, scale = _steps(len(apart)), _between(low, high, top + HEIGHT // 2, top)

    def y(value: float) -> float:
        return scale(math.log10(min(max(value, 10.0**low), 10.0**high)))

    title = "distance of the tracks (line), drift of equal runs (dashed)"
    parts = [_text(AXIS, top - 10, title)]
    for power in (low, high):
        parts.append(_text(AXIS - 6, scale(power) + 4, f"1e{power}", "end"))
        parts.append(_line(AXIS, scale(power), WIDTH - RIGHT, scale(power), "#ddd"))
    parts.append(_path([(x(i), y(v)) for i, v in enumerate(apart)], "#b3261e", 1.4))
    parts.append(_path([(x(i), y(v)) for i, v in enumerate(drift)], "#555", 1.2, dashed=True))
    return parts


def _steps(count: int) -> Scale:
    return _between(0, max(count - 1, 1), AXIS, WIDTH - RIGHT)


def _between(low: float, high: float, start: float, end: float) -> Scale:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _axis(scale: Scale, low: float, high: float) -> list[str]:
    parts = []
    for value in (low, (low + high) / 2, high):
        parts.append(_line(AXIS, scale(value), WIDTH - RIGHT, scale(value), "#ddd"))
        parts.append(_text(AXIS - 6, scale(value) + 4, f"{value:.4g}", "end"))
    return parts


# Elements -----------------------------------------------------------------------------------------


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    return f'<svg viewBox="0 0 {width} {height:.0f}" width="{width}" role="img">\n{inside}\n</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points if math.isfinite(y))


def _path(
    points: Sequence[tuple[float, float]], colour: str, width: float, dashed: bool = False
) -> str:
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    stroke = f'stroke="{colour}" stroke-width="{width}"{dash}'
    return f'<polyline points="{_points(points)}" fill="none" {stroke}/>'
