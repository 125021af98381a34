"""The whole network in both codes: outputs, losses and the gradient of every parameter.

    python -m parity.oracle.network float64 table.json

Runs in its own process because the precision is a setting of the whole process.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfold.losses import alphafold_loss
from parity.oracle import compare, example, ours, published
from parity.oracle.compare import Comparison

RECYCLING = (0, 2)
MUTATED = "evoformer/left_single//weights"  # its sign is flipped to see whether a case can fail
# Adding the same number to all logits of a softmax changes nothing.
ZERO_GRADIENTS = (
    "evoformer/evoformer_iteration/msa_row_attention_with_pair_bias/feat_2d_norm//offset",
    "evoformer/extra_msa_stack/msa_row_attention_with_pair_bias/feat_2d_norm//offset",
    "structure_module/fold_iteration/invariant_point_attention/attention_2d//bias",
)
_PAE = "predicted_aligned_error_head/logits//"

Arrays = dict[str, np.ndarray]
Run = Callable[[Mapping[str, Any], int], Arrays]


def main(precision: str, path: str) -> None:
    """Compare in one precision and write the table."""
    params = make_params()
    batch = example.make_batch()
    jax.config.update("jax_enable_x64", precision == "float64")
    oracle, mine = oracle_run(batch, precision), our_run(batch, precision)
    mutated = {**params, MUTATED: -params[MUTATED]}
    nudged = []
    if precision == "float32":
        nudged = [compare.perturb(params, seed) for seed in range(compare.PERTURBED_RUNS)]
    table: dict[str, Comparison] = {}
    for passes in RECYCLING:
        results = [oracle(params, passes), mine(params, passes), mine(mutated, passes)]
        perturbed = [oracle(each, passes) for each in nudged]
        table.update(_compare(f"{passes} recycling passes: ", *results, perturbed))
    compare.write(path, table)


def make_params() -> published.Flat:
    """Random parameters, with the first two bins of the aligned error tied.

    On the diagonal the aligned error is zero but for round-off, which decides between these bins:
    with equal logits the choice makes no difference, and the diagonal is out of the comparison.
    """
    params = published.random_params(ours.shapes())
    for leaf in ("weights", "bias"):
        params[_PAE + leaf][..., 1] = params[_PAE + leaf][..., 0]
    return params


def oracle_run(batch: example.Arrays, precision: str) -> Run:
    """DeepMind's network, compiled once for any number of recycling passes."""
    config = published.tiny_config()
    network = published.network(config)
    features = published.cast(example.to_deepmind(batch), precision)

    def loss(params: Any, batch: Any) -> tuple[Any, Any]:
        returned, [total] = network.apply(published.nest(params), jax.random.key(0), batch)
        return total, (published.outputs(returned), published.losses(returned))

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def run(params: Mapping[str, Any], passes: int) -> Arrays:
        count = jnp.full_like(features["num_iter_recycling"], passes)
        inputs = published.cast(dict(params), precision), {**features, "num_iter_recycling": count}
        (total, (outputs, losses)), gradient = step(*inputs)
        return _table(batch, outputs, {**losses, "total": total}, gradient)

    return run


def our_run(batch: example.Arrays, precision: str) -> Run:
    """Our network, likewise."""
    features = published.cast(batch, precision)

    def loss(params: Any, batch: Any) -> tuple[Any, Any]:
        outputs = ours.network(params)(batch)
        total, terms = alphafold_loss(outputs, batch, ours.LOSS)
        outputs = {name: ours.first_example(name, value) for name, value in outputs.items()}
        return total[0], (outputs, ours.head_losses({name: x[0] for name, x in terms.items()}))

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def run(params: Mapping[str, Any], passes: int) -> Arrays:
        count = jnp.full_like(features["num_iter_recycling"], passes)
        inputs = published.cast(dict(params), precision), {**features, "num_iter_recycling": count}
        (total, (outputs, losses)), gradient = step(*inputs)
        return _table(batch, outputs, {**losses, "total": total}, gradient)

    return run


def _table(
    batch: example.Arrays,
    outputs: Mapping[str, Any],
    losses: Mapping[str, Any],
    gradient: Mapping[str, Any],
) -> Arrays:
    """Everything compared, by name: outputs where they count, losses, gradients."""
    real = {name: np.asarray(batch[name][0], bool) for name in ("seq_mask", "msa_mask")}
    table = {f"output {n}": _unmasked(n, np.asarray(x), real) for n, x in outputs.items()}
    table |= {f"loss {name}": np.asarray(value) for name, value in losses.items()}
    for name, value in gradient.items():
        value = np.asarray(value)
        if name.startswith(_PAE):
            value = np.concatenate([value[..., :1] + value[..., 1:2], value[..., 2:]], axis=-1)
        table[f"gradient {name}"] = value
    return table


def _unmasked(name: str, value: np.ndarray, real: Mapping[str, np.ndarray]) -> np.ndarray:
    """An output at real residues and sequences only: padding holds arbitrary numbers."""
    residues = np.flatnonzero(real["seq_mask"])
    if name in ("pair", "distogram_logits", "aligned_error_logits"):
        return value[residues][:, residues]
    if name in ("msa", "masked_msa_logits"):
        rows = np.flatnonzero(real["msa_mask"][0].any(axis=-1))
        return value[rows][:, residues]
    axis = 1 if name in ours.PER_ITERATION else 0
    return np.take(value, residues, axis=axis)


def _compare(
    prefix: str, oracle: Arrays, mine: Arrays, mutated: Arrays, perturbed: list[Arrays]
) -> Iterator[tuple[str, Comparison]]:
    if oracle.keys() != mine.keys():
        raise ValueError(f"in one code only: {sorted(oracle.keys() ^ mine.keys())}")
    largest = max(np.abs(x).max() for name, x in oracle.items() if name.startswith("gradient"))
    for name in oracle:
        zero = name.removeprefix("gradient ") in ZERO_GRADIENTS
        runs = [each[name] for each in perturbed]
        absolute = float(largest) if zero else None
        arrays = oracle[name], mine[name], mutated[name]
        yield prefix + name, compare.compare(*arrays, runs, absolute)


if __name__ == "__main__":
    main(*sys.argv[1:])
