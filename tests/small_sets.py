"""Small data sets in every layout, built from entries of the embedded set."""

import gzip
import json
from pathlib import Path

from foldcore.data.layout import find_layout

EMBEDDED = Path(find_layout("embedded").root)
CHAINS = ("1bd2_A", "1bd2_B", "1ubq_A", "5pti_A")
TABLES = ("chain_data_cache.json", "clusters-by-chain-40.txt", "duplicate_pdb_chains.txt")


def content(name: str) -> str:
    """Text of a gzipped file of the embedded set."""
    return gzip.decompress((EMBEDDED / f"{name}.gz").read_bytes()).decode()


def msa(chain_id: str) -> str:
    return content(f"alignments/{chain_id}/swissprot_hits.a3m")


def write(path: Path, text: str, zipped: bool = False) -> Path:
    """Write a file and its folders, optionally gzipped with ``.gz`` added to its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        path = path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def build(
    root: Path,
    chains: tuple[str, ...] = CHAINS,
    layout: str = "openfold",
    zipped: bool = False,
    tables: bool = False,
) -> Path:
    """A data set of these chains under ``root``, in OpenFold's or OpenProteinSet's layout."""
    for entry in {chain_id[:4] for chain_id in chains}:
        write(root / "mmcif" / f"{entry}.cif", content(f"mmcif/{entry}.cif"), zipped)
    for chain_id in chains:
        folder = root / ("alignments" if layout == "openfold" else "pdb") / chain_id
        a3m, hhr = ("", "") if layout == "openfold" else ("a3m", "hhr")
        hits = content(f"alignments/{chain_id}/pdb70_hits.hhr")
        write(folder / a3m / "uniref90_hits.a3m", msa(chain_id), zipped)
        write(folder / hhr / "pdb70_hits.hhr", hits, zipped)
    if tables:
        cache = json.loads((EMBEDDED / TABLES[0]).read_text())
        write(root / TABLES[0], json.dumps({chain_id: cache[chain_id] for chain_id in chains}))
        for name in TABLES[1:]:
            write(root / name, (EMBEDDED / name).read_text())
    return root
