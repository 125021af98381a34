"""What the suite reports: a table on the terminal, report.json, and a page with plots."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parity import page, records
from parity.options import LEVELS

WIDTH = 120
ABSENT = "DeepMind's code is not installed (make oracle): the tracks are compared with each other"


def merge(parts: list[dict[str, Any]], seconds: float, complete: bool = True) -> dict[str, Any]:
    """The reports of all processes as one."""
    environment = records.environment()
    for part in parts:
        environment |= part["environment"]
    curves = {name: curve for part in parts for name, curve in part["curves"].items()}
    cases = [case for part in parts for case in part["cases"]]
    return {
        "cases": sorted(cases, key=lambda case: case["level"]),
        "curves": curves,
        "environment": environment | {"seconds": round(seconds, 1), "complete": complete},
    }


def write_json(result: dict[str, Any], folder: Path) -> Path:
    """report.json, whole at any moment; of a run that goes on, no page of an earlier one stays."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    half = folder / "report.json.half"
    half.write_text(json.dumps(result, indent=1, allow_nan=True) + "\n", encoding="utf-8")
    os.replace(half, path)
    if not result["environment"]["complete"]:
        (folder / "index.html").unlink(missing_ok=True)
    return path


def write(result: dict[str, Any], folder: Path) -> None:
    """The table on the terminal, and both files."""
    path = write_json(result, folder)
    (folder / "index.html").write_text(page.render(result), encoding="utf-8")
    console = Console()
    console.width = max(console.width, WIDTH)  # where it is not a terminal: wide enough for a row
    for level, what in LEVELS.items():
        if rows := [case for case in result["cases"] if case["level"] == level]:
            console.print(table(f"level {level}: {what}", rows))
    if not result["environment"].get("oracle"):
        console.print(ABSENT)
    for case in result["cases"]:
        if "reason" in case:
            console.print(f"[red]{case['name']} in {case['dtype']}[/red]: {case['reason']}")
    console.print(summary(result))
    console.print(f"report: {path} and index.html")


def summary(result: dict[str, Any]) -> str:
    """The outcome in one line."""
    cases = result["cases"]
    passed = sum(case["passed"] for case in cases)
    arrays = sum(case.get("arrays", 0) for case in cases)
    seconds = result["environment"]["seconds"]
    return f"{passed} of {len(cases)} cases passed, {arrays:,} arrays, {seconds:.0f} s"


def table(title: str, cases: list[dict[str, Any]]) -> Table:
    """The verdicts of one level."""
    found = Table(title=title, title_justify="left")
    columns = ("case", "precision", "JAX", "PyTorch", "difference", "ratio", "limit", "seconds", "")
    for column in columns:
        found.add_column(
            column, justify="left" if column in ("case", "precision") else "right", no_wrap=True
        )
    for case in cases:
        errors = (number(case[key]) for key in ("error_jax", "error_torch", "difference"))
        verdict = "[green]passed[/green]" if case["passed"] else "[red]FAILED[/red]"
        ratio, limit = number(case["ratio"]), number(case.get("limit"))
        seconds = "-" if case.get("seconds") is None else f"{case['seconds']:.1f}"
        found.add_row(case["name"], case["dtype"], *errors, ratio, limit, seconds, verdict)
    return found


def number(value: float | None) -> str:
    """Short; a dash where there is none."""
    return "-" if value is None else f"{value:.2g}"
