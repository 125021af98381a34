"""A "run" of blank examples, which tests kill: ``python -m tests.loader_run FOLDER``.

It takes batches as a trainer does, notes its start and each step's examples in FOLDER/steps.jsonl,
saves its state every few steps, and continues from there when it is started again.
"""

import json
import random
import sys
from pathlib import Path

from foldcore.config import DataConfig
from foldcore.data.loader import Loader
from foldcore.data.order import merge
from tests.synthetic_examples import Synthetic

STEPS, SAVE_EVERY, BATCH = 60, 5, 4


def main(folder: Path) -> None:
    """The run that tests kill: 1 to 4 ranks in one process, another number at each start."""
    world = random.choice((1, 2, 4))
    draw = random.Random(7)
    slow = {f"c{i}": draw.choice((0.0, 0.001, 0.003, 0.05)) for i in range(300)}
    preparer = Synthetic(300, slow=slow)
    config = DataConfig(workers=3 - world // 2, prefetch=2, reorder_window=20)
    with (folder / "steps.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 0, "world": world}) + "\n")
    loaders = [
        Loader(preparer, config, batch_size=BATCH // world, rank=r, world=world, folder=folder)
        for r in range(world)
    ]
    saved, first = folder / "state.json", 0
    if saved.exists():
        state = json.loads(saved.read_text())
        first = state["step"]
        for loader in loaders:
            loader.restore(state)
    with (folder / "steps.jsonl").open("a", buffering=1) as lines:
        for step in range(first + 1, STEPS + 1):
            examples = [int(i) for loader in loaders for i in next(loader)["example_id"]]
            lines.write(json.dumps({"step": step, "world": world, "examples": examples}) + "\n")
            if step % SAVE_EVERY == 0:
                temporary = folder / "state.tmp"
                temporary.write_text(json.dumps(merge([loader.state() for loader in loaders])))
                temporary.replace(saved)
    for loader in loaders:
        loader.close()
    print("finished", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
