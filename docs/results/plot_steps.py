"""Draw the history of docs/performance.md as bars: the mean step of each track, commit by commit.

python docs/results/plot_steps.py docs/performance.md --out docs/results/steps.svg
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from plot_curves import text

COLORS = {"JAX": "#1f4e9c", "torch": "#e08214"}
NAMES = {"JAX": "JAX", "torch": "PyTorch"}
# of others, and what the hardware allows: means over 0 to 3 passes, in ms
LINES = {"ScaleFold, graphs": 885.0, "goal": 250.0, "roofline": 102.0}
LEFT, RIGHT, TOP, ROW, BAR, WIDTH = 150, 40, 34, 20, 13, 860  # pixels
LONGEST = 1100.0  # ms


class Bar(NamedTuple):
    """One row of the table."""

    label: str
    track: str
    mean: float


def read(path: Path) -> list[Bar]:
    """The rows of the table of commits, which ends with the mean, memory and the first step."""
    bars = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 10 and cells[2] in COLORS:
            mean = re.sub(r"[*\s]", "", cells[7])
            bars.append(Bar(cells[0].split(" ")[1], cells[2], float(mean)))
    if not bars:
        raise ValueError(f"{path}: no row of ten columns has a track ({', '.join(COLORS)})")
    return bars


def across(ms: float) -> float:
    return LEFT + ms / LONGEST * (WIDTH - LEFT - RIGHT)


def row(number: int, bar: Bar) -> list[str]:
    """A bar with its commit before it and its value behind."""
    y, end = TOP + number * ROW, across(bar.mean)
    size = f'x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR}"'
    return [
        text(LEFT - 8, y + 11, f"{bar.label} {NAMES[bar.track]}", "end"),
        f'<rect {size} fill="{COLORS[bar.track]}"/>',
        text(end + 5, y + 11, f"{bar.mean:.0f} ms"),
    ]


def mark(name: str, ms: float, bottom: float) -> list[str]:
    """A dashed line from top to bottom, named above."""
    x = across(ms)
    ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{bottom}"'
    line = f'<line {ends} stroke="#777" stroke-dasharray="4 3"/>'
    return [line, text(x, TOP - 12, f"{name} {ms:.0f}", "middle", "#555")]


def picture(bars: Sequence[Bar]) -> str:
    """All rows, from the first to the last commit."""
    bottom = TOP + ROW * len(bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 8}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, bar in enumerate(bars):
        parts += row(number, bar)
    for name, ms in LINES.items():
        parts += mark(name, ms, bottom)
    return "\n".join([*parts, "</svg>\n"])


def main(argv: Sequence[str]) -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("history", type=Path, metavar="PERFORMANCE.md")
    parser.add_argument("--out", type=Path, required=True, metavar="PICTURE.svg")
    options = parser.parse_args(argv)
    options.out.write_text(picture(read(options.history)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
