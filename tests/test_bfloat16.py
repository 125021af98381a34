"""bfloat16 in the trunk: sums and statistics are wider; a gradient is off by no more than noise.

The yardstick of the gradient is measured, not chosen: how far the float32 gradient moves when every
parameter and input moves by half a unit in bfloat16's last place, which is what rounding them does.
One gradient says little, because its noise of some percent hides a factor that is wrong by as much.
But noise points anywhere, and a fault always the same way: compared is the part of the error that
lies along the exact gradient, over many draws.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jaxfold.ops
import jaxfold.primitives
import torchfold.ops
from jaxfold.evoformer import EvoformerBlock
from jaxfold.params import load_parameters, parameters
from tests.toy_model import compiled

EPS = 2.0**-8  # largest relative error of rounding to bfloat16
NOISE = 4.0  # how many times the noise an error may be, as in the tests against DeepMind's code
DRAWS, PERTURBED = 48, 3
C_M, C_Z = 32, 16
ROWS, LENGTH = 6, 12
MSA, PAIR = (1, ROWS, LENGTH, C_M), (1, LENGTH, LENGTH, C_Z)

Arrays = dict[str, np.ndarray]  # the first axis is that of the draws
Draws = tuple[Arrays, Arrays]  # parameters; inputs and the weights of the outputs in the loss
Gradient = Callable[[Draws], Arrays]


def rounded(x: np.ndarray) -> np.ndarray:
    """The nearest values that bfloat16 has, as float32."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


# The gradient of a block --------------------------------------------------------------------------


def block() -> EvoformerBlock:
    return EvoformerBlock(
        C_M,
        C_Z,
        msa_heads=4,
        msa_head_dim=8,
        pair_heads=2,
        pair_head_dim=8,
        outer_product_hidden=8,
        triangle_hidden=16,
        transition_factor=2,
        msa_dropout=0.15,
        pair_dropout=0.25,
    )


def gradient(dtype: Any) -> Gradient:
    """By the parameters of a block that computes in ``dtype``, as one program."""
    graphdef, state = nnx.split(nnx.eval_shape(block))

    def loss(arrays: dict[str, Any], data: dict[str, Any]) -> jax.Array:
        model = nnx.merge(graphdef, state)
        load_parameters(model, {name: array.astype(dtype) for name, array in arrays.items()})
        msa, pair = (data[name].astype(dtype) for name in ("msa", "pair"))
        msa, pair = model(msa, pair, jnp.ones(MSA[:3]), jnp.ones(PAIR[:3]))
        return jnp.sum(msa * data["by_msa"]) + jnp.sum(pair * data["by_pair"])

    program = compiled(jax.vmap(jax.grad(loss)))
    return lambda draws: {n: np.asarray(g, np.float64) for n, g in program(*draws).items()}


def draw() -> Draws:
    """Parameters that keep activations near unit size; values that bfloat16 has."""
    random = np.random.default_rng(0)
    arrays = {}
    for name, parameter in parameters(nnx.eval_shape(block)).items():
        shape = parameter.shape
        value = random.normal(size=(DRAWS, *shape))
        if len(shape) == 1 or name.endswith("_b"):
            value = 0.3 * value + (1 if name.endswith("scale") else 0)
        else:
            value /= np.sqrt(np.prod(shape[:-1]) if name.endswith("output_w") else shape[0])
        arrays[name] = rounded(value)
    shapes = {"msa": MSA, "pair": PAIR, "by_msa": MSA, "by_pair": PAIR}
    data = {name: rounded(random.normal(size=(DRAWS, *s))) for name, s in shapes.items()}
    return arrays, data


def perturb(draws: Draws, seed: int) -> Draws:
    """Parameters and inputs moved by half a unit in bfloat16's last place, up or down."""
    random = np.random.default_rng(seed)

    def move(x: np.ndarray) -> np.ndarray:
        half = np.spacing(np.abs(x)) * 2.0**16 / 2  # 16 bits fewer than float32
        return (x + half * random.choice([-1, 1], x.shape)).astype(np.float32)

    arrays, data = draws
    moved = {name: move(data[name]) for name in ("msa", "pair")}
    return {name: move(array) for name, array in arrays.items()}, data | moved


def without_gradient(name: str) -> bool:
    """Softmax does not see what is added to all of its logits."""
    return name.endswith("feat_2d_norm//offset")


class Yardstick:
    """Exact gradients of many draws, and how much of each array's is noise."""

    def __init__(self) -> None:
        exact = gradient(jnp.float32)
        self.draws = draw()
        self.exact = exact(self.draws)
        runs = [self.along(exact(perturb(self.draws, seed))) for seed in range(1, PERTURBED + 1)]
        self.noise = root_mean_square([list(run.values()) for run in runs])

    def along(self, found: Arrays) -> dict[str, float]:
        """By how much of itself the gradient by each array is too long."""
        return {
            name: float(np.vdot(found[name] - exact, exact) / np.vdot(exact, exact))
            for name, exact in self.exact.items()
            if not without_gradient(name)
        }

    def error(self, found: Arrays) -> float:
        """Of a gradient, over all arrays, in units of the noise."""
        return root_mean_square(list(self.along(found).values())) / self.noise


