"""DeepMind's side of ``parity.network_cases``: the whole network, its losses and every gradient."""

from typing import Any

import jax
import numpy as np

from parity import example
from parity.case import Run
from parity.network_cases import gradients, unpadded
from parity.oracle import published
from parity.tracks import Arrays


def run() -> Run:
    """One program for any number of recycling passes, in float64."""
    network = published.network(published.tiny_config())

    def loss(params: Any, batch: Any) -> tuple[Any, Any]:
        returned, [total] = network.apply(published.nest(params), jax.random.key(0), batch)
        losses = {**published.losses(returned), "total": total}
        return total, (published.outputs(returned), losses)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def one_example(parameters: Arrays, inputs: Arrays) -> Arrays:
        features = published.cast(example.to_deepmind(inputs), "float64")
        params = published.cast(parameters, "float64")
        (_, (outputs, losses)), gradient = step(params, features)
        return {
            **{f"output {n}": unpadded(n, np.asarray(x), inputs) for n, x in outputs.items()},
            **{f"output loss {n}": np.asarray(x) for n, x in losses.items()},
            **gradients({n: np.asarray(x) for n, x in gradient.items()}),
        }

    return one_example
