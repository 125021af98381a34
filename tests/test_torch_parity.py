"""Both tracks compute the same: in float64, outputs and all gradients of every module agree.

Weights, inputs and dropout masks are the same; what is left is the order of sums. The algebra is
equal if the difference is 1e-9 or less of the largest value.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxfold.step
import torchfold.params
import torchfold.primitives
from foldcore import dropout as definition
from foldcore.config import LossConfig, OptimizerConfig
from foldcore.initializers import draw
from parity.oracle.example import make_batch
from tests.torch_twin import (
    JAX,
    TORCH,
    Arrays,
    Named,
    Track,
    compare,
    flatten,
    in_torch,
    nothing,
)
from tests.toy_model import CONFIG

MODEL = replace(CONFIG, dtype="float64")
LOSSES = LossConfig(violation=1.0, experimentally_resolved=0.01, aligned_error=0.1)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def batch_of(num_iter_recycling: int = 0, seed: int = 0) -> Arrays:
    return {
        name: array.astype(np.float64) if array.dtype == np.float32 else array
        for name, array in make_batch(seed, num_iter_recycling).items()
    }


def draw_inputs(**shapes: tuple[int, ...]) -> Arrays:
    """Random arrays; those named mask hold zeros and ones as integers: constants."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.random(shape) < 0.7).astype(np.int32)
        if "mask" in name
        else rng.normal(size=shape)
        for name, shape in shapes.items()
    }


def real(mask: Any) -> Any:
    """A mask as the modules expect it."""
    return mask.double() if isinstance(mask, torch.Tensor) else mask.astype(jnp.float64)


def key_of(track: Track, inputs: Named) -> Any:
    return track.primitives.DropoutKey(
        np.uint32(2**32 - 3) if track is JAX else 2**32 - 3, inputs["step"], inputs["example_id"]
    )


IDENTITY = {"step": np.array(12, np.int32), "example_id": np.array([-5, 77], np.int32)}

# Module by module ---------------------------------------------------------------------------------


def test_ops() -> None:
    def call(track: Track, modules: Named, x: Named) -> Named:
        ops, mask = track.ops, real(x["mask"])
        return {
            "layer_norm": ops.layer_norm(x["pair"], x["scale"], x["offset"]),
            "attention": ops.attention(x["q"], x["k"], x["v"], mask, x["bias"]),
            "unbiased": ops.attention(x["q"], x["k"], x["v"], mask),
            "global": ops.global_attention(x["q"][:, :, 0], x["k1"], x["v1"], mask),
            "outgoing": ops.triangle_product(x["pair"], x["other"], True),
            "incoming": ops.triangle_product(x["pair"], x["other"], False),
            "outer": ops.outer_product_mean(x["pair"], x["left"], mask, x["w"], x["offset"]),
        }

    inputs = draw_inputs(
        q=(2, 5, 4, 2, 6), k=(2, 5, 5, 2, 6), v=(2, 5, 5, 2, 6), k1=(2, 5, 5, 6), v1=(2, 5, 5, 6),
        bias=(2, 2, 4, 5), mask=(2, 5, 5), pair=(2, 5, 5, 3), other=(2, 5, 5, 3),
        left=(2, 5, 5, 4), w=(3, 4, 3), scale=(3,), offset=(3,),
    )  # fmt: skip
    inputs["mask"][0, 0] = 0  # a group without keys
    compare(nothing, call, inputs)


