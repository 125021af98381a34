"""``train_step`` around a model of one matrix, run on however many devices this process has.

python -m tests.small_step CLIP    prints the state and metrics of two steps as JSON
"""

import json
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foldcore.config import Config
from foldcore.layout import make_layout
from jaxfold import distributed, train
from jaxfold.step import CompiledStep

EXAMPLES, IN, OUT = 8, 3, 2


class OneMatrix:
    """Stands where ``Network`` does: predicts ``x @ weights``."""

    layout = make_layout({"weights": (IN, OUT)})

    def unflatten(self, flat: Any, rounded: Any = None) -> dict[str, Any]:
        return self.layout.unflatten(flat)

    def flatten(self, tree: dict[str, Any]) -> Any:
        return tree["weights"].ravel()


def squared_error(params, network, config, batch, step):
    """Stands where ``loss_fn`` does."""
    loss = jnp.mean(jnp.square(batch["x"] @ params["weights"] - batch["y"]), axis=(1, 2))
    return loss.mean(), {"loss/total": loss.mean()}


def settings(clip: str) -> Config:
    config = Config()
    optimizer = replace(config.optimizer, clip=clip, warmup_steps=0, ema_warmup=True)
    run = replace(config.train, batch_size=EXAMPLES)
    return replace(config, optimizer=optimizer, train=run)


def make_batch(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    # lengths of the gradients spread over two orders of magnitude: clipping matters
    scale = np.logspace(-1, 1, EXAMPLES)[:, None, None]
    return {
        "x": scale * draw.standard_normal((EXAMPLES, 4, IN)),
        "y": scale * draw.standard_normal((EXAMPLES, 4, OUT)),
        "aatype": np.zeros((EXAMPLES, 4), np.int32),
        "num_iter_recycling": np.full(EXAMPLES, 3, np.int32),
    }


def start() -> train.TrainState:
    weights = np.linspace(-1, 1, IN * OUT)
    zeros = np.zeros_like(weights)
    return train.TrainState(weights, zeros, zeros, weights, np.zeros((), np.int32))


def run(clip: str, batches: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """The state and metrics after each batch, as nested lists."""
    config, results = settings(clip), []
    mesh = distributed.make_mesh(EXAMPLES)
    step = CompiledStep(partial(train.train_step, OneMatrix(), config), config, mesh, donate=True)
    state = distributed.replicate(mesh, start())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "loss_fn", squared_error)
        for batch in batches:
            state, metrics = step(state, distributed.place(mesh, batch))
            host = jax.device_get({**metrics, **vars(state)})
            assert host.pop("rounded") is None  # these networks have no trunk
            results.append({name: np.asarray(value).tolist() for name, value in host.items()})
    return results


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    found = run(sys.argv[1], [make_batch(0), make_batch(1)])
    print(json.dumps({"devices": jax.device_count(), "steps": found}))
