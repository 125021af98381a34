"""The report as one page that needs nothing else: plots in SVG, tables, and how it was made."""

from collections.abc import Sequence
from html import escape
from typing import Any

from parity import plots
from parity.options import DTYPES, LEVELS

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
       color: #1b1b1b; background: #fff }
h1 { font-size: 1.6em; margin-bottom: 0 } h2 { font-size: 1.2em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .15em .7em; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
.passed { color: #17692f } .failed { color: #b3261e; font-weight: 600 }
.verdict { font-size: 1.1em } p.note { color: #555; max-width: 46em } svg { max-width: 100% }
svg text { font: 12px system-ui, sans-serif; fill: #333 }
"""
YARDSTICKS = """In float64 a track may be off the other, and off DeepMind's code, by 1e-9 of
an array's largest value. In float32 and bfloat16 each track may be off the float64 result by
four noise floors of the array: the largest distance between runs whose parameters are moved by
half a unit in the last place of that precision, and at least the rounding of the result itself
(for a loss term or a norm, that of a long sum).
A case passes only if the same comparison fails once one thing in it is broken: a sign, a scale,
an axis, a mask, or the step that dropout masks are drawn for. The numbers shown are those of
the case's worst array."""
RUNS = """The same initial weights, batches and dropout masks in both tracks. The band
is how far runs of one track drift apart whose initial weights differ by half a unit in the last
place."""


def render(result: dict[str, Any]) -> str:
    """The whole page."""
    cases, environment = result["cases"], result["environment"]
    failed = [case for case in cases if not case["passed"]]
    parts = [
        "<h1>JAX and PyTorch, compared</h1>",
        _verdict(cases, failed, environment),
        f'<p class="note">{YARDSTICKS}</p>',
        "<h2>Error by case and precision</h2>",
        plots.errors([case for case in cases if case["level"] < 4]),
        *_runs(result["curves"]),
        *(part for level in LEVELS for part in _level(level, cases)),
        "<h2>Versions and hardware</h2>",
        _pairs(environment),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = "<title>Parity of both tracks</title>"
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang=en><head>{head}{title}<style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _verdict(cases: Sequence[Any], failed: Sequence[Any], environment: dict[str, Any]) -> str:
    arrays = sum(case.get("arrays", 0) for case in cases)
    kind = "failed" if failed else "passed"
    text = f"{len(cases) - len(failed)} of {len(cases)} cases passed, {arrays:,} arrays compared"
    oracle = environment.get("oracle") or "DeepMind's code was not installed and took no part"
    names = "; ".join(escape(f"{case['name']} ({case['dtype']})") for case in failed)
    listed = f"<br>failed: {names}" if failed else ""
    return f'<p class="verdict {kind}">{text}{listed}</p><p>Third column: {escape(oracle)}</p>'


def _runs(curves: dict[str, Any]) -> list[str]:
    if not curves:
        return []
    drawn = [plots.curves(name, curves[name]) for name in sorted(curves, key=_order)]
    return ["<h2>Training in both tracks</h2>", f'<p class="note">{RUNS}</p>', *drawn]


def _order(name: str) -> int:
    return DTYPES.index(name.split()[-1])


def _level(level: int, cases: Sequence[dict[str, Any]]) -> list[str]:
    rows = [case for case in cases if case["level"] == level]
    if not rows:
        return []
    names = ("case", "precision", "arrays", "JAX", "PyTorch", "difference", "ratio", "limit", "")
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "\n".join(_row(case) for case in rows)
    return [f"<h2>Level {level}: {LEVELS[level]}</h2>", f"<table><tr>{head}</tr>\n{body}</table>"]


def _row(case: dict[str, Any]) -> str:
    numbers = [case.get(k) for k in ("error_jax", "error_torch", "difference", "ratio", "limit")]
    verdict = "passed" if case["passed"] else "failed"
    note = escape(case.get("worst") or case.get("reason", ""))
    cells = [escape(case["name"]), case["dtype"], str(case.get("arrays", ""))]
    cells += ["–" if value is None else f"{value:.2g}" for value in numbers]
    data = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr title="{note}">{data}<td class="{verdict}">{verdict}</td></tr>'


def _pairs(values: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    rows = (f"<tr><td>{escape(k)}</td><td>{escape(text(v))}</td></tr>" for k, v in values.items())
    return f"<table>{''.join(rows)}</table>"
