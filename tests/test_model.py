"""The network as a whole: recycling, stacks, masks, batches, precision, gradients.

That it computes what DeepMind's code computes is tested elsewhere; here, small and fast, what that
code cannot show.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfold import ops, primitives
from jaxfold.evoformer import EvoformerStack, ExtraMSAStack
from jaxfold.model import RESAMPLED, AlphaFold, Recycled, _slot
from jaxfold.params import _places, load_parameters, parameters
from jaxfold.primitives import DropoutKey, Linear
from jaxfold.stack import run, stack
from jaxfold.template import TemplatePairStack
from tests.toy_model import CONFIG, SIZES, compiled, random_batch, random_model, random_parameters

Outputs = dict[str, np.ndarray]
REAL = slice(0, SIZES["r"] - 1)  # the last residue is padding


def key(batch: dict[str, Any]) -> DropoutKey:
    return DropoutKey(jnp.uint32(1), jnp.uint32(2), jnp.asarray(batch["example_id"]))


class Predictor:
    """The toy network as one program, which counts its compilations."""

    def __init__(self) -> None:
        self.traces = 0
        graphdef, self.state = nnx.split(random_model())

        def predict(state: Any, batch: Any, dropout: DropoutKey) -> Any:
            self.traces += 1
            return nnx.merge(graphdef, state)(batch, dropout)

        self.program = compiled(predict)

    def __call__(self, batch: dict[str, Any], dropout: DropoutKey | None = None) -> Outputs:
        outputs = self.program(self.state, batch, dropout or key(batch))
        return {name: np.asarray(value) for name, value in outputs.items()}


@pytest.fixture(scope="module")
def predict() -> Predictor:
    return Predictor()


def differs(a: Outputs, b: Outputs, name: str = "pair") -> bool:
    return bool(abs(a[name] - b[name]).max() > 1e-3 * abs(a[name]).max())


# Recycling ----------------------------------------------------------------------------------------


def test_one_program_serves_every_number_of_passes(predict: Predictor) -> None:
    outputs = [predict(random_batch(recycling=count)) for count in range(4)]
    assert predict.traces == 1
    for earlier, later in zip(outputs, outputs[1:], strict=False):
        assert differs(earlier, later)
    for output in outputs:
        assert all(np.isfinite(value).all() for value in output.values())


@pytest.mark.parametrize("changed", range(4))
def test_pass_k_reads_slot_k(predict: Predictor, changed: int) -> None:
    batch, other = random_batch(recycling=2), random_batch(recycling=2)
    sample = random_batch(seed=1)
    for name in RESAMPLED:
        if "mask" not in name:
            other[name][:, changed] = sample[name][:, changed]
    assert differs(predict(batch), predict(other)) == (changed <= 2)


def test_order_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass gets its own MSA slot, its own dropout masks, and what the one before found."""
    batch = random_batch(recycling=2)
    batch["msa_feat"][:] = np.arange(4)[None, :, None, None, None] + 1

    def record(
        self: AlphaFold, batch: Any, recycled: Recycled, dropout: DropoutKey
    ) -> dict[str, jax.Array]:
        digit = 10 * dropout.recycling + batch["msa_feat"].max()
        first_row, pair, pos = (100 * x + digit for x in recycled)
        return {"msa_first_row": first_row, "pair": pair, "final_atom37_positions": pos}

    monkeypatch.setattr(AlphaFold, "_pass", record)
    monkeypatch.setattr(AlphaFold, "_heads", lambda self, outputs: {})
    for name, value in random_model()(batch, key(batch)).items():
        assert (value == 1_12_23).all(), name  # pass 0 reads slot 0 (filled with 1), and so on


