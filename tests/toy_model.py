"""A network with every part but of few channels, and random batches for it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from foldcore import constants
from foldcore.config import ModelConfig
from foldcore.features import FEATURES, shape
from jaxfold.model import AlphaFold
from jaxfold.params import load_parameters, parameters

CONFIG = ModelConfig(
    c_m=12,
    c_z=8,
    c_s=10,
    c_e=6,
    c_t=8,
    evoformer_blocks=2,
    extra_msa_blocks=2,
    template_blocks=2,
    structure_iterations=2,
    msa_heads=2,
    msa_head_dim=4,
    extra_msa_heads=2,
    extra_msa_head_dim=3,
    pair_heads=2,
    pair_head_dim=4,
    template_pair_heads=2,
    template_pair_head_dim=4,
    template_pointwise_heads=2,
    template_pointwise_head_dim=4,
    outer_product_hidden=4,
    triangle_hidden=6,
    template_triangle_hidden=6,
    transition_factor=2,
    ipa_heads=2,
    ipa_scalar_dim=4,
    ipa_query_points=2,
    ipa_value_points=3,
    sidechain_channels=8,
    plddt_channels=8,
    max_relative_position=4,
    pae_enabled=True,
    dtype="float32",
)
SIZES = {"b": 2, "recycle": 4, "s": 4, "e": 5, "t": 2, "r": 7}

# these programs run once: compiling them fast matters more than running them fast
_FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def compiled(function: Callable[..., Any]) -> Any:
    """``jax.jit`` for a test."""
    return jax.jit(function, compiler_options=_FAST_COMPILE)


def random_batch(seed: int = 0, recycling: int = 0) -> dict[str, Any]:
    """Features of the right shapes and ranges; the last residue is padding."""
    random = np.random.default_rng(seed)
    batch: dict[str, Any] = {}
    for name, feature in FEATURES.items():
        full = shape(name, SIZES)
        if feature.dtype == "int32":
            batch[name] = random.integers(0, 20, full, np.int32)
        elif "mask" in name:
            batch[name] = np.ones(full, np.float32)
        else:
            batch[name] = random.normal(size=full).astype(np.float32)
    for name in ("template_pseudo_beta", "template_all_atom_positions"):
        batch[name] *= 8  # angstrom: spread over the distance bins
    batch["residue_index"] = np.arange(SIZES["r"], dtype=np.int32)[None].repeat(SIZES["b"], 0)
    batch["example_id"] = np.arange(SIZES["b"], dtype=np.int32) + 11
    batch["num_iter_recycling"][:] = recycling
    batch["atom37_atom_exists"] = constants.restype_atom37_mask[batch["aatype"]]
    batch["residx_atom37_to_atom14"] = constants.restype_atom37_to_atom14[batch["aatype"]]
    for name in ("seq_mask", "msa_mask", "extra_msa_mask", "template_pseudo_beta_mask"):
        batch[name][..., -1] = 0
    batch["template_all_atom_masks"][:, :, -1] = 0
    batch["atom37_atom_exists"][:, -1] = 0
    return batch


def random_parameters(shapes: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters that make every part of the network matter: none is zero."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name, array in shapes.items():
        around = 1.0 if name.endswith("//scale") else 0.0
        arrays[name] = (around + 0.3 * random.normal(size=array.shape)).astype(np.float32)
    return arrays


def random_model(config: ModelConfig = CONFIG) -> AlphaFold:
    """A network with random parameters."""
    model = nnx.eval_shape(lambda: AlphaFold(config))
    load_parameters(model, random_parameters(parameters(model)))
    return model
