"""Our side: the same tiny network under a pure function of its parameters, and parts of it."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from foldcore.config import LossConfig, ModelConfig
from jaxfold.model import AlphaFold
from jaxfold.params import load_parameters, parameters
from parity.oracle import published

# the released configuration's weights; 2.0.0 takes the C-N length's deviation for this angle
LOSS = LossConfig(
    violation=1.0,
    experimentally_resolved=0.01,
    aligned_error=0.1,
    scale_by_sqrt_length=False,
    ca_c_n_stddev=0.014,
)
# outputs with an axis of structure iterations before the batch axis
PER_ITERATION = ("traj", "traj_rotation", "angles", "unnormalized_angles")


def tiny_config() -> ModelConfig:
    """The same sizes as ``published.tiny_config``."""
    return ModelConfig(
        evoformer_blocks=published.EVOFORMER_BLOCKS,
        extra_msa_blocks=published.EXTRA_MSA_BLOCKS,
        template_blocks=published.TEMPLATE_BLOCKS,
        structure_iterations=published.STRUCTURE_ITERATIONS,
        pae_enabled=True,
    )


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tiny network's parameters."""
    model = nnx.merge(*_abstract())
    return {name: tuple(value.shape) for name, value in parameters(model).items()}


@functools.cache
def _abstract() -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: AlphaFold(tiny_config())))


def network(params: Mapping[str, Any]) -> AlphaFold:
    """The tiny network with these parameters, which may be traced."""
    model = nnx.merge(*_abstract())
    load_parameters(model, params)
    return model


def layer(stacked: nnx.Module, index: int) -> Any:
    """One block of a stack."""
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda value: value[index], state))


def first_example(name: str, output: Any) -> Any:
    """An output without its batch axis."""
    return output[:, 0] if name in PER_ITERATION else output[0]


def head_losses(terms: Mapping[str, Any]) -> dict[str, Any]:
    """Our terms of one example, with those of the structure summed as DeepMind reports them."""
    summed = ("backbone_fape", "sidechain_fape", "chi", "angle_norm", "violation")
    structure = sum(getattr(LOSS, name) * terms[name] for name in summed)
    apart = {name: x for name, x in terms.items() if name not in ("backbone_fape", "violation")}
    return {**apart, "structure_module": structure}
