"""The packed store beside the raw files: ``python -m parity.bench_store SOURCE``.

Prepares SOURCE (a folder, or ``embedded``) in a temporary folder and prints a table: chains a
second and core of preparation, sizes, and examples a second and core from either, for two
configurations. The same chains are read in turn from both, so a busy machine slows both; the times
are those of the processor.
"""

import argparse
import gzip
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from foldcore.config import DataConfig
from foldcore.data.dataset import Dataset
from foldcore.data.inventory import take_inventory
from foldcore.data.prepare import Settings, prepare
from foldcore.data.store import Store
from foldcore.data.transforms import empty_example, make_example

INITIAL = DataConfig(accept_unknown=True)
SMALL = replace(INITIAL, crop_size=128, num_msa_clusters=64, num_extra_msa=128, num_templates=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m parity.bench_store", description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--chains", type=int, default=200, help="examples of each kind")
    arguments = parser.parse_args(argv)
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


def _examples(name: str, source: str, store: Path, config: DataConfig, count: int) -> None:
    """Examples a second of a core: each chain is met once, as in an epoch."""
    raw, packed = Dataset(source, config), Dataset(str(store), config)
    chosen = np.random.default_rng(0).permutation(len(raw.chains))[:count]
    out = empty_example(config)
    seconds = {"raw files": 0.0, "store": 0.0}
    for number, index in enumerate(chosen.tolist()):
        for what, dataset in (("raw files", raw), ("store", packed)):
            start = time.process_time()
            make_example(dataset.raw(raw.chains[index]), config, (0, 0, number), out=out)
            seconds[what] += time.process_time() - start
    for what, total in seconds.items():
        print(f"| {name}, {what} | {len(chosen) / total:.1f} examples/s and core |")
    print(f"| {name}, ratio | {seconds['raw files'] / seconds['store']:.1f} |")


if __name__ == "__main__":
    main()
