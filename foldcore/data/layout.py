"""Where structures and alignments lie in a data set: OpenFold's and OpenProteinSet's folders.

Structures: ``mmcif/``, ``mmcif_files/``, ``pdb_mmcif/mmcif_files/`` (files, or wwPDB's two-letter
folders of files) or ``pdb/``. Alignments: one folder a chain in ``alignments/`` (files directly in
it) or in ``pdb/`` (levels ``a3m/`` and ``hhr/``). Every file may be gzipped.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from foldcore.config import DataConfig
from foldcore.errors import DataError

STRUCTURE_FOLDERS = ("mmcif", "mmcif_files", "pdb_mmcif/mmcif_files", "pdb")
ALIGNMENT_FOLDERS = ("alignments", "pdb")
STRUCTURE_SUFFIXES = (".cif", ".pdb", ".ent")
NOT_AN_MSA = ("uniprot_hits.sto", "hmm_output.sto")  # pairing rows and template hits of multimers
# Order in which alignments are stacked (supplement 1.2.2); the first rule that matches counts.
DATABASES = (("uniref90",), ("bfd", "uniclust", "uniref30"), ("mgnify",))


@dataclass(frozen=True)
class Layout:
    """The files of one data set, found by name only; none is opened."""

    root: str
    structures: dict[str, str]  # entry, lower case -> file
    alignments: dict[str, str]  # name of the chain's folder -> folder

    def locate(self, name: str) -> tuple[str, str, str] | None:
        """(chain id, entry, chain) of an alignment's name, or None where its structure is absent.

        ``1ABC_A`` is chain A of entry 1abc; a name that is a structure's own stands for a file of
        one chain (chain ""), as predicted structures have it.
        """
        if name.lower() in self.structures:
            return normal_id(name), name.lower(), ""
        entry, _, chain = normal_id(name).rpartition("_")
        return (normal_id(name), entry, chain) if entry in self.structures else None


def normal_id(name: str) -> str:
    """``1ABC_A`` -> ``1abc_A``: the entry in lower case, the chain id with its case."""
    entry, separator, chain = name.rpartition("_")
    return f"{entry.lower()}{separator}{chain}"


def path_option(path: str, config: DataConfig) -> str:
    """The option that names this path."""
    others = ("distillation_path", "validation_path")
    return next((f"data.{name}" for name in others if getattr(config, name) == path), "data.path")


def find_layout(path: str, option: str = "data.path") -> Layout:
    """List the folder that ``option`` names; ``embedded`` is the package's own."""
    root = Path(str(resources.files("foldcore.data") / "embedded")) if path == "embedded" else None
    root = root or Path(path).expanduser()
    if not root.is_dir():
        raise DataError(root, None, f"no such folder ({option})")
    structures = dict(_structures(root))
    alignments = {
        entry.name: entry.path
        for folder in ALIGNMENT_FOLDERS
        for entry in _list(root / folder)
        if entry.is_dir()
    }
    return Layout(str(root), structures, alignments)


def alignment_files(folder: str) -> tuple[list[str], list[str]]:
    """(MSA files in stacking order, hhr files) of one chain."""
    found: dict[str, str] = {}  # name without .gz -> path; the plain file wins
    for level in (folder, os.path.join(folder, "a3m"), os.path.join(folder, "hhr")):
        for entry in _list(Path(level)):
            name = entry.name.removesuffix(".gz")
            if name == entry.name or name not in found:
                found[name] = entry.path
    msas = [n for n in found if n.endswith((".a3m", ".sto")) and n not in NOT_AN_MSA]
    hits = sorted(n for n in found if n.endswith(".hhr"))
    return [found[n] for n in sorted(msas, key=database_rank)], [found[n] for n in hits]


def database_rank(name: str) -> tuple[int, str]:
    """Sort key that puts alignment files in stacking order."""
    for rank, words in enumerate(DATABASES):
        if any(word in name.lower() for word in words):
            return rank, name
    return len(DATABASES), name


def _structures(root: Path) -> Iterator[tuple[str, str]]:
    for folder in STRUCTURE_FOLDERS:
        for entry in _list(root / folder):
            if stem := structure_stem(entry.name):
                yield stem, entry.path
            elif folder != "pdb" and len(entry.name) == 2 and entry.is_dir():
                for file in _list(Path(entry.path)):
                    if stem := structure_stem(file.name):
                        yield stem, file.path


def structure_stem(name: str) -> str:
    """Entry id of a structure file, lower case; "" for any other file."""
    stem, suffix = os.path.splitext(name.removesuffix(".gz"))
    if suffix == ".ent" and stem.startswith("pdb"):
        stem = stem[3:]
    return stem.lower() if suffix in STRUCTURE_SUFFIXES else ""


def _list(folder: Path) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
