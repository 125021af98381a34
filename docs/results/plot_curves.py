"""Draw a run's loss terms and its scores on held-out chains as one SVG picture.

python docs/results/plot_curves.py METRICS.jsonl PICTURE.svg [STEP]

A dashed line marks STEP, for example where the run was interrupted and resumed.
"""

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, COLUMNS = 280, 190, 4  # of a panel, in pixels; panels in a row
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 28, 28  # margins of the axes in a panel
TRAINING, HELD_OUT = "#9aa7b8", "#c2410c"
SCORES = {"eval/lddt_ca": "lDDT-Ca", "eval/gdt_ts": "GDT-TS", "eval/drmsd": "dRMSD (angstrom)"}
Points = list[tuple[int, float]]


def points(rows: list[dict[str, float]], name: str) -> Points:
    """(step, value) of the rows that have this value."""
    return [(int(row["step"]), row[name]) for row in rows if name in row]


def text(x: float, y: float, words: str, anchor: str = "start", color: str = "#333") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{color}">{words}</text>'


def line(at: list[tuple[float, float]], color: str, extra: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5" {extra}/>'


def panel(title: str, training: Points, held_out: Points, last: int, mark: int) -> str:
    """One value over the steps, drawn with its corner at the origin."""
    values = [value for _, value in training + held_out]
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
        parts.append(line([(x, TOP), (x, bottom)], "#333", 'stroke-dasharray="3 3"'))
    parts += [line(place(training), TRAINING), line(place(held_out), HELD_OUT)]
    for x, y in place(held_out):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{HELD_OUT}"/>')
    return "\n".join(parts)


def picture(rows: list[dict[str, float]], mark: int) -> str:
    """All panels: the losses in the order of their names, then the scores."""
    losses = sorted({name for row in rows for name in row if name.startswith("loss/")})
    last = max(int(row["step"]) for row in rows)
    curves = [(name, points(rows, name), points(rows, f"eval/{name}")) for name in losses]
    curves += [(title, [], points(rows, name)) for name, title in SCORES.items()]
    width, height = COLUMNS * WIDTH, -(-len(curves) // COLUMNS) * HEIGHT + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(LEFT, 16, "training batches", color=TRAINING),
        text(LEFT + 110, 16, "held-out chains, averaged weights", color=HELD_OUT),
    ]
    for i, curve in enumerate(curves):
        x, y = i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT + 24
        parts += [f'<g transform="translate({x} {y})">', panel(*curve, last, mark), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    metrics, output, *marks = sys.argv[1:]
    read = [json.loads(row) for row in Path(metrics).read_text(encoding="utf-8").splitlines()]
    Path(output).write_text(picture(read, int(marks[0]) if marks else 0), encoding="utf-8")
