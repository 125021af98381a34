"""What became of every chain of a data set: accepted, rejected by a rule, failed while loading."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

EXAMPLES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Reject:
    """An input that is not in the store: the file (and line), what it was to be, and why."""

    file: str
    line: int | None
    subject: str  # chain or entry
    rule: str
    reason: str


class Report:
    """Counted, per-chain reasons; nothing leaves a data set without an entry here."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.accepted = 0
        self.rejected: dict[str, tuple[str, str]] = {}  # chain or entry -> (rule, detail)
        self.failed: dict[str, tuple[int, str]] = {}  # chain -> (times, reason) while loading
        self.notes: dict[str, dict[str, int]] = {}  # what is worth knowing -> chain -> amount

    def reject(self, chain_id: str, rule: str, detail: str = "") -> None:
        """A chain, or an entry without usable chains, that is not trained on."""
        self.rejected[chain_id] = (rule, detail)

    def fail(self, chain_id: str, reason: str) -> bool:
        """A chain that could not be prepared this time; true if it is its first failure."""
        times = self.failed[chain_id][0] if chain_id in self.failed else 0
        self.failed[chain_id] = (times + 1, reason)
        return times == 0

    def note(self, what: str, chain_id: str, amount: int = 1) -> None:
        """Something that changed how a chain is used, without rejecting it."""
        self.notes.setdefault(what, {})[chain_id] = amount

    def take_notes(self) -> dict[str, dict[str, int]]:
        """The notes since the last call, for a loader process to hand to its parent."""
        notes, self.notes = self.notes, {}
        return notes

    def add_notes(self, notes: dict[str, dict[str, int]]) -> None:
        """Take in the notes of another process."""
        for what, chains in notes.items():
            self.notes.setdefault(what, {}).update(chains)

    def counts(self) -> dict[str, int]:
        """Rejected chains by rule, most frequent first."""
        return dict(Counter(rule for rule, _ in self.rejected.values()).most_common())

    def summary(self) -> str:
        """A few readable lines."""
        lines = [f"{self.path}: {self.accepted} chains accepted, {len(self.rejected)} rejected"]
        for rule, count in self.counts().items():
            some = [(c, d) for c, (r, d) in self.rejected.items() if r == rule][:EXAMPLES_SHOWN]
            shown = ", ".join(f"{c} ({d})" if d else c for c, d in some)
            lines.append(f"  {count} {rule}: {shown}{' ...' if count > len(some) else ''}")
        for what, chains in self.notes.items():
            lines.append(f"  note: {what}: {sum(chains.values())} in {len(chains)} chains")
        for chain_id, (times, reason) in self.failed.items():
            lines.append(f"  failed {times}x while loading: {chain_id}: {reason}")
        return "\n".join(lines)

    def write(self, path: str | Path) -> None:
        """Everything, as JSON (``.json``) or as a table of one row a chain (``.tsv``)."""
        if Path(path).suffix not in (".json", ".tsv"):
            raise ValueError(f"{path}: a report is written as .json or .tsv")
        text = self._json() if Path(path).suffix == ".json" else self._table()
        Path(path).write_text(text, encoding="utf-8")

    def _json(self) -> str:
        tree = {
            "path": self.path,
            "accepted": self.accepted,
            "counts": self.counts(),
            "rejected": {c: {"rule": r, "detail": d} for c, (r, d) in self.rejected.items()},
            "failed": {c: {"times": n, "reason": r} for c, (n, r) in self.failed.items()},
            "notes": self.notes,
        }
        return json.dumps(tree, indent=1) + "\n"

    def _table(self) -> str:
        rows = [("chain", "what", "rule", "detail")]
        rows += [(c, "rejected", rule, detail) for c, (rule, detail) in self.rejected.items()]
        rows += [(c, "failed", f"{n} times", reason) for c, (n, reason) in self.failed.items()]
        rows += [
            (c, "note", what, str(amount))
            for what, chains in self.notes.items()
            for c, amount in chains.items()
        ]
        return "".join("\t".join(_cell(c) for c in row) + "\n" for row in rows)


def _cell(text: str) -> str:
    return " ".join(text.split())
