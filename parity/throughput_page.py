"""The page of ``parity.throughput``: bars of step times, and where the time of a step goes."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from parity import flops, throughput_tables
from parity.page import STYLE
from parity.plots import JAX, LEFT, RIGHT, ROW, TORCH, WIDTH, _line, _svg, _text
from parity.throughput_tables import ALL, NAMES

COLOURS = {"jax": JAX, "torch": TORCH}
SHOWN = 25  # kernels of a track
BAR, GAP = 22, 8  # pixels: height of a bar; space between groups of them
NOTE = """Times from the arrival of one step's results to that of the next one's, always of one
batch, each step started while the one before it runs, as in training; alone_ms is a step that
nothing runs before. The line in a bar spans the 10th to the 90th percentile. The utilisation (mfu)
is the share of the maker's bfloat16 rate that the model's matrix products would take; recomputed
ones do not count. Everything below is about the step with the most recycling passes."""
MODULES = """Each module by itself, times the calls of a step: strong the forward passes, pale the
backward pass, both of a step; the black line is the roofline. It is the least time for reading
inputs and parameters once and writing results once, or for the matrix products, at the bandwidth
and the rate that this GPU reaches. The rest of a step: dropout masks, casts of parameters, copies
of what is kept for the backward pass, gaps."""
Row = Mapping[str, Any]


def render(rows: Sequence[Row], operations: Mapping[str, float]) -> str:
    """The whole page; ``operations`` of a pass, by module."""
    columns = throughput_tables.COLUMNS
    cells = [[throughput_tables.shown(row.get(name)) for name in columns] for row in rows]
    parts = [
        "<h1>Speed of both tracks</h1>",
        f'<p class="note">{escape(NOTE)}</p>',
        "<h2>Step time by number of recycling passes</h2>",
        step_times(rows),
        _table(columns, cells),
        *_modules([row for row in _last_of_tracks(rows) if row.get("modules")]),
        *(part for row in rows if "kernels" in row for part in _profile(row)),
        *("<h2>Operations of one pass</h2>", *_operations(operations)),
        *("<h2>Versions and hardware</h2>", *map(_environment, _last_of_tracks(rows))),
    ]
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


def _modules(rows: Sequence[Row]) -> list[str]:
    """Both tracks' modules side by side, and a table of each."""
    if not rows:
        return []
    parts = [
        "<h2>Time by module</h2>",
        f'<p class="note">{escape(MODULES)}</p>',
        _module_bars(rows),
    ]
    for row in rows:
        ceilings = row.get("ceilings")
        words = f"{NAMES[row['track']]}, {row['recycling']} recycling passes"
        if ceilings:
            words += (
                f"; {ceilings['name']} copies {ceilings['bandwidth'] / 1e12:.2f} TB/s and "
                f"multiplies at {ceilings['rate'] / 1e12:.0f} TFLOP/s in bfloat16"
            )
        parts += [f"<p>{escape(words)}</p>"]
        parts.append(_named(throughput_tables.MODULE_COLUMNS, throughput_tables.module_cells(row)))
        parts += [f'<p class="failed">{escape(x)}</p>' for x in throughput_tables.failures(row)]
    return parts


def _module_bars(rows: Sequence[Row]) -> str:
    lines = [(row["track"], line) for row in rows for line in throughput_tables.in_step(row)]
    lines = [(track, line) for track, line in lines if line["both_ms"] and line["module"] != ALL]
    scale = (WIDTH - LEFT - RIGHT - 60) / max((line["both_ms"] for _, line in lines), default=1.0)
    parts, y = [], 4.0
    for name in dict.fromkeys(line["module"] for _, line in lines):
        parts.append(_text(LEFT - 8, y + ROW - 4, name, "end"))
        for track, line in lines:
            if line["module"] == name:
                parts += _module_bar(y, line, COLOURS[track], scale)
                y += ROW
        y += GAP / 2
    return _svg(WIDTH, y, parts)


def _module_bar(y: float, line: Row, colour: str, scale: float) -> list[str]:
    both, least = line["both_ms"], line["roofline_ms"]
    parts = [_bar(y, both * scale, colour, ROW - 4, 0.35)]
    if line["forward_ms"]:
        parts.append(_bar(y, line["forward_ms"] * scale, colour, ROW - 4))
    if least:
        at = LEFT + least * scale
        parts.append(_line(at, y - 1, at, y + ROW - 3, "#000", 2))
    return [*parts, _text(LEFT + both * scale + 6, y + ROW - 5, f"{both:.1f} ms")]


def _profile(row: Row) -> list[str]:
    """Gaps, kinds of kernels, and the slowest of them."""
    return [
        f"<h2>{NAMES[row['track']]}: kernels of a step</h2>",
        f"<p>{escape(throughput_tables.gaps(row))}</p>",
        f"<p>{escape(throughput_tables.waits(row))}</p>",
        _named(throughput_tables.KIND_COLUMNS, throughput_tables.kind_cells(row)),
        _kernel_bars(row),
        "<p>Beside each bar: the kernel's time, and how often it runs.</p>",
    ]


def _kernel_bars(row: Row) -> str:
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
    return _svg(WIDTH, ROW * len(kernels) + 4, parts)


def _operations(operations: Mapping[str, float]) -> list[str]:
    total = sum(operations.values())
    cells = [
        [name, f"{count / 1e9:,.0f}", f"{count / total:.1%}"] for name, count in operations.items()
    ]
    words = (
        f"{total / 1e12:.2f} TFLOP; a step counts three of them, and one for each pass more. "
        f"Rates are stated for {', '.join(flops.PEAKS)}."
    )
    return [f"<p>{words}</p>", _named(("module", "GFLOP", "share"), cells)]


def _last_of_tracks(rows: Sequence[Row]) -> list[Row]:
    """Of each track the row with the most passes."""
    ordered = sorted(rows, key=lambda row: row["recycling"])
    return list({row["track"]: row for row in ordered}.values())


def _environment(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    overrides = " ".join(row["overrides"])
    return f"<p>{NAMES[row['track']]}: {escape(row['device'])}; {versions}; {escape(overrides)}</p>"


def _named(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table whose first column alone is flush left; the style says so of the first two."""
    first, *others = columns
    return _table((first, "", *others), [(name, "", *numbers) for name, *numbers in cells])


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = ("".join(f"<td>{escape(text)}</td>" for text in line) for line in cells)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"


def _short(name: str) -> str:
    """Enough of a kernel's name to know it."""
    name = (
        name.removeprefix("void ")
        .replace("at::native::", "")
        .replace("(anonymous namespace)::", "")
    )
    return name if len(name) <= 34 else f"{name[:33]}…"


def _bar(y: float, length: float, colour: str, height: float, opacity: float = 0.75) -> str:
    size = f'width="{max(length, 0.5):.1f}" height="{height}"'
    return f'<rect x="{LEFT}" y="{y:.1f}" {size} fill="{colour}" fill-opacity="{opacity}"/>'