def test_rates_and_shared_axes_of_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the trunk drops out, how much, and along which axis a mask is the same."""
    found: dict[str, tuple[float, int | None]] = {}

    def record(
        update: Any, rate: float, key: DropoutKey, name: str, shared_axis: int | None = None
    ) -> Any:
        found[f"{key.scope}/{name}"] = (rate, shared_axis)
        return update

    def record_factor(
        x: Any, rate: float, key: DropoutKey, name: str, shared_axis: int | None
    ) -> None:
        record(x, rate, key, name, shared_axis)

    monkeypatch.setattr(primitives, "dropout", record)
    monkeypatch.setattr(primitives, "dropout_factor", record_factor)
    graphdef, state = nnx.split(random_model())
    batch = random_batch()
    jax.eval_shape(lambda s: nnx.merge(graphdef, s)(batch, key(batch)), state)
    pair = {
        "triangle_multiplication_outgoing": (0.25, 1),
        "triangle_multiplication_incoming": (0.25, 1),
        "triangle_attention_starting_node": (0.25, 1),
        "triangle_attention_ending_node": (0.25, 2),
    }
    both = pair | {"msa_row_attention_with_pair_bias": (0.15, 1)}
    stacks = {"template_pair_stack": pair, "extra_msa_stack": both, "evoformer_iteration": both}
    assert found == {
        f"evoformer/{stack}/{name}": value
        for stack, names in stacks.items()
        for name, value in names.items()
    }


# The batch axis and masks -------------------------------------------------------------------------


def test_examples_do_not_mix(predict: Predictor) -> None:
    batch = random_batch(recycling=1)
    swapped = predict({name: array[::-1] for name, array in batch.items()})
    for name, value in predict(batch).items():
        axis = 1 if name in ("traj", "traj_rotation", "angles", "unnormalized_angles") else 0
        expected = np.flip(value, axis)
        np.testing.assert_allclose(
            swapped[name], expected, rtol=1e-4, atol=1e-4 * abs(expected).max(), err_msg=name
        )
        assert abs(expected - value).max() > 1e-3 * abs(value).max(), name


def test_padding_does_not_reach_real_residues(predict: Predictor) -> None:
    batch, other = random_batch(recycling=1), random_batch(recycling=1)
    noise = random_batch(seed=1)
    for name in ("target_feat", "msa_feat", "extra_has_deletion", "template_pseudo_beta"):
        axis = other[name].ndim - (1 if name == "extra_has_deletion" else 2)
        index = (slice(None),) * axis + (-1,)
        other[name][index] = noise[name][index]
    other["aatype"][:, -1] = 4
    other["template_aatype"][:, :, -1] = 4
    a, b = predict(batch), predict(other)
    for name, cut in (
        ("pair", (slice(None), REAL, REAL)),
        ("single", (slice(None), REAL)),
        ("final_atom14_positions", (slice(None), REAL)),
        ("distogram_logits", (slice(None), REAL, REAL)),
    ):
        scale = abs(a[name][cut]).max()
        np.testing.assert_allclose(a[name][cut], b[name][cut], atol=1e-4 * scale, err_msg=name)
    assert differs(a, b, "single")  # the padding itself did change


def test_absent_templates_do_not_count(predict: Predictor) -> None:
    """A masked template changes nothing in the pair representation's update."""
    batch, other = random_batch(), random_batch()
    noise = random_batch(seed=1)
    for changed in (batch, other):
        changed["template_mask"][:, 1] = 0
    other["template_pseudo_beta"][:, 1] = noise["template_pseudo_beta"][:, 1]
    np.testing.assert_array_equal(predict(batch)["pair"], predict(other)["pair"])
    assert differs(predict(batch), predict(random_batch()))


# Stacks -------------------------------------------------------------------------------------------


class Layer(nnx.Module):
    """A block small enough to compile in many ways."""

    def __init__(self) -> None:
        self.linear = Linear(3, 3)

    def __call__(self, x: jax.Array, dropout: DropoutKey) -> jax.Array:
        return x + primitives.dropout(jnp.tanh(self.linear(x)), 0.5, dropout, "x")


