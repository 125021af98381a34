"""What a data set holds, what it lacks and why, and how fast it can be read: the doctor's findings.

A folder or a packed store is opened as training opens it, and some of its chains are made into
examples. Inputs that only ``foldcore.data.prepare`` reads are joined, and no more.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from foldcore.config import DataConfig
from foldcore.data.dataset import Dataset
from foldcore.data.hits import count_templates
from foldcore.data.inventory import take_inventory
from foldcore.data.join import join
from foldcore.data.layout import Layout, find_layout
from foldcore.data.prepare import read_tables
from foldcore.data.report import Report
from foldcore.data.store import is_store
from foldcore.data.transforms import empty_example, make_example
from foldcore.errors import DataError
from foldcore.features import dimensions, validate

SHOWN = 5  # subjects named for each rule


@dataclass(frozen=True)
class Rule:
    """Chains (or entries) that one rule keeps out."""

    name: str
    count: int
    subjects: tuple[str, ...]  # some of them, with particulars


@dataclass(frozen=True)
class Timing:
    """Seconds of one core for each example of a sample of chains."""

    seconds: np.ndarray
    slowest: tuple[tuple[str, float], ...]

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))

    def workers(self, gpus: int, step_seconds: float) -> int:
        """Loader processes that prepare, on average, as many examples as the GPUs take."""
        return max(1, int(np.ceil(self.seconds.mean() * gpus / step_seconds)))

    def advice(self, gpus: int, step_ms: float) -> str:
        """How many loader processes these GPUs need."""
        cards = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        return (
            f"{cards} at {step_ms:g} ms a step and one example each: "
            f"{self.workers(gpus, step_ms / 1e3)} loader processes in all"
        )


@dataclass
class Findings:
    """All that the doctor says."""

    path: str
    kind: str
    accepted: int = 0
    rules: list[Rule] = field(default_factory=list)
    notes: list[Rule] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)  # chain, reason
    values: dict[str, np.ndarray] = field(default_factory=dict)  # distribution -> of each chain
    unknown: dict[str, int] = field(default_factory=dict)  # distribution -> chains without
    timing: Timing | None = None
    advice: list[str] = field(default_factory=list)


def examine(sources: Sequence[str], config: DataConfig, sample: int = 64) -> Findings:
    """Open a data set as training does, and make examples of ``sample`` chains of it.

    :class:`DataError` says in one line why nothing can be trained on.
    """
    path = sources[0]
    if len(sources) == 1 and (path == "embedded" or is_store(path) or _is_folder(path)):
        dataset = Dataset(path, config)
        findings = _describe(dataset)
        _time(dataset, sample, findings)
        _advise(dataset, findings)
        return findings
    return _join_only(sources)


def _is_folder(path: str) -> bool:
    """Whether training can read it as it is."""
    if "://" in path or not Path(path).expanduser().is_dir():
        return False
    layout = find_layout(path)
    return bool(layout.structures and layout.alignments)


def _describe(dataset: Dataset) -> Findings:
    kind = "packed store" if dataset.store else "folder of files"
    findings = Findings(dataset.layout.root, kind, accepted=len(dataset.chains))
    findings.rules = _rules(dataset.report)
    records = list(dataset.records.values())
    findings.values["length (residues)"] = np.array([r.length for r in records])
    findings.values["40 % cluster size (chains)"] = np.array([r.cluster_size for r in records])
    years = [int(r.release_date[:4]) for r in records if r.release_date]
    findings.values["release (year)"] = np.array(years)
    findings.unknown["release (year)"] = len(records) - len(years)
    resolutions = [r for r in dataset.resolutions.values() if r]
    findings.values["resolution (angstrom)"] = np.array(resolutions)
    findings.unknown["resolution (angstrom)"] = len(records) - len(resolutions)
    return findings


def _rules(report: Report) -> list[Rule]:
    rules = []
    for name, count in report.counts().items():
        found = [(s, detail) for s, (rule, detail) in report.rejected.items() if rule == name]
        some = tuple(f"{s} ({d})" if d else s for s, d in found[:SHOWN])
        rules.append(Rule(name, count, some))
    return rules


def _time(dataset: Dataset, sample: int, findings: Findings) -> None:
    """Prepare evenly spread chains, as a loader process would, and count their rows on the way."""
    chosen = np.unique(np.linspace(0, len(dataset.chains) - 1, sample).round().astype(int))
    taken: list[tuple[float, str]] = []
    rows: list[int] = []
    templates: list[int] = []
    out = empty_example(dataset.config)
    for number, index in enumerate(chosen):
        chain_id = dataset.chains[index]
        start = time.process_time()
        try:
            raw = dataset.raw(chain_id)
            made = make_example(raw, dataset.config, (0, 0, number), out=out)
            _check(made, dataset.config)
        except DataError as error:
            findings.failed.append((chain_id, str(error)))
            continue
        taken.append((time.process_time() - start, chain_id))
        rows.append(len(raw.msa))
        templates.append(count_templates(raw.templates))
    findings.values["MSA depth (rows, of a sample)"] = np.array(rows)
    findings.values["templates (of a sample)"] = np.array(templates)
    for what, chains in dataset.report.notes.items():
        some = tuple(f"{chain} ({amount})" for chain, amount in list(chains.items())[:SHOWN])
        findings.notes.append(Rule(what, len(chains), some))
    if taken:
        slowest = tuple((chain, seconds) for seconds, chain in sorted(taken, reverse=True)[:SHOWN])
        findings.timing = Timing(np.array([seconds for seconds, _ in taken]), slowest)


def _check(example: dict[str, np.ndarray], config: DataConfig) -> None:
    whole = {name: value[None] for name, value in example.items()}
    identity = np.zeros(1, np.int32)
    validate(whole | {"example_id": identity, "num_iter_recycling": identity}, dimensions(config))


def _advise(dataset: Dataset, findings: Findings) -> None:
    counts = Counter({rule.name: rule.count for rule in findings.rules})
    if unknown := sum(count for name, count in counts.items() if name.startswith("unknown")):
        findings.advice.append(f"data.accept_unknown=true would keep up to {unknown} chains more")
    if not dataset.store:
        findings.advice.append(
            "a packed store is read many times faster: "
            f"python -m foldcore.data.prepare {dataset.layout.root} --out STORE"
        )
    if findings.failed:
        findings.advice.append(
            f"{len(findings.failed)} chains of the sample cannot be made into examples; training "
            "replaces such chains and says so"
        )


def _join_only(sources: Sequence[str]) -> Findings:
    inventory = take_inventory(sources)
    report = Report(", ".join(inventory.roots))
    with tempfile.TemporaryDirectory() as folder:
        caches = read_tables(inventory, Path(folder))
    files = {entry: file.label for entry, file in inventory.structures.items()}
    places = join(Layout(report.path, files, inventory.alignments), caches, report)
    for reject in inventory.rejects:
        report.reject(reject.subject, reject.rule, reject.reason)
    findings = Findings(report.path, "inputs of a store", accepted=len(places))
    findings.rules = _rules(report)
    known = [caches.chains[chain] for chain in places if chain in caches.chains]
    findings.values["length (residues)"] = np.array([len(info.sequence) for info in known])
    findings.unknown["length (residues)"] = len(places) - len(known)
    findings.advice.append(
        "these inputs are not read by training directly: "
        f"python -m foldcore.data.prepare {' '.join(sources)} --out STORE"
    )
    return findings
