"""Labels of real chains against DeepMind's functions of atoms, in float64.

python -m tests.oracle_labels    prints the errors as JSON, of right and of broken inputs
"""

import json
from importlib import resources

import jax
import numpy as np

from foldcore import constants
from foldcore.data.labels import make_labels, quaternion_affine, torsion_angles
from foldcore.data.mmcif import read_structure
from parity.oracle.published import all_atom, modules, quat_affine

CHAINS = {"5pti": "A", "1ubq": "A", "1a8o": "A"}
RESIDUES = 56  # all chains are cut to this many, so that DeepMind's functions are compiled once
Arrays = dict[str, np.ndarray]


def main() -> None:
    """Errors relative to the largest value of an array, by chain and label."""
    jax.config.update("jax_enable_x64", True)
    found: dict[str, tuple[float, float]] = {}
    for pdb_id, chain_id in CHAINS.items():
        aatype, positions, mask = read(pdb_id, chain_id, "float64")
        moved = positions + 0.1 * np.random.default_rng(0).standard_normal(positions.shape)
        published = theirs(aatype, positions, mask)
        right, broken = ours(aatype, positions, mask), ours((aatype + 1) % 20, moved, mask[::-1])
        for name, exact in published.items():
            size = np.abs(exact).max()
            errors = [float(np.abs(each[name] - exact).max() / size) for each in (right, broken)]
            found[f"{pdb_id}: {name}"] = (errors[0], errors[1])
    print(json.dumps(found))


def read(pdb_id: str, chain_id: str, precision: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Types, positions and mask of an embedded chain."""
    source = resources.files("foldcore") / "data" / "embedded" / "mmcif" / f"{pdb_id}.cif.gz"
    with resources.as_file(source) as path:
        chain = read_structure(path).chain(chain_id)
    letters = chain.sequence[:RESIDUES]
    aatype = np.array([constants.restype_order[letter] for letter in letters], np.int32)
    positions, mask = (x[:RESIDUES].astype(precision) for x in (chain.positions, chain.mask))
    return aatype, positions, mask


def ours(aatype: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> Arrays:
    """Our labels; torsions where they are defined."""
    labels = make_labels(aatype, positions, mask, positions.dtype)
    sin_cos, alternative, exists = torsion_angles(aatype, positions, mask, positions.dtype)
    return {
        **{name: x for name, x in labels.items() if name.startswith(("rigid", "pseudo", "chi"))},
        "torsions": sin_cos * exists[..., None],
        "alternative torsions": alternative * exists[..., None],
        "atom37_atom_exists": labels["atom37_atom_exists"],
        "atoms through atom14": positions * mask[..., None],
        "backbone quaternion": quaternion_affine(exact_backbone(labels))[:, :4],
    }


def theirs(aatype: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> Arrays:
    """DeepMind's; what goes through atom14 and the quaternions starts from our labels."""
    torsions = all_atom.atom37_to_torsion_angles(aatype[None], positions[None], mask[None])
    torsions = {name: np.asarray(value)[0] for name, value in torsions.items()}
    sin_cos, exists = torsions["torsion_angles_sin_cos"], torsions["torsion_angles_mask"]
    beta, beta_mask = modules.pseudo_beta_fn(aatype, positions, mask)
    labels = make_labels(aatype, positions, mask, positions.dtype)
    rotation = exact_backbone(labels)[:, :9].reshape(-1, 3, 3)
    quaternion = np.asarray(quat_affine.rot_to_quat(rotation, unstack_inputs=True))
    quaternion = quaternion * np.sign(quaternion[:, :1])  # an eigenvector of either sign
    results = {
        **all_atom.atom37_to_frames(aatype, positions, mask),
        "torsions": sin_cos * exists[..., None],
        "alternative torsions": torsions["alt_torsion_angles_sin_cos"] * exists[..., None],
        "chi_angles": np.arctan2(sin_cos[:, 3:, 0], sin_cos[:, 3:, 1]) * exists[:, 3:],
        "chi_mask": exists[:, 3:],
        "pseudo_beta": beta,
        "pseudo_beta_mask": beta_mask,
        "atom37_atom_exists": published_mask()[aatype],
        "atoms through atom14": all_atom.atom14_to_atom37(labels["atom14_gt_positions"], labels),
        "backbone quaternion": quaternion,
    }
    return {name: np.asarray(value) for name, value in results.items()}


def exact_backbone(labels: Arrays) -> np.ndarray:
    """Backbone frames as exact rotations: the norms' epsilon leaves the labels 1e-9 off."""
    frames = labels["rigidgroups_gt_frames"][:, 0]
    left, _, right = np.linalg.svd(frames[:, :9].reshape(-1, 3, 3))
    return np.concatenate([(left @ right).reshape(-1, 9), frames[:, 9:]], axis=-1)


def published_mask() -> np.ndarray:
    """DeepMind's table of the atoms of each residue type, and none of an unknown one."""
    from alphafold.common import residue_constants

    return np.asarray(residue_constants.STANDARD_ATOM_MASK, np.float32)


if __name__ == "__main__":
    main()
