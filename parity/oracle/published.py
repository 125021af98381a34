"""DeepMind's side: its configuration, parameters under its names, its network and modules."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from parity.oracle import shim

shim.install()

from alphafold.common import confidence  # noqa: E402, F401
from alphafold.model import (  # noqa: E402, F401
    all_atom,
    folding,
    modules,
    quat_affine,
    r3,
    utils,
)
from alphafold.model import config as published_config  # noqa: E402

Tree = Mapping[str, Any]
Flat = dict[str, Any]
Params = dict[str, dict[str, Any]]

PREFIX = "alphafold/alphafold_iteration/"
EVOFORMER_BLOCKS, EXTRA_MSA_BLOCKS, TEMPLATE_BLOCKS, STRUCTURE_ITERATIONS = 2, 1, 1, 2


def tiny_config() -> ConfigDict:
    """The published network with templates and all heads: real widths, few blocks, no dropout."""
    config = published_config.model_config("model_1_ptm").model
    trunk = config.embeddings_and_evoformer
    trunk.evoformer_num_block = EVOFORMER_BLOCKS
    trunk.extra_msa_stack_num_block = EXTRA_MSA_BLOCKS
    trunk.template.template_pair_stack.num_block = TEMPLATE_BLOCKS
    config.heads.structure_module.num_layer = STRUCTURE_ITERATIONS
    config.heads.structure_module.compute_in_graph_metrics = False
    config.global_config.deterministic = True
    return config


def network(config: ConfigDict) -> hk.Transformed:
    """The whole training-time network with its losses, ``(outputs, [total])`` of a batch."""

    def forward(batch: Tree) -> Any:
        return modules.AlphaFold(config)(
            batch, is_training=True, compute_loss=True, return_representations=True
        )

    return hk.transform(forward)


def nest(flat: Mapping[str, Any]) -> Params:
    """Parameters as Haiku takes them, from ours: names without the common prefix."""
    params: Params = {}
    for key, value in flat.items():
        scope, name = key.split("//")
        params.setdefault(PREFIX + scope, {})[name] = value
    return params


def flatten(params: Params) -> Flat:
    """The reverse of ``nest``."""
    return {
        f"{scope.removeprefix(PREFIX)}//{name}": value
        for scope, values in params.items()
        for name, value in values.items()
    }


def read_npz(path: Path) -> Params:
    """Read a file of parameters as DeepMind's own scripts do."""
    with np.load(path) as file:
        return utils.flat_params_to_haiku({name: file[name] for name in file.files})


def write_npz(path: Path, params: Params) -> None:
    """Write a file of parameters with the keys of the published ones."""
    np.savez(path, **{f"{scope}//{n}": x for scope, xs in params.items() for n, x in xs.items()})


def cast(tree: Any, dtype: Any) -> Any:
    """Floating-point leaves in another precision."""

    def one(x: Any) -> Any:
        x = np.asarray(x)
        return x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x

    return jax.tree.map(one, tree)


def outputs(returned: Tree) -> Flat:
    """What the network returned, under the names of our outputs."""
    structure = returned["structure_module"]
    sidechains, trajectory = structure["sidechains"], structure["traj"]
    frames = jax.tree.map(lambda x: x[-1], sidechains["frames"])
    rows = quat_affine.QuatAffine.from_tensor(trajectory).rotation
    representations = dict(returned["representations"])
    return {
        "structure_module_single": representations.pop("structure_module"),
        **representations,
        "distogram_logits": returned["distogram"]["logits"],
        "masked_msa_logits": returned["masked_msa"]["logits"],
        "experimentally_resolved_logits": returned["experimentally_resolved"]["logits"],
        "plddt_logits": returned["predicted_lddt"]["logits"],
        "aligned_error_logits": returned["predicted_aligned_error"]["logits"],
        "traj": trajectory,
        "traj_rotation": jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2),
        "angles": sidechains["angles_sin_cos"],
        "unnormalized_angles": sidechains["unnormalized_angles_sin_cos"],
        "sidechain_frames_rotation": jnp.stack(frames.rot, axis=-1).reshape(-1, 8, 3, 3),
        "sidechain_frames_translation": r3.vecs_to_tensor(frames.trans),
        "final_atom14_positions": structure["final_atom14_positions"],
        "final_atom37_positions": structure["final_atom_positions"],
    }


def losses(returned: Tree) -> Flat:
    """The unweighted losses of the heads; the structure module reports a sum and three terms."""
    structure = returned["structure_module"]
    return {
        "structure_module": structure["loss"],
        "sidechain_fape": structure["sidechain_fape"],
        "chi": structure["chi_loss"],
        "angle_norm": structure["angle_norm_loss"],
        "distogram": returned["distogram"]["loss"],
        "masked_msa": returned["masked_msa"]["loss"],
        "experimentally_resolved": returned["experimentally_resolved"]["loss"],
        "plddt": returned["predicted_lddt"]["loss"],
        "aligned_error": returned["predicted_aligned_error"]["loss"],
    }


def apply_part(make: Callable[[], Any], params: Params, *args: Any, **keys: Any) -> Any:
    """Run one module, which must be called ``part``, on parameters under that name."""
    run = hk.transform(lambda: make()(*args, **keys))
    return run.apply(params, jax.random.key(0))


def cut(params: Params, scope: str, layer: int | None = None) -> Params:
    """The parameters at and below ``scope``, renamed to ``part``; one layer where stacked."""
    full = PREFIX + scope
    return {
        "part" + path.removeprefix(full): {
            name: value if layer is None else value[layer] for name, value in values.items()
        }
        for path, values in params.items()
        if path == full or path.startswith(full + "/")
    }