def root_mean_square(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.fixture(scope="module")
def yardstick() -> Yardstick:
    return Yardstick()


@pytest.fixture(scope="module")
def low() -> Gradient:
    return gradient(jnp.bfloat16)


def test_gradient_of_a_block_is_off_by_noise_alone(yardstick: Yardstick, low: Gradient) -> None:
    found = low(yardstick.draws)
    assert 0.1 < yardstick.error(found) < NOISE  # below: it did not compute in bfloat16
    for name in filter(without_gradient, found):  # nothing to be relative to but its neighbour
        size, near = (np.linalg.norm(found[n]) for n in (name, name.replace("offset", "scale")))
        assert size < NOISE * EPS * near, name


def test_queries_scaled_5_percent_too_much_are_noticed(yardstick: Yardstick, low: Gradient) -> None:
    """The fault is put into the weights, and its factor into their gradient."""
    arrays, data = yardstick.draws
    wrong = {name: 1.05 if name.endswith("query_w") else 1.0 for name in arrays}
    found = low(({name: array * wrong[name] for name, array in arrays.items()}, data))
    found = {name: array * wrong[name] for name, array in found.items()}
    assert yardstick.error(found) > NOISE


# Sums and statistics, in both tracks --------------------------------------------------------------


def jax_op(name: str, *arrays: np.ndarray) -> np.ndarray:
    operands = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    return np.asarray(getattr(jaxfold.ops, name)(*operands), np.float64)


def torch_op(name: str, *arrays: np.ndarray) -> np.ndarray:
    operands = [torch.as_tensor(x).to(torch.bfloat16) for x in arrays]
    return getattr(torchfold.ops, name)(*operands).double().numpy()


def narrow_layer_norm(name: str, *arrays: np.ndarray) -> np.ndarray:
    """A fault: mean and variance as bfloat16."""
    x, scale, offset = (jnp.asarray(a, jnp.bfloat16) for a in arrays)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return np.asarray(centred * jax.lax.rsqrt(variance) * scale + offset, np.float64)


def narrow_attention(name: str, *arrays: np.ndarray) -> np.ndarray:
    """A fault: the logits as bfloat16."""
    query, _, key, value = jnp.unstack(jnp.asarray(arrays[0], jnp.bfloat16), axis=3)
    weights = jax.nn.softmax(jnp.einsum("bgqhd,bgkhd->bghqk", query, key), axis=-1)
    return np.asarray(jnp.einsum("bghqk,bgkhd->bgqhd", weights, value), np.float64)


def layer_norm_error(op: Callable[..., np.ndarray]) -> float:
    """Largest error in units of the only rounding there should be, that of the result."""
    random = np.random.default_rng(0)
    x = rounded(8 + random.normal(size=(64, 128)))
    scale, offset = rounded(random.normal(size=128)), np.zeros(128, np.float32)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    exact = centred / np.sqrt(wide.var(axis=1, keepdims=True) + jaxfold.ops.LAYER_NORM_EPS) * scale
    error = abs(op("layer_norm", x, scale, offset) - exact)
    return float((error / (EPS * abs(exact) + 1e-5)).max())  # float32 has some 1e-6 of its own


def attention_error(op: Callable[..., np.ndarray]) -> float:
    """Largest error in units of the roundings there should be: of weights and of the result."""
    random = np.random.default_rng(0)
    projected = rounded(random.normal(size=(1, 4, 48, 4, 2, 32)))
    projected[:, :, :, 1] = 0  # gates, which their bias opens
    query, _, key, value = np.moveaxis(projected, 3, 0)
    logits = np.einsum("bgqhd,bgkhd->bghqk", query, key, dtype=np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    exact, size = (np.einsum("bghqk,bgkhd->bgqhd", weights, v) for v in (value, abs(value)))
    gate_bias, mask = np.full((2, 32), 40.0, np.float32), np.ones((1, 4, 48), np.float32)
    error = abs(op("gated_attention", projected, gate_bias, mask) - exact)
    return float((error / (EPS * (size + abs(exact)) + 1e-5)).max())


@pytest.mark.parametrize("op", [jax_op, torch_op])
def test_layer_norm_and_attention_round_at_the_end(op: Callable[..., np.ndarray]) -> None:
    assert layer_norm_error(op) <= 1
    assert attention_error(op) <= 1


def test_statistics_in_bfloat16_are_noticed() -> None:
    assert layer_norm_error(narrow_layer_norm) > 2
    assert attention_error(narrow_attention) > 2


def test_factors_are_not_rounded() -> None:
    """As PyTorch multiplies by a number: in float32."""
    x = 1 + np.arange(128, dtype=np.float32)[None] / 128  # one value for each significand
    low, rate = jnp.asarray(x, jnp.bfloat16), 0.15
    key = jaxfold.primitives.DropoutKey(0, jnp.int32(1), jnp.zeros(1, jnp.int32))
    found = np.asarray(jaxfold.primitives.dropout(low, rate, key, "update"), np.float32)
    kept, expected = found != 0, rounded(x / np.float32(1 - rate))
    np.testing.assert_array_equal(found[kept], expected[kept])
    assert (np.asarray(low / (1 - rate), np.float32) != expected)[kept].any()  # JAX's own does