def test_primitives() -> None:
    def build(track: Track) -> Named:
        p = track.primitives
        return {
            "linear": p.Linear(6, 3),
            "layer_norm": p.LayerNorm(6),
            "attention": p.Attention(6, 5, 4, 2, 3),
            "ungated": p.Attention(6, 5, 4, 2, 3, gating=False),
            "global_attention": p.GlobalAttention(6, 2, 3),
            "transition": p.Transition(6, 2),
        }

    def call(track: Track, modules: Named, x: Named) -> Named:
        mask, key, drop = real(x["mask"]), key_of(track, x), track.primitives.dropout
        data = x["q"], x["kv"], mask, x["bias"]
        inner = key.enter("outer").enter("inner", 3).at_pass(2).repeat(2)
        return {
            "linear": modules["linear"](x["q"]),
            "layer_norm": modules["layer_norm"](x["q"]),
            "attention": modules["attention"](*data),
            "ungated": modules["ungated"](*data),
            "global_attention": modules["global_attention"](x["q"], real(x["q_mask"])),
            "transition": modules["transition"](x["q"]),
            "dropout": drop(x["q"], 0.3, key, "update"),
            "shared": drop(x["q"], 0.15, key, "update", shared_axis=1),
            "repeated": drop(x["four"], 0.5, inner, "update", shared_axis=2),
        }

    inputs = draw_inputs(
        q=(2, 3, 4, 6), kv=(2, 3, 5, 5), mask=(2, 3, 5), q_mask=(2, 3, 4), bias=(2, 2, 4, 5),
        four=(4, 3, 4, 6),
    )  # fmt: skip
    compare(build, call, inputs | IDENTITY)


def test_rigid() -> None:
    def call(track: Track, modules: Named, x: Named) -> Named:
        r = track.rigid
        unit = x["quaternion"] / (x["quaternion"] ** 2).sum(-1)[..., None] ** 0.5
        frames = r.Rigid(r.quaternion_to_rotation(unit), x["translation"])
        other = r.rigid_from_3_points(x["a"], x["b"], x["c"])
        groups = r.torsion_angles_to_frames(x["aatype"], frames, x["angles"])
        atom14 = r.frames_to_atom14(x["aatype"], groups)
        atom37 = r.atom14_to_atom37(atom14, x["slots"], real(x["exists_mask"]))
        return {
            "composed": frames.compose(other.invert()),
            "local": frames[..., None].invert_apply(x["a"][:, None]),
            "product": r.multiply_by_vector(x["quaternion"], x["a"]),
            "flat": r.rigid_from_flat12(x["flat"]),
            "atom37": atom37,
            "torsions": r.torsion_angles_from_atom37(x["codes"], x["atoms"], real(x["atoms_mask"])),
        }

    batch = batch_of()
    inputs = draw_inputs(
        quaternion=(1, 16, 4), translation=(1, 16, 3), a=(1, 16, 3), b=(1, 16, 3), c=(1, 16, 3),
        angles=(1, 16, 7, 2), flat=(1, 16, 12),
    )  # fmt: skip
    compare(
        nothing,
        call,
        inputs
        | {
            "aatype": batch["aatype"],
            "slots": batch["residx_atom37_to_atom14"],
            "exists_mask": batch["atom37_atom_exists"].astype(np.int32),
            "codes": batch["template_aatype"],
            "atoms": batch["template_all_atom_positions"],
            "atoms_mask": batch["template_all_atom_masks"].astype(np.int32),
        },
    )


def test_triangles() -> None:
    names = (
        "TriangleMultiplicationOutgoing",
        "TriangleMultiplicationIncoming",
        "TriangleAttentionStartingNode",
        "TriangleAttentionEndingNode",
    )

    def build(track: Track) -> Named:
        sizes = {name: (4, 3) if "Multiplication" in name else (4, 2, 3) for name in names}
        return {name: getattr(track.triangle, name)(*sizes[name]) for name in names}

    def call(track: Track, modules: Named, x: Named) -> Named:
        return {name: modules[name](x["pair"], real(x["mask"])) for name in names}

    compare(build, call, draw_inputs(pair=(2, 5, 5, 4), mask=(2, 5, 5)))


BLOCK = {
    "msa_heads": 2,
    "msa_head_dim": 3,
    "pair_heads": 2,
    "pair_head_dim": 3,
    "outer_product_hidden": 3,
    "triangle_hidden": 5,
    "transition_factor": 2,
    "msa_dropout": 0.15,
    "pair_dropout": 0.25,
}


