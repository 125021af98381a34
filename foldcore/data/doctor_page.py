"""The doctor's findings as one page: no script, no font, nothing fetched from elsewhere."""

from html import escape

import numpy as np

from foldcore.data.examine import Findings, Rule, Timing
from foldcore.data.histogram import histogram

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1d2733; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; text-align: left;
       border-bottom: 1px solid #dde3ea; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem }
figure { margin: 0 } figcaption { font-weight: 600 } .quiet { color: #5b6b7c }
svg text { font: 12px system-ui, sans-serif; fill: currentColor } svg rect { fill: #2f6fb0 }
@media (prefers-color-scheme: dark) {
  body { color: #dfe6ee; background: #14191f } td, th { border-color: #2c3640 }
  svg rect { fill: #6aa5e0 } .quiet { color: #93a3b3 } }
"""
_ROW, _LABEL, _WIDTH = 18, 95, 230  # pixels


def render(findings: Findings, gpus: int, step_ms: float) -> str:
    """The page, as text."""
    parts = [
        f"<h1>{findings.accepted} chains to train on</h1>",
        f"<p class=quiet>{escape(findings.path)}: {escape(findings.kind)}</p>",
        _rules("What is left out", "rule", findings.rules),
        _rules("Worth knowing", "note", findings.notes),
        _failed(findings),
        '<h2>Distributions</h2><div class="charts">',
        *(_chart(n, v, findings.unknown.get(n, 0)) for n, v in findings.values.items()),
        "</div>",
        _timing(findings.timing, gpus, step_ms) if findings.timing else "",
        "".join(f"<p>{escape(advice)}</p>" for advice in findings.advice),
    ]
    title = escape(f"Data set {findings.path}")
    head = f"<meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
    body = "".join(parts)
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>{body}</body></html>\n"


def _rules(title: str, kind: str, rules: list[Rule]) -> str:
    if not rules:
        return ""
    rows = "".join(
        f"<tr><td>{escape(rule.name)}</td><td class=number>{rule.count}</td>"
        f"<td class=quiet>{escape(', '.join(rule.subjects))}"
        f"{' ...' if rule.count > len(rule.subjects) else ''}</td></tr>"
        for rule in rules
    )
    head = f"<tr><th>{kind}</th><th class=number>chains</th><th>for example</th></tr>"
    return f"<h2>{title}</h2><table>{head}{rows}</table>"


def _failed(findings: Findings) -> str:
    if not findings.failed:
        return ""
    rows = "".join(
        f"<tr><td>{escape(chain)}</td><td>{escape(reason)}</td></tr>"
        for chain, reason in findings.failed
    )
    return f"<h2>Cannot be prepared</h2><table>{rows}</table>"


def _chart(name: str, values: np.ndarray, unknown: int) -> str:
    missing = f"unknown for {unknown}" if unknown else ""
    if not len(values):
        return f"<figure><figcaption>{escape(name)}</figcaption>{missing}</figure>"
    bins = histogram(values)
    highest = max(count for _, count in bins)
    bars = []
    for number, (label, count) in enumerate(bins):
        y, width = number * _ROW, round(_WIDTH * count / highest, 1)
        bars.append(
            f'<text x="{_LABEL - 6}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{_LABEL}" y="{y + 2}" width="{width}" height="{_ROW - 4}" rx="2"/>'
            f'<text x="{_LABEL + width + 5}" y="{y + 13}">{count}</text>'
        )
    size = f'width="{_LABEL + _WIDTH + 60}" height="{len(bins) * _ROW}"'
    summary = f"median {np.median(values):g}{', ' if missing else ''}{missing}"
    return (
        f"<figure><figcaption>{escape(name)}</figcaption><div class=quiet>{summary}</div>"
        f'<svg role="img" aria-label="{escape(name)}" {size}>{"".join(bars)}</svg></figure>'
    )


def _timing(timing: Timing, gpus: int, step_ms: float) -> str:
    names = ("mean", "50 %", "90 %", "99 %", "slowest")
    seconds = [timing.seconds.mean(), *(timing.percentile(p) for p in (50, 90, 99, 100))]
    head = "".join(f"<th class=number>{name}</th>" for name in names)
    row = "".join(f"<td class=number>{value * 1e3:.1f}</td>" for value in seconds)
    slow = ", ".join(f"{escape(c)} {s * 1e3:.0f} ms" for c, s in timing.slowest)
    title = f"Milliseconds an example, one core, {len(timing.seconds)} chains"
    chart = _chart("milliseconds an example", np.round(timing.seconds * 1e3, 2), 0)
    return (
        f"<h2>{title}</h2><table><tr>{head}</tr><tr>{row}</tr></table>"
        f"<p class=quiet>slowest: {slow}</p>{chart}<p>{escape(timing.advice(gpus, step_ms))}</p>"
    )
