"""The network learns: a reduced one fits the first 48 residues of ubiquitin from its raw files."""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
import pytest

from foldcore.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from foldcore.data.dataset import Dataset
from foldcore.data.transforms import make_example
from foldcore.evaluation import score
from jaxfold import distributed
from jaxfold.step import Network
from jaxfold.train import TrainState, make_state, train_step
from tests.toy_model import compiled

CHAIN, RESIDUES = "1ubq_A", 48
MAX_STEPS, CHECK_EVERY = 275, 25  # it takes about 150
# every part but the templates; few channels, so that two cores need a minute
MODEL = ModelConfig(
    c_m=32,
    c_z=32,
    c_s=64,
    c_e=8,
    evoformer_blocks=1,
    extra_msa_blocks=1,
    structure_iterations=3,
    msa_heads=4,
    msa_head_dim=8,
    extra_msa_heads=2,
    extra_msa_head_dim=4,
    pair_heads=4,
    pair_head_dim=8,
    outer_product_hidden=8,
    triangle_hidden=16,
    transition_factor=2,
    ipa_heads=4,
    sidechain_channels=32,
    plddt_channels=16,
    templates_enabled=False,
    dtype="float32",
    matmul_precision="ieee",
)
CONFIG = Config(
    model=MODEL,
    data=DataConfig(
        crop_size=RESIDUES,
        num_msa_clusters=4,
        num_extra_msa=4,
        num_templates=0,
        accept_unknown=True,
    ),
    loss=LossConfig(scale_by_sqrt_length=False, accept_unknown_resolution=True),
    optimizer=OptimizerConfig(
        learning_rate=5e-3, beta2=0.99, warmup_steps=10, ema_decay=0.9, ema_warmup=True
    ),
    train=TrainConfig(batch_size=1, dropout=False),
)


@pytest.fixture(autouse=True)
def _single_precision() -> Iterator[None]:
    """A float32 run, whatever precision another test has left JAX in."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)


def one_example() -> dict[str, np.ndarray]:
    """The centre of the chain with one fixed sample of its alignment, as a batch of one."""
    raw = Dataset("embedded", CONFIG.data).raw(CHAIN)
    example = make_example(raw, CONFIG.data, (0,), training=False)
    example["example_id"] = example["num_iter_recycling"] = np.int32(0)
    example["use_clamped_fape"] = np.float32(0)  # far from the truth, clamping hides the way
    return {name: np.asarray(feature)[None] for name, feature in example.items()}


def test_a_reduced_network_overfits_one_protein() -> None:
    mesh, network, host = distributed.make_mesh(1), Network(MODEL), one_example()
    batch = distributed.place(mesh, host)
    update = jax.jit(
        distributed.over_mesh(partial(train_step, network, CONFIG), mesh),
        donate_argnums=(0,),
        compiler_options={"xla_cpu_use_fusion_emitters": False},  # compiles faster
    )

    @compiled
    def predict(state: TrainState) -> jax.Array:
        return network(network.unflatten(state.ema), batch, None)["final_atom37_positions"]

    def lddt(state: TrainState) -> float:
        truth = (host["all_atom_positions"][0], host["all_atom_mask"][0])
        return score(np.asarray(predict(state))[0], *truth)["lddt_ca"]

    assert host["seq_length"] == RESIDUES and host["all_atom_mask"][0, :, 1].all()
    state = distributed.replicate(mesh, make_state(CONFIG, network))
    reached = [lddt(state)]
    assert reached[0] < 0.3
    for step in range(1, MAX_STEPS + 1):
        state, logged = update(state, batch)
        if step % CHECK_EVERY == 0:
            assert np.isfinite(logged["loss/total"])
            reached.append(lddt(state))
            if reached[-1] > 0.9:
                return
    raise AssertionError(f"lDDT-Ca every {CHECK_EVERY} steps: {reached}")