def evoformer(track: Track, recompute: str = "none") -> Named:
    block = track.evoformer.EvoformerBlock(6, 4, **BLOCK)
    return {"stack": track.evoformer.EvoformerStack(block, 2, 6, 5, recompute=recompute)}


def call_stack(track: Track, modules: Named, x: Named) -> Any:
    masks = real(x["msa_mask"]), real(x["pair_mask"])
    return modules["stack"](x["msa"], x["pair"], *masks, key_of(track, x))


def stack_inputs() -> Arrays:
    shapes = {"msa": (2, 3, 5, 6), "pair": (2, 5, 5, 4), "msa_mask": (2, 3, 5)}
    return draw_inputs(**shapes, pair_mask=(2, 5, 5)) | IDENTITY


def test_evoformer_stack() -> None:
    compare(evoformer, call_stack, stack_inputs())


def test_recomputation_changes_nothing() -> None:
    """Recomputed blocks meet the same parameters and dropout masks again."""
    kept, again = (
        in_torch(partial(evoformer, recompute=recompute), call_stack, True)(stack_inputs())
        for recompute in ("none", "block")
    )
    assert len(kept) > 40
    for name, array in kept.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_extra_msa_stack() -> None:
    def build(track: Track) -> Named:
        block = track.evoformer.EvoformerBlock(6, 4, **BLOCK, global_column_attention=True)
        return {"stack": track.evoformer.ExtraMSAStack(block, 2)}

    compare(build, call_stack, stack_inputs())


def test_embedders_and_templates() -> None:
    def build(track: Track) -> Named:
        e, t = track.embedders, track.template
        block = t.TemplatePairBlock(
            6, num_heads=2, c_hidden=3, triangle_hidden=5, transition_factor=2, dropout_rate=0.25
        )
        return {
            "input": e.InputEmbedder(7, 4, 5),
            "recycling": e.RecyclingEmbedder(7, 4),
            "extra": e.ExtraMSAEmbedder(5),
            "angles": e.TemplateAngleEmbedder(7),
            "templates": t.TemplateEmbedding(4, 6, 2, 3, t.TemplatePairStack(block, 2)),
        }

    def call(track: Track, modules: Named, x: Named) -> Named:
        extra = "extra_msa", "extra_has_deletion", "extra_deletion_value"
        template = "aatype", "pseudo_beta", "pseudo_beta_mask", "all_atom_masks", "mask"
        atoms = "aatype", "all_atom_positions", "all_atom_masks"
        pair_mask = x["seq_mask"][:, :, None] * x["seq_mask"][:, None]
        return {
            "input": modules["input"](x["target_feat"], x["residue_index"], x["msa_feat"][:, 0]),
            "recycling": modules["recycling"](x["aatype"], x["row"], x["pair"], x["atoms"]),
            "extra": modules["extra"](*(x[name][:, 0] for name in extra)),
            "angles": modules["angles"](*(x[f"template_{name}"] for name in atoms)),
            "templates": modules["templates"](
                x["pair"],
                pair_mask,
                *(x[f"template_{name}"] for name in template),
                key_of(track, x),
            ),
        }

    batch = batch_of()
    names = (
        "target_feat residue_index msa_feat aatype seq_mask extra_msa extra_has_deletion".split()
    )
    kept = {k: v for k, v in batch.items() if k in names or k.startswith(("template_", "extra_"))}
    inputs = draw_inputs(row=(1, 16, 7), pair=(1, 16, 16, 4))
    inputs["atoms"] = batch["all_atom_positions"]
    compare(build, call, kept | inputs | IDENTITY | {"example_id": np.array([9], np.int32)})