def stack_gradient(recompute: Any = "none", unroll: bool = False) -> list[np.ndarray]:
    """Value of four layers with dropout, and the gradient by their parameters."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: stack(Layer(), 4)))
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), state)
    x = jnp.asarray(random.normal(size=(2, 3)), jnp.float32)

    def call(layer: Layer, x: jax.Array, index: jax.Array) -> jax.Array:
        ids = jnp.array([3, 4], jnp.int32)
        return layer(x, DropoutKey(jnp.uint32(1), jnp.uint32(2), ids).enter("s", index))

    def loss(state: Any) -> jax.Array:
        return jnp.sum(jnp.sin(run(nnx.merge(graphdef, state), x, call, recompute, unroll)))

    value, gradient = compiled(jax.value_and_grad(loss))(state)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((value, gradient))]


@pytest.mark.parametrize(
    ("recompute", "unroll"), [("none", True), ("block", False), ("block", True)]
)
def test_loop_unrolled_and_recomputed_agree(recompute: str, unroll: bool) -> None:
    """A block computed again meets the same dropout masks."""
    expected = stack_gradient()
    assert all((leaf != 0).any() for leaf in expected)
    for found, leaf in zip(stack_gradient(recompute, unroll), expected, strict=True):
        np.testing.assert_allclose(found, leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("unroll", [False, True])
def test_options_reach_every_stack(recompute: Any, unroll: bool) -> None:
    model = nnx.eval_shape(lambda: AlphaFold(replace(CONFIG, recompute=recompute, unroll=unroll)))
    stacks = [
        module
        for _, module in nnx.iter_graph(model)
        if isinstance(module, (EvoformerStack, ExtraMSAStack, TemplatePairStack))
    ]
    assert [(s.recompute, s.unroll) for s in stacks] == 3 * [(recompute, unroll)]


# Precision ----------------------------------------------------------------------------------------

TRUNK = ("msa", "msa_first_row", "pair", "single")


def cast(arrays: dict[str, Any], dtype: Any) -> dict[str, Any]:
    return {
        name: array.astype(dtype if name.startswith("evoformer/") else np.float32)
        for name, array in arrays.items()
    }


def test_trunk_has_the_dtype_of_its_parameters() -> None:
    trunk = jnp.bfloat16
    model = nnx.eval_shape(lambda: AlphaFold(CONFIG))
    load_parameters(model, cast(random_parameters(parameters(model)), trunk))
    graphdef, state = nnx.split(model)
    batch = random_batch()
    outputs = jax.eval_shape(lambda s: nnx.merge(graphdef, s)(batch, key(batch)), state)
    for name, value in outputs.items():
        assert value.dtype == (trunk if name in TRUNK else jnp.float32), name


def test_float64_stays_float64() -> None:
    with jax.enable_x64(True):
        model = nnx.eval_shape(lambda: AlphaFold(CONFIG))
        wide = {n: a.astype(np.float64) for n, a in random_parameters(parameters(model)).items()}
        load_parameters(model, wide)
        graphdef, state = nnx.split(model)
        batch = {
            name: array.astype(np.float64) if array.dtype == np.float32 else array
            for name, array in random_batch().items()
        }
        outputs = jax.eval_shape(lambda s: nnx.merge(graphdef, s)(batch, key(batch)), state)
    for name, value in outputs.items():
        assert value.dtype == jnp.float64, name


def test_norm_and_attention_sum_in_float32() -> None:
    x = 100 + jnp.arange(64, dtype=jnp.bfloat16)[None] / 64
    ones, zeros = jnp.ones(64, jnp.bfloat16), jnp.zeros(64, jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5)
    np.testing.assert_allclose(np.asarray(ops.layer_norm(x, ones, zeros), float), expected, 0.01)
    projected = jnp.ones((1, 1, 4096, 3), jnp.bfloat16)  # key, value and gate
    query, gate_bias = jnp.zeros((1, 1, 1, 1)), jnp.full((1, 1), 40.0)
    mean = ops.global_attention(query, projected, gate_bias, jnp.ones((1, 1, 4096)))
    assert float(mean[0, 0, 0, 0, 0]) == 1.0


# Gradients ----------------------------------------------------------------------------------------

# softmax does not see what is added to all of its logits
WITHOUT_GRADIENT = {
    "evoformer/evoformer_iteration/msa_row_attention_with_pair_bias/feat_2d_norm//offset",
    "evoformer/extra_msa_stack/msa_row_attention_with_pair_bias/feat_2d_norm//offset",
    "structure_module/fold_iteration/invariant_point_attention/attention_2d//bias",
}


def test_gradient_reaches_every_parameter() -> None:
    """Of a loss on every output of a pass."""
    model = random_model()
    graphdef, state = nnx.split(model)
    batch = _slot(random_batch(), jnp.array(0))
    # a pass after others: the recycling embedder's layer norms must not see zeros
    random = np.random.default_rng(0)
    recycled = jax.tree.map(
        lambda x: 8 * jnp.asarray(random.normal(size=x.shape), x.dtype), model._first_state(batch)
    )

    def loss(arrays: Any) -> jax.Array:
        model = nnx.merge(graphdef, state)
        load_parameters(model, arrays)
        outputs = model._pass(batch, recycled, None)
        outputs |= model._heads(outputs)
        losses = [jnp.sum(jnp.sin(value)) / value.size**0.5 for value in outputs.values()]
        return jnp.sum(jnp.stack(losses))

    gradients = compiled(jax.grad(loss))(dict(parameters(model)))
    found = {name: np.asarray(gradient) for name, gradient in gradients.items()}
    for name, gradient in found.items():
        assert np.isfinite(gradient).all(), name
    sizes = {name: float(abs(gradient).max()) for name, gradient in found.items()}
    nothing = 1e-5 * float(np.median(list(sizes.values())))
    assert {name for name, size in sizes.items() if size < nothing} == WITHOUT_GRADIENT
    for name, place in _places(model).items():  # each block of a stack is reached
        if getattr(*place).stacked and name not in WITHOUT_GRADIENT:
            by_block = abs(found[name]).reshape(len(found[name]), -1).max(axis=1)
            assert (by_block > nothing).all(), name


def test_recycling_can_be_differentiated() -> None:
    """Though the number of passes is data, which reverse mode cannot differentiate."""
    model = nnx.eval_shape(lambda: AlphaFold(replace(CONFIG, recompute="block")))
    arrays = cast(random_parameters(parameters(model)), jnp.bfloat16)
    graphdef, state = nnx.split(model)

    def loss(arrays: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graphdef, state)
        load_parameters(model, arrays)
        return jnp.sum(model(batch, key(batch))["traj"])

    gradients = jax.eval_shape(jax.grad(loss), arrays, random_batch(recycling=1))
    for name, gradient in gradients.items():
        assert (gradient.shape, gradient.dtype) == (arrays[name].shape, arrays[name].dtype)


# Choice of implementation -------------------------------------------------------------------------


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    ops.use("reference")


def test_missing_kernels_are_refused_by_name(restored: None) -> None:
    x = jnp.ones((1, 2, 2, 3))
    message = r"triangle_product\(float32\[1, 2, 2, 3\], .*'triton': there is no such kernel"
    with pytest.raises(ops.UnsupportedOp, match=message):
        ops.triangle_product(x, x, True, implementation="triton")
    ops.use("triton")
    with pytest.raises(ops.UnsupportedOp, match=message):
        ops.triangle_product(x, x, True)
    assert ops.triangle_product(x, x, True, implementation="reference").shape == x.shape
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        ops.use("fast")
