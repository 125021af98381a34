"""Training steps of both tracks, by what trains them: ``train_step`` in a ``CompiledStep``."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from foldcore.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from foldcore.data.loader import open_loader
from parity.case import Setting, draw, rounded
from parity.tracks import JAX, Arrays, Track, to_numpy

SPREAD = 0.2  # of weights that start at zero, in units of 1 / sqrt(fan-in)
ANGLES = "structure_module/fold_iteration/rigid_sidechain/unnormalized_angles//"
TURN = 0.25  # of the initial weights of raw torsions, beside offsets of length 1
SECTIONS = ("params", "mu", "nu", "ema")

SMALL = Config(
    model=ModelConfig(
        c_m=12,
        c_z=8,
        c_s=8,
        c_e=6,
        c_t=8,
        evoformer_blocks=2,
        extra_msa_blocks=1,
        template_blocks=1,
        structure_iterations=2,
        msa_heads=2,
        msa_head_dim=4,
        extra_msa_heads=2,
        extra_msa_head_dim=4,
        pair_heads=2,
        pair_head_dim=4,
        template_pair_heads=2,
        template_pair_head_dim=4,
        template_pointwise_heads=2,
        template_pointwise_head_dim=4,
        outer_product_hidden=4,
        triangle_hidden=6,
        template_triangle_hidden=6,
        ipa_heads=2,
        ipa_scalar_dim=4,
        ipa_query_points=2,
        ipa_value_points=2,
        sidechain_channels=8,
        plddt_channels=8,
        pae_enabled=True,
        matmul_precision="ieee",
    ),
    data=DataConfig(
        crop_size=16,
        num_msa_clusters=6,
        num_extra_msa=8,
        num_templates=2,
        unclamped_fraction=0.5,
        accept_unknown=True,
        workers=0,
    ),
    loss=LossConfig(
        violation=0.1,
        experimentally_resolved=0.01,
        aligned_error=0.1,
        accept_unknown_resolution=True,
    ),
    # a power of two: the rate is then the same number however its division is compiled
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=16, ema_decay=0.9, ema_warmup=True),
    train=TrainConfig(name="parity", batch_size=1, seed=7),
)


def with_setting(config: Config, setting: Setting) -> Config:
    """The configuration in a precision and an implementation."""
    model = replace(config.model, dtype=setting.dtype, implementation=setting.implementation)
    return replace(config, model=model)


def some_way_on(config: Config) -> Arrays:
    """The initial parameters, and small ones where these are zero: then every part matters."""

    def moved(name: str, array: np.ndarray) -> np.ndarray:
        if array.any() or not name.endswith(("weights", "_w")):
            return array
        return draw(name, array.shape, SPREAD / np.prod(array.shape[-3:-1]) ** 0.5)

    network = JAX.step.Network(replace(config.model, dtype="float32"))
    named = network.layout.unflatten(network.initialize(config.train.seed))
    return {name: moved(name, array) for name, array in named.items()} | _torsions(named)


def _torsions(named: Arrays) -> Arrays:
    """Parameters that make raw (sin, cos) about as long as training does: 1.

    These are divided by their length, so that gradients grow as its inverse. Initial parameters
    leave some of thousands close to zero, where a little noise decides how large all gradients are.
    """
    weights, offset = named[f"{ANGLES}weights"], draw(f"{ANGLES}bias", (7, 2))
    offset /= np.linalg.norm(offset, axis=-1, keepdims=True)
    return {f"{ANGLES}weights": weights * TURN, f"{ANGLES}bias": rounded(offset.ravel())}


def batches(config: Config) -> Iterator[Arrays]:
    """What the loader gives a run of this configuration."""
    with open_loader(config, warn=lambda message: None) as loader:
        yield from loader


class Observed:
    """A network that keeps the outputs of its last call."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self.outputs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __call__(self, *arguments: Any) -> Any:
        self.outputs = self._network(*arguments)
        return self.outputs


class Program:
    """The compiled training step of one track; the model's outputs are among what it logs."""

    def __init__(self, track: Track, config: Config, setting: Setting) -> None:
        config = with_setting(config, setting)
        self.track, self.config, self.setting = track, config, setting
        self.network = Observed(track.step.Network(config.model))
        track.distributed.initialize()
        self.mesh = track.distributed.make_mesh(config.train.batch_size)
        function = functools.partial(self._observe, self.network, config)
        self._step = track.step.CompiledStep(function, config, self.mesh, donate=True)

    @property
    def layout(self) -> Any:
        """Of the flat buffers."""
        return self.network.layout

    def state(self, step: int, **sections: np.ndarray) -> Any:
        """A state on the device; buffers are flat."""
        # JAX may take an array on the host as it is, and then give its memory to the next state
        copy = self.setting.device == "cpu"
        wide = {n: x.astype(self.setting.wide, copy=copy) for n, x in sections.items()}
        host = self.track.train.TrainState(**wide, step=np.asarray(step, np.int32))
        return self.network.with_rounded(self.track.distributed.replicate(self.mesh, host))

    def __call__(self, state: Any, batch: Arrays) -> tuple[Any, dict[str, Any]]:
        """The next state, and what is logged; ``state`` is used up."""
        wide = self.setting.wide
        cast = {n: x.astype(wide) if x.dtype == np.float32 else x for n, x in batch.items()}
        self.track.ops.use(self.setting.implementation)
        try:
            return self._step(state, self.track.distributed.place(self.mesh, cast))
        finally:
            self.track.ops.use("reference")

    def fetch(self, tree: Any) -> Any:
        """On the host, bfloat16 outputs included."""
        return jax.tree.map(to_numpy, tree)

    def _observe(self, network: Any, config: Config, state: Any, batch: Any) -> Any:
        """``train_step`` with a ``loss_fn`` that also logs the outputs."""
        train = self.track.train
        original = train.loss_fn

        def loss_fn(*arguments: Any) -> Any:
            loss, logged = original(*arguments)
            return loss, logged | {f"output {n}": x for n, x in network.outputs.items()}

        train.loss_fn = loss_fn
        try:
            return train.train_step(network, config, state, batch)
        finally:
            train.loss_fn = original


@functools.cache
def program(package: str, config: Config, setting: Setting) -> Program:
    """Compiled once for all cases of a process."""
    return Program(Track(package), config, setting)