def test_structure_module_and_heads() -> None:
    def build(track: Track) -> Named:
        heads = track.heads
        return {
            "structure": track.structure_module.StructureModule(
                6, 4, num_iterations=3, num_heads=2, c_hidden=3, num_query_points=2,
                num_value_points=3, sidechain_channels=5, dropout_rate=0.1,
            ),
            "distogram": heads.DistogramHead(4),
            "masked_msa": heads.MaskedMSAHead(6),
            "resolved": heads.ExperimentallyResolvedHead(6),
            "plddt": heads.PredictedLDDTHead(6, 5),
            "aligned_error": heads.PredictedAlignedErrorHead(4),
        }  # fmt: skip

    def call(track: Track, modules: Named, x: Named) -> Named:
        heads, key = track.heads, key_of(track, x)
        plddt = modules["plddt"](x["single"])
        aligned_error = modules["aligned_error"](x["pair"])
        return {
            "structure": modules["structure"](x["single"], x["pair"], x, key),
            "distogram": modules["distogram"](x["pair"]),
            "masked_msa": modules["masked_msa"](x["msa"]),
            "resolved": modules["resolved"](x["single"]),
            "plddt": heads.compute_plddt(plddt),
            "aligned_error": heads.compute_predicted_aligned_error(aligned_error),
            "tm_score": heads.predicted_tm_score(aligned_error, x["seq_mask"]),
        }

    batch = batch_of()
    names = "aatype residx_atom37_to_atom14 atom37_atom_exists seq_mask".split()
    inputs = draw_inputs(single=(1, 16, 6), pair=(1, 16, 16, 4), msa=(1, 3, 16, 6))
    identity = IDENTITY | {"example_id": np.array([9], np.int32)}
    compare(build, call, {k: batch[k] for k in names} | inputs | identity)


# The whole network --------------------------------------------------------------------------------


def test_the_network_its_losses_and_every_gradient() -> None:
    """Without and with recycling (one program of JAX for both), dropout on."""

    def build(track: Track) -> Named:
        return {"model": track.model.AlphaFold(MODEL)}

    def call(track: Track, modules: Named, x: Named) -> Named:
        outputs = modules["model"](x, key_of(track, x))
        return {
            "outputs": outputs,
            "losses": track.losses.alphafold_loss(outputs, x, LOSSES),
        }

    step = {"step": np.array(3, np.int32)}
    batches = batch_of(0) | step, batch_of(2, seed=1) | step
    compare(build, call, *batches, gradient_of="losses.0", by_inputs=False)


def test_a_wrong_sign_is_found() -> None:
    """The comparison above can fail: one weight of one track with another sign."""

    def build(track: Track) -> Named:
        return {"linear": track.primitives.Linear(6, 3)}

    def call(track: Track, modules: Named, x: Named) -> Any:
        sign = 1 if track is JAX else x["sign"]
        return modules["linear"](x["q"]) * sign

    inputs = draw_inputs(q=(2, 3, 4, 6)) | {"sign": np.array(1, np.int32)}
    compare(build, call, inputs)
    with pytest.raises(AssertionError, match="differs"):
        compare(build, call, inputs | {"sign": np.array(-1, np.int32)})


# Chance and the optimizer -------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "counter", "expected"), definition.TEST_VECTORS)
def test_known_answers_of_threefry(
    key: tuple[int, int], counter: tuple[int, int], expected: tuple[int, int]
) -> None:
    words = torchfold.primitives._threefry(key, counter, torch.device("cpu"))
    assert tuple(int(word) % 2**32 for word in words) == expected


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("on_device", [False, True])
def test_masks_are_the_defined_ones(rate: float, on_device: bool) -> None:
    ids = np.array([3, -7, 2**31 - 1], np.int32)
    seed, step = 2**32 - 1, 70_000
    key = torchfold.primitives.DropoutKey(
        torch.tensor(seed) if on_device else seed,
        torch.tensor(step) if on_device else step,
        torch.from_numpy(ids),
        recycling=2,
        block=47,
        scope="evoformer/a",
    )
    found = torchfold.primitives.keep_mask((3, 1, 65, 9), rate, key, "b")
    expected = definition.keep_mask(
        (3, 1, 65, 9), rate, path="evoformer/a/b", seed=seed, step=step, example_id=ids, block=47,
        recycling=2,
    )  # fmt: skip
    np.testing.assert_array_equal(found.numpy(), expected)
    # the share of ones that chance alone gives, give or take five standard deviations
    assert abs(expected.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / expected.size)


