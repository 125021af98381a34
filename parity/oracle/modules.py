"""Every module and geometric function in both codes, each by itself.

python -m parity.oracle.modules float64 table.json
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from parity.oracle import compare, example, ours, published, structure_cases, trunk_cases
from parity.oracle.case import Case
from parity.oracle.compare import Comparison
from parity.oracle.network import make_params

CASES: dict[str, Case] = {**trunk_cases.CASES, **structure_cases.CASES}
EXAMPLES = 2
Arrays = dict[str, np.ndarray]


def main(precision: str, path: str, *only: str) -> None:
    """Compare in one precision, all cases or those named, and write the table."""
    params = make_params()
    inputs = make_inputs()
    jax.config.update("jax_enable_x64", precision == "float64")
    table: dict[str, Comparison] = {}
    for name in only or CASES:
        if CASES[name].in_numpy and precision == "float32":
            continue  # what numpy rounds where is not of interest
        table.update(run(name, CASES[name], params, inputs, precision))
    compare.write(path, table)


def make_inputs() -> Arrays:
    """Two examples as features of one recycling pass, with random activations."""
    passes = [example.one_pass(example.make_batch(seed)) for seed in range(EXAMPLES)]
    x = {name: np.stack([each[name] for each in passes]) for name in passes[0]}
    x["template_mask"][1] = 0  # an example without templates
    random = np.random.default_rng(3)
    s, e, r = (example.SIZES[name] for name in "ser")
    shapes = {
        "msa": (s, r, 256),
        "extra": (e, r, 64),
        "pair": (r, r, 128),
        "single": (r, 384),
        "initial": (r, 384),
        "small_pair": (r, r, 64),
        "frames": (r, 7),
        "points": (r, 3),
        "error_logits": (r, r, 64),
        "lddt_logits": (r, 50),
        "prev_msa_first_row": (r, 256),
        "prev_pair": (r, r, 128),
        "prev_pos": (r, 37, 3),
    }
    for name, shape in shapes.items():
        x[name] = random.standard_normal((EXAMPLES, *shape)).astype(np.float32)
    x["frames"][..., :4] /= np.linalg.norm(x["frames"][..., :4], axis=-1, keepdims=True)
    x["points"], x["prev_pos"] = 10 * x["points"], 10 * x["prev_pos"]  # angstrom
    x["extra_mask"] = x["extra_msa_mask"]
    x["pair_mask"] = x["seq_mask"][:, :, None] * x["seq_mask"][:, None]
    return x


def run(
    name: str, case: Case, params: published.Flat, inputs: Arrays, precision: str
) -> dict[str, Comparison]:
    """Compare one case's outputs."""
    own = {key: value for key, value in params.items() if in_scope(key, case.scope)}
    oracle, mine = _oracle(case, precision), _ours(case, params, precision)
    nudged: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    if precision == "float32":
        for seed in range(compare.PERTURBED_RUNS):
            nudged.append(_nudge(own, inputs, seed))
    perturbed = [oracle(*each) for each in nudged]
    results = [oracle(own, inputs), mine(own, inputs), mine(*_mutate(case, own, inputs))]
    table = {}
    for kind in results[0]:
        arrays = [unmasked(kind, each[kind], inputs) for each in results]
        runs = [unmasked(kind, each[kind], inputs) for each in perturbed]
        table[f"{name}: {kind}"] = compare.compare(*arrays, runs)
    return table


def in_scope(key: str, scope: str) -> bool:
    """Whether a parameter belongs to a scope or one below; no scope has none."""
    path = key.partition("//")[0]
    return bool(scope) and (path == scope or path.startswith(scope + "/"))


def _nudge(own: published.Flat, inputs: Arrays, seed: int) -> tuple[Arrays, Arrays]:
    """Move the parameters; where there are none, the inputs that are not masks or types."""
    if own:
        return compare.perturb(own, seed), inputs
    moved = [name for name, x in inputs.items() if x.dtype.kind == "f" and "mask" not in name]
    return {}, inputs | compare.perturb({name: inputs[name] for name in moved}, seed)


def _mutate(case: Case, own: published.Flat, inputs: Arrays) -> tuple[Arrays, Arrays]:
    """Flip the sign of parameters (of the largest), or add noise to inputs."""
    if own:
        names = case.mutate or (max(own, key=lambda key: own[key].size),)
        return {**own, **{name: -own[name] for name in names}}, inputs
    random = np.random.default_rng(4)
    noisy = {n: inputs[n] + random.standard_normal(inputs[n].shape) for n in case.mutate}
    return {}, inputs | {n: x.astype(np.float32) for n, x in noisy.items()}


def _oracle(case: Case, precision: str) -> Callable[..., Arrays]:
    """The examples one after another through DeepMind's code."""

    def one(params: Any, x: Any) -> Any:
        nested = published.cut(published.nest(params), case.scope, case.layer)
        return case.oracle(nested, x)

    compiled = one if case.in_numpy else jax.jit(one)

    def run(params: Mapping[str, Any], inputs: Arrays) -> Arrays:
        cast = _cast_numpy if case.in_numpy else published.cast
        arguments = cast(dict(params), precision), cast(inputs, precision)
        examples = []
        for index in range(EXAMPLES):
            x = {name: value[index] for name, value in arguments[1].items()}
            examples.append(compiled(arguments[0], x))
        return {kind: np.stack([each[kind] for each in examples]) for kind in examples[0]}

    return run


def _cast_numpy(arrays: Arrays, precision: str) -> Arrays:
    return {n: x.astype(precision) if x.dtype.kind == "f" else x for n, x in arrays.items()}


def _ours(case: Case, params: published.Flat, precision: str) -> Callable[..., Arrays]:
    """The same examples as one batch through our code."""

    def batch(state: Any, x: Any) -> Any:
        return case.ours(nnx.merge(graph, state), x)

    graph = nnx.split(ours.network(params))[0]
    compiled = jax.jit(batch)

    def run(own: Mapping[str, Any], inputs: Arrays) -> Arrays:
        model = ours.network(published.cast({**params, **own}, precision))
        returned = compiled(nnx.split(model)[1], published.cast(inputs, precision))
        return {kind: np.asarray(value) for kind, value in returned.items()}

    return run


def unmasked(kind: str, value: np.ndarray, inputs: Arrays) -> np.ndarray:
    """What is not padding, of a batched array whose ``kind`` names its leading axes."""
    residues = np.flatnonzero(inputs["seq_mask"][0])
    axes = kind.split()[0]
    if axes == "pair":
        return value[:, residues][:, :, residues]
    if axes in ("msa", "extra"):
        rows = np.flatnonzero(inputs[f"{axes}_mask"][0].any(axis=-1))
        return value[:, rows][:, :, residues]
    if axes == "templates":
        return value[:, :, residues]
    return value if axes == "whole" else value[:, residues]


if __name__ == "__main__":
    main(*sys.argv[1:])
