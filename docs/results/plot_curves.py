"""Draw the loss terms of a run and its scores on held-out chains as one SVG picture.

python docs/results/plot_curves.py RUN [RUN ...] --out PICTURE.svg [--mark STEP]

A RUN is a run folder or its metrics.jsonl; others, up to four in all, are drawn over the first.
A dashed line marks STEP, for example where the run was interrupted and resumed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT, COLUMNS = 280, 190, 4  # of a panel, in pixels; panels in a row
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 28, 28  # margins of the axes in a panel
LEGEND = 18  # pixels, for each run
# of training batches and of held-out chains: of a run alone, or of several
ALONE = (("#9aa7b8", "#c2410c"),)
OVERLAID = (
    ("#9fbce8", "#1d4f9e"),
    ("#f0a679", "#a83208"),
    ("#8fcfa5", "#1b7a3d"),
    ("#c3a5dd", "#6a2c9e"),
)
SCORES = {"eval/lddt_ca": "lDDT-Ca", "eval/gdt_ts": "GDT-TS", "eval/drmsd": "dRMSD (angstrom)"}
Points = list[tuple[int, float]]
Rows = list[dict[str, float]]


class Curve(NamedTuple):
    """Values of one run in one panel."""

    points: Points
    color: str
    width: float
    dots: bool = False


class Run(NamedTuple):
    """What a run logged, and how it is drawn: below another, a run has wider lines."""

    name: str
    rows: Rows
    colors: tuple[str, str]
    width: float

    def curves(self, training: str, held_out: str) -> list[Curve]:
        """These two values of the log."""
        colors, width = self.colors, self.width
        return [
            Curve(self.points(training), colors[0], width),
            Curve(self.points(held_out), colors[1], width, dots=True),
        ]

    def points(self, name: str) -> Points:
        """(step, value) of the rows that have this value."""
        return [(int(row["step"]), row[name]) for row in self.rows if name in row]


def read(paths: Sequence[str]) -> list[Run]:
    """The runs, as they are drawn together."""
    colors = ALONE if len(paths) == 1 else OVERLAID
    runs = []
    for i, path in enumerate(map(Path, paths)):
        file = path / "metrics.jsonl" if path.is_dir() else path
        rows = [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()]
        name = path.name if path.is_dir() else path.stem
        runs.append(Run(name, rows, colors[i], 3.0 if i < len(paths) - 1 else 1.5))
    return runs


def text(x: float, y: float, words: str, anchor: str = "start", color: str = "#333") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{color}">{words}</text>'


def line(at: list[tuple[float, float]], color: str, width: float = 1.5, extra: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    stroke = f'stroke="{color}" stroke-width="{width}" {extra}'
    return f'<polyline points="{path}" fill="none" {stroke}/>'


def panel(title: str, curves: list[Curve], last: int, mark: int) -> str:
    """One value over the steps, drawn with its corner at the origin."""
    values = [value for curve in curves for _, value in curve.points]
    low, high = min(values), max(values)
    low, high = (low, high) if high > low else (low - 1, high + 1)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def place(found: Points) -> list[tuple[float, float]]:
        across, up = (right - LEFT) / last, (bottom - TOP) / (high - low)
        return [(LEFT + step * across, bottom - (value - low) * up) for step, value in found]

    parts = [text(LEFT, TOP - 8, title), text(LEFT - 4, TOP + 8, f"{high:.3g}", "end")]
    parts += [text(LEFT - 4, bottom, f"{low:.3g}", "end"), text(LEFT, bottom + 14, "0")]
    parts.append(text(right, bottom + 14, f"step {last}", "end"))
    parts.append(line([(LEFT, TOP), (LEFT, bottom), (right, bottom)], "#333"))
    if mark:
        x = place([(mark, low)])[0][0]
        parts.append(line([(x, TOP), (x, bottom)], "#333", extra='stroke-dasharray="3 3"'))
    for points, color, width, dots in curves:
        parts.append(line(place(points), color, width))
        for x, y in place(points) if dots else []:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 1}" fill="{color}"/>')
    return "\n".join(parts)


def legend(runs: list[Run]) -> list[str]:
    """What the colours mean, one line a run."""
    parts = []
    for i, run in enumerate(runs):
        y, prefix = 16 + i * LEGEND, f"{run.name}: " if len(runs) > 1 else ""
        parts.append(text(LEFT, y, f"{prefix}training batches", color=run.colors[0]))
        words = f"{prefix}held-out chains, averaged weights"
        parts.append(text(LEFT + WIDTH, y, words, color=run.colors[1]))
    return parts


def picture(runs: list[Run], mark: int) -> str:
    """All panels: the losses in the order of their names, then the scores."""
    rows = [row for run in runs for row in run.rows]
    losses = sorted({name for row in rows for name in row if name.startswith("loss/")})
    named = [(name, name, f"eval/{name}") for name in losses]
    named += [(title, "", name) for name, title in SCORES.items()]
    panels = []
    for title, training, held_out in named:
        curves = [curve for run in runs for curve in run.curves(training, held_out)]
        if any(curve.points for curve in curves):
            panels.append((title, curves))
    last, top = max(int(row["step"]) for row in rows), 6 + LEGEND * len(runs)
    width, height = COLUMNS * WIDTH, -(-len(panels) // COLUMNS) * HEIGHT + top
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        *legend(runs),
    ]
    for i, (title, curves) in enumerate(panels):
        x, y = i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT + top
        parts += [f'<g transform="translate({x} {y})">', panel(title, curves, last, mark), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def main(argv: Sequence[str]) -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or its metrics.jsonl")
    parser.add_argument("--out", required=True, metavar="PICTURE.svg")
    parser.add_argument("--mark", type=int, default=0, metavar="STEP")
    options = parser.parse_args(argv)
    if len(options.runs) > len(OVERLAID):
        parser.error(f"at most {len(OVERLAID)} runs fit into one picture")
    Path(options.out).write_text(picture(read(options.runs), options.mark), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
