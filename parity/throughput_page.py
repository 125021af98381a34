"""The page of ``parity.throughput``: bars of step times, and where the time of a step goes."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from parity import flops
from parity.page import STYLE
from parity.plots import JAX, LEFT, RIGHT, ROW, TORCH, WIDTH, _line, _svg, _text

COLOURS = {"jax": JAX, "torch": TORCH}
NAMES = {"jax": "JAX", "torch": "PyTorch"}
SHOWN = 25  # kernels of a track
BAR, GAP = 22, 8  # pixels: height of a bar; space between groups of them
NOTE = """Times from the start of a step to the arrival of its results, always of one batch. The
line in a bar spans the 10th to the 90th percentile. The utilisation (mfu) is the share of the
maker's bfloat16 rate that the model's matrix products would take; recomputed ones do not count.
Kernels are those of one step with the most recycling passes."""
Row = Mapping[str, Any]


def render(rows: Sequence[Row], columns: Sequence[str], operations: Mapping[str, float]) -> str:
    """The whole page; ``operations`` of a pass, by module."""
    parts = [
        "<h1>Speed of both tracks</h1>",
        f'<p class="note">{escape(NOTE)}</p>',
        "<h2>Step time by number of recycling passes</h2>",
        step_times(rows),
        _table(columns, [[_text_of(row.get(name)) for name in columns] for row in rows]),
    ]
    for row in rows:
        if "kernels" in row:
            parts += [f"<h2>{NAMES[row['track']]}: kernels of a step</h2>", *_kernels(row)]
    parts += ["<h2>Operations of one pass</h2>", *_operations(operations)]
    parts += ["<h2>Versions and hardware</h2>", *map(_environment, _one_a_track(rows))]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = "<title>Speed of both tracks</title>"
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang=en><head>{head}{title}<style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def step_times(rows: Sequence[Row]) -> str:
    """A bar for each track and number of passes."""
    passes = sorted({row["recycling"] for row in rows})
    scale = (WIDTH - LEFT - RIGHT - 60) / max(row["step_ms_p90"] for row in rows)
    parts, y = [], 4.0
    for recycling in passes:
        for row in (row for row in rows if row["recycling"] == recycling):
            middle, end = y + BAR / 2, LEFT + row["step_ms"] * scale
            ends = (LEFT + row[f"step_ms_p{share}"] * scale for share in (10, 90))
            label = f"{NAMES[row['track']]}, {recycling} recycling passes"
            parts += [
                _text(LEFT - 8, middle + 4, label, "end"),
                _bar(y, row["step_ms"] * scale, COLOURS[row["track"]], BAR - 4),
                _line(next(ends), middle - 2, next(ends), middle - 2, "#000", 2),
                _text(end + 8, middle + 2, f"{row['step_ms']:.1f} ms"),
            ]
            y += BAR
        y += GAP
    return _svg(WIDTH, y, parts)


def _kernels(row: Row) -> list[str]:
    """The slowest kernels, and what the device does the rest of the time."""
    kernels = row["kernels"][:SHOWN]
    scale = (WIDTH - LEFT - RIGHT - 90) / max((k["ms"] for k in kernels), default=1.0)
    parts = []
    for index, kernel in enumerate(kernels):
        y, length = ROW * index, kernel["ms"] * scale
        words = f"{kernel['ms']:.2f} ms, {kernel['calls']}"
        parts += [
            _text(LEFT - 8, y + ROW - 4, _short(kernel["name"]), "end"),
            _bar(y, length, COLOURS[row["track"]], ROW - 4),
            _text(LEFT + length + 6, y + ROW - 4, words),
        ]
    idle = row["step_ms"] - row["busy_ms"]
    words = (
        f"{row['launches']:,} kernels take {row['busy_ms']:.1f} of {row['step_ms']:.1f} ms; "
        f"{idle:.1f} ms ({idle / row['step_ms']:.1%}) lie between them. Beside each bar: its time, "
        "and how often it runs."
    )
    return [f"<p>{words}</p>", _svg(WIDTH, ROW * len(kernels) + 4, parts)]


def _operations(operations: Mapping[str, float]) -> list[str]:
    total = sum(operations.values())
    cells = [
        [name, "", f"{count / 1e9:,.0f}", f"{count / total:.1%}"]
        for name, count in operations.items()
    ]
    words = (
        f"{total / 1e12:.2f} TFLOP; a step counts three of them, and one for each pass more. "
        f"Rates are stated for {', '.join(flops.PEAKS)}."
    )
    return [f"<p>{words}</p>", _table(("module", "", "GFLOP", "share"), cells)]


def _one_a_track(rows: Sequence[Row]) -> list[Row]:
    return list({row["track"]: row for row in rows}.values())


def _environment(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    overrides = " ".join(row["overrides"])
    return f"<p>{NAMES[row['track']]}: {escape(row['device'])}; {versions}; {escape(overrides)}</p>"


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = ("".join(f"<td>{escape(text)}</td>" for text in line) for line in cells)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"


def _text_of(value: Any) -> str:
    return "-" if value is None else str(value)


def _short(name: str) -> str:
    """Enough of a kernel's name to know it."""
    name = (
        name.removeprefix("void ")
        .replace("at::native::", "")
        .replace("(anonymous namespace)::", "")
    )
    return name if len(name) <= 34 else f"{name[:33]}…"


def _bar(y: float, length: float, colour: str, height: float) -> str:
    size = f'width="{max(length, 0.5):.1f}" height="{height}"'
    return f'<rect x="{LEFT}" y="{y:.1f}" {size} fill="{colour}" fill-opacity="0.75"/>'
