"""Where the time of a step goes, as text: by module against the roofline, by kind of kernel."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

WIDTH = 100  # characters of a line
COLUMNS = (
    "track config recycling step_ms step_ms_p10 step_ms_p90 alone_ms examples_per_s mfu peak_gib "
    "compile_s"
).split()
MODULE_COLUMNS = (
    *("module", "calls", "forward ms", "backward ms", "both ms"),
    *("roofline ms", "times roofline", "share of step"),
)
ALL, REST = "all of these", "everything else"
NAMES = {"jax": "JAX", "torch": "PyTorch"}
GUARDS = {
    "jax": 'jax.transfer_guard("disallow")',
    "torch": 'torch.cuda.set_sync_debug_mode("error")',
}
Row = Mapping[str, Any]


def shown(value: Any) -> str:
    """A dash where there is none."""
    return "-" if value is None else str(value)


def steps(rows: Sequence[Row]) -> str:
    """A line for each track and number of passes."""
    return aligned(COLUMNS, [[shown(row.get(name)) for name in COLUMNS] for row in rows])


def aligned(columns: Sequence[str], cells: Sequence[Sequence[str]], left: int = 0) -> str:
    """Columns of text, the first ``left`` of them flush left."""
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        padded = zip(texts, widths, strict=True)
        cells = [t.ljust(w) if i < left else t.rjust(w) for i, (t, w) in enumerate(padded)]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, lines))


# Modules ------------------------------------------------------------------------------------------


def add_rooflines(rows: Sequence[dict[str, Any]], roofline: Mapping[str, Any] | None) -> None:
    """Beside each module's times, what it takes at least; without a GPU nothing is known."""
    for row in rows:
        row["ceilings"] = roofline and roofline["ceilings"]
        for module in row.get("modules", []):
            least = roofline["modules"][module["module"]] if roofline else {}
            for way in ("forward", "backward"):
                module[f"{way}_roofline_ms"] = least[way]["ms"] if least else None
                module[f"{way}_bound"] = least[way]["bound"] if least else None


def in_step(row: Row) -> list[dict[str, Any]]:
    """What the modules take in a step of this row, their sum, and what is left of the step.

    ``calls`` counts forward passes. A module that could not be timed has None, and is part of what
    is left.
    """
    lines = [_module_in_step(row, module) for module in row["modules"]]
    timed = [line for line in lines if line["both_ms"] is not None]
    fields = ("forward_ms", "backward_ms", "both_ms", "roofline_ms")
    total = {name: _sum([line[name] for line in timed]) for name in fields}
    rest = dict.fromkeys(fields) | {"both_ms": row["step_ms"] - (total["both_ms"] or 0)}
    found = [*lines, {"module": ALL, "calls": None} | total, {"module": REST, "calls": None} | rest]
    for line in found:
        spent, least = line["both_ms"], line["roofline_ms"]
        line["ratio"] = spent / least if spent is not None and least else None
        line["share"] = None if spent is None else spent / row["step_ms"]
    return found


def _sum(values: Sequence[float | None]) -> float | None:
    """None if one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _module_in_step(row: Row, module: Row) -> dict[str, Any]:
    last = module["calls"] * row["batch_size"]
    calls = last * (row["recycling"] + 1 if module["every_pass"] else 1)

    def together(name: str) -> dict[str, float | None]:
        ways = (module.get(f"{way}{name}") for way in ("forward", "backward"))
        forward, backward = (
            None if ms is None else ms * n for ms, n in zip(ways, (calls, last), strict=True)
        )
        both = None if forward is None or backward is None else forward + backward
        return {"forward": forward, "backward": backward, "both": both}

    times = {f"{way}_ms": ms for way, ms in together("_ms").items()}
    least = together("_roofline_ms")["both"]
    return {"module": module["module"], "calls": calls, **times, "roofline_ms": least}


def module_cells(row: Row) -> list[list[str]]:
    """The lines as text, under ``MODULE_COLUMNS``."""
    return [
        [
            line["module"],
            shown(line["calls"]),
            *(_number(line[f"{name}_ms"]) for name in ("forward", "backward", "both", "roofline")),
            _number(line["ratio"], 1),
            "-" if line["share"] is None else f"{line['share']:.1%}",
        ]
        for line in in_step(row)
    ]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def failures(row: Row) -> list[str]:
    """What could not be measured, and why."""
    found = [f"{m['module']}: {m['failed']}" for m in row.get("modules", []) if "failed" in m]
    return [*found, *([f"profile: {row['profile_failed']}"] if "profile_failed" in row else [])]


# The profile --------------------------------------------------------------------------------------


def gaps(row: Row) -> str:
    """How long the device is idle inside a step."""
    return (
        f"{row['launches']:,} kernels and copies keep the device busy for {row['busy_ms']:.1f} ms "
        f"of the {row['traced_ms']:.1f} ms between the first and the last of a traced step (a step "
        f"not traced: {row['step_ms']:.1f} ms with others before and after it, "
        f"{shown(row.get('alone_ms'))} ms alone, from its call to the arrival of the loss). "
        f"The first starts {row['first_kernel_ms']:.2f} ms after the call. Idle: "
        f"{row['idle_ms']:.2f} ms ({row['idle_share']:.1%}) in {row['gaps']:,} gaps, the longest "
        f"{row['longest_gap_ms'] * 1e3:.0f} us; {row['long_gaps']:,} of 10 us or more hold "
        f"{row['long_gaps_ms']:.2f} ms."
    )


def waits(row: Row) -> str:
    """What the host does in a step, and how often it waits for the device."""
    if row["host_syncs"] is None:
        seen = "The profile does not show what the host calls."
    else:
        seen = (
            f"The host starts work on the device {row['host_launches']:,} times and waits for it "
            f"{row['host_syncs']:,} times, for {row['host_sync_ms']:.2f} ms."
        )
    return (
        f"{seen} Copies to the host: {row['copies_to_host']}. A step runs under "
        f"{GUARDS[row['track']]}, an error where it would wait unnoticed."
    )


def kind_cells(row: Row) -> list[list[str]]:
    """Time on the device by kind of kernel: kind, milliseconds, share of all, calls."""
    total = max(row["kernel_ms"], 1e-9)
    return [
        [kind["kind"], f"{kind['ms']:.2f}", f"{kind['ms'] / total:.1%}", f"{kind['calls']:,}"]
        for kind in row["kinds"]
    ]


KIND_COLUMNS = ("kind", "ms", "share", "calls")


def kernels(row: Row) -> str:
    """The slowest kernels."""
    total = max(row["kernel_ms"], 1e-9)
    cells = [
        [f"{k['ms']:.3f}", f"{k['ms'] / total:.1%}", str(k["calls"]), k["name"]]
        for k in row["kernels"]
    ]
    return aligned(("ms", "share", "calls", "kernel"), cells)


def describe(row: Row) -> str:
    """All that is known of one row beyond its step time."""
    title = f"{NAMES[row['track']]}, {row['recycling']} recycling passes"
    parts = []
    if row.get("modules"):
        parts.append(f"{title}: time by module\n{aligned(MODULE_COLUMNS, module_cells(row), 1)}")
    if "kernels" in row:
        words = fill(f"{gaps(row)} {waits(row)}", WIDTH)
        parts.append(f"{title}: gaps and waits\n{words}")
        parts.append(f"{title}: time by kind\n{aligned(KIND_COLUMNS, kind_cells(row), 1)}")
    if lines := failures(row):
        parts.append("not measured:\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n" if parts else ""
