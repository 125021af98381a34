"""The packed store beside the raw files: ``python -m parity.bench_store SOURCE``.

Prepares SOURCE (a folder, or ``embedded``) in a temporary folder and prints a table: chains a
second and core of preparation, sizes, and examples a second and core from either, for two
configurations. All prepare the same chains, a block of them in turn, so a busy machine slows them
alike; the times are those of the processor. Of raw files each example reads its own, as in a set
that is larger than memory; and once more with the 256 MB of parsed structures that a process
remembers, which hold most of a small set.
"""

import argparse
import gzip
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from foldcore.config import DataConfig
from foldcore.data.dataset import Dataset
from foldcore.data.examples import Preparer
from foldcore.data.inventory import take_inventory
from foldcore.data.prepare import Settings, prepare
from foldcore.data.sampler import ExampleKey, Plan
from foldcore.data.store import Store
from foldcore.errors import DataError
from foldcore.features import FEATURES, dimensions, shape
from parity.checks import refuse

INITIAL = DataConfig(accept_unknown=True)
BLOCK = 50  # examples from one source before the other has its turn
SMALL = replace(INITIAL, crop_size=128, num_msa_clusters=64, num_extra_msa=128, num_templates=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 2 for a source that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m parity.bench_store", description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--chains", type=int, help="prepare only so many of each kind")
    arguments = parser.parse_args(argv)
    try:
        _table(arguments)
    except DataError as error:
        return refuse(str(error))
    return 0


def _table(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = prepare([arguments.source], Path(folder) / "store", Settings())
        _sizes(arguments.source, store)
        for name, config in (("small", SMALL), ("initial training", INITIAL)):
            _examples(name, arguments.source, store, config, arguments.chains)


def _sizes(source: str, store: Path) -> None:
    manifest = Store(store).manifest
    packed = sum(file["bytes"] for file in manifest["files"].values())
    inventory = take_inventory([source])
    files = [*inventory.structures.values(), *(f for fs in inventory.folders.values() for f in fs)]
    zipped = 0
    for file in files:
        data = file.read()
        zipped += len(data if data.startswith(b"\x1f\x8b") else gzip.compress(data, 6))
    rate = manifest["chains"] / manifest["core_seconds"]
    print(f"| preparation | {rate:.1f} chains/s and core |")
    print(f"| inputs | {inventory.size / 1e6:.1f} MB in {len(files)} files |")
    print(f"| inputs, gzipped | {zipped / 1e6:.1f} MB |")
    print(f"| store | {packed / 1e6:.1f} MB in {len(manifest['files']) + 1} files |")


def _examples(name: str, source: str, store: Path, config: DataConfig, count: int | None) -> None:
    """Examples a second of a core, as a loader process makes them: each chain is met once."""
    preparers = {
        "raw files": _preparer(Dataset(source, config, cache_bytes=0)),
        "raw files, parsed structures remembered": _preparer(Dataset(source, config)),
        "store": _preparer(Dataset(str(store), config)),
    }
    chains = preparers["store"].datasets[0].chains
    chosen = np.random.default_rng(0).permutation(len(chains))[:count].tolist()
    keys = [ExampleKey(0, 0, number, chains[index]) for number, index in enumerate(chosen)]
    sizes = dimensions(config)
    out = {n: np.zeros(shape(n, sizes)[1:], f.dtype) for n, f in FEATURES.items()}
    seconds = dict.fromkeys(preparers, 0.0)
    for start in range(0, len(keys), BLOCK):
        for what, preparer in preparers.items():
            began = time.process_time()
            for key in keys[start : start + BLOCK]:
                preparer.example(key, out)
            seconds[what] += time.process_time() - began
    for what, total in seconds.items():
        rate, ratio = len(keys) / total, total / seconds["store"]
        print(f"| {name}, {what} | {rate:.1f} examples/s and core | the store: {ratio:.1f} times |")


def _preparer(dataset: Dataset) -> Preparer:
    return Preparer([dataset], Plan([dataset.source()], seed=0))


if __name__ == "__main__":
    sys.exit(main())
