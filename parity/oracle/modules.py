"""DeepMind's side of the cases of ``parity.module_cases``: outputs and gradients of each module."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity.case import Run
from parity.module_cases import EXAMPLES, make_parameters
from parity.module_run import Module, is_float, keep_real, weights_of
from parity.oracle import published, structure, trunk
from parity.oracle.part import Part
from parity.tracks import Arrays, Named

PARTS: dict[str, Part] = {**trunk.PARTS, **structure.PARTS}


def run(name: str, module: Module) -> Run:
    """The examples one after another through DeepMind's code, in float64."""
    part = PARTS[name]
    return _numpy_run(part, module) if part.in_numpy else _derived_run(part, module)


def _derived_run(part: Part, module: Module) -> Run:
    others = make_parameters() if part.scope else {}  # of what the case does not look at

    def run(parameters: Arrays, inputs: Arrays) -> Arrays:
        def function(own: Named, derived: Named, rest: Named, example: Any) -> Any:
            nested = published.cut(published.nest({**others, **own}), part.scope, part.layer)
            outputs = part.function(nested, {**derived, **rest})
            weights = {n: _weights(n, x) for n, x in outputs.items() if is_float(x)}
            return sum(jnp.sum(outputs[n] * w[example]) for n, w in weights.items()), outputs

        def _weights(name: str, output: Any) -> Any:
            batched = jax.ShapeDtypeStruct((EXAMPLES, *output.shape), output.dtype)
            return jnp.asarray(weights_of(name, batched, module.real(name, inputs)))

        program = jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))
        own, x = (published.cast(arrays, "float64") for arrays in (parameters, inputs))
        results = []
        for i in range(EXAMPLES):
            rest = {name: value[i] for name, value in x.items()}
            derived = {name: rest.pop(name) for name in module.derive}
            results.append(jax.device_get(program(own, derived, rest, i)))
        found = {f"output {n}": np.stack([r[0][1][n] for r in results]) for n in results[0][0][1]}
        found |= {f"gradient {n}": np.asarray(sum(r[1][0][n] for r in results)) for n in own}
        found |= {f"input {n}": np.stack([r[1][1][n] for r in results]) for n in module.derive}
        return keep_real(module, found, inputs)

    return run


def _numpy_run(part: Part, module: Module) -> Run:
    """Outputs alone: there is nothing that could derive them."""

    def run(parameters: Arrays, inputs: Arrays) -> Arrays:
        wide = {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in inputs.items()}
        examples = [
            part.function({}, {name: value[i] for name, value in wide.items()})
            for i in range(EXAMPLES)
        ]
        found = {f"output {n}": np.stack([e[n] for e in examples]) for n in examples[0]}
        return keep_real(module, found, inputs)

    return run