def test_initial_values_are_the_drawn_ones() -> None:
    with torch.device("meta"):
        model = TORCH.model.AlphaFold(MODEL)
    torchfold.params.initialize(model, seed=5)
    ours = jaxfold.step.Network(MODEL)
    theirs = torchfold.params.parameters(model)
    flat = ours.layout.flatten({name: p.detach().numpy() for name, p in theirs.items()})
    np.testing.assert_array_equal(flat, ours.initialize(seed=5))
    name = "evoformer/evoformer_iteration/msa_transition/transition1//weights"
    expected = draw(name, theirs[name].shape, "relu", 5, stacked=True)
    np.testing.assert_array_equal(theirs[name].detach().numpy(), expected)


def test_wrong_parameters_are_named() -> None:
    model = TORCH.primitives.Linear(3, 2)
    right = {"//weights": np.ones((3, 2)), "//bias": np.ones(2)}
    torchfold.params.load_parameters(model, right)
    for wrong, message in (
        ({"//bias": np.ones(2)}, "'//weights' is missing"),
        (right | {"//scale": np.ones(2)}, "'//scale' is not part"),
        (right | {"//bias": np.ones(3)}, r"'//bias' has shape \(3,\).*needs \(2,\)"),
    ):
        with pytest.raises(torchfold.params.ParameterError, match=message):
            torchfold.params.load_parameters(model, wrong)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(),
        OptimizerConfig(warmup_steps=0, decay_after_steps=5, ema_warmup=True, beta1=0.0),
        OptimizerConfig(warmup_start=1e-5, warmup_steps=20),
    ],
)
@pytest.mark.parametrize("step", [1, 6, 1000])
def test_the_optimizer(config: OptimizerConfig, step: int) -> None:
    def call(track: Track, modules: Named, x: Named) -> Named:
        o = track.optimizer
        clipped, norm = o.clip_by_global_norm(x["gradient"], 0.5)
        return {
            "clipped": clipped,
            "norm": norm,
            "adam": o.adam(clipped, x["mu"], x["nu"] ** 2, x["step"], config),
            "decay": o.ema_decay(x["step"], config),
            "rate": o.learning_rate(x["step"], config),
        }

    inputs = draw_inputs(gradient=(50,), mu=(50,), nu=(50,))
    with jax.disable_jit():
        ours = tracked(call, JAX, {k: jnp.asarray(v) for k, v in inputs.items()}, jnp.int32(step))
    theirs = tracked(
        call, TORCH, {k: torch.tensor(v) for k, v in inputs.items()}, torch.tensor(step)
    )
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        # schedules are float32 everywhere: two roundings may differ
        tolerance = 1e-12 if value.dtype == np.float64 else 3e-7
        np.testing.assert_allclose(theirs[name], value, rtol=tolerance, err_msg=name)


def tracked(call: Any, track: Track, inputs: Named, step: Any) -> Arrays:
    outputs = flatten(call(track, {}, inputs | {"step": step}))
    return {name: np.asarray(value) for name, value in outputs.items()}


def test_non_finite_gradients_stay_visible() -> None:
    for bad in (np.nan, np.inf):
        clipped, norm = TORCH.optimizer.clip_by_global_norm(torch.tensor([1.0, bad]), 0.1)
        assert not torch.isfinite(norm) and not torch.isfinite(clipped).all()
