"""Lets DeepMind's package ``alphafold==2.0.0`` of 2021 run on current JAX, Haiku and numpy.

``install`` imports the package and hands its modules the few names that newer libraries dropped.
Nothing outside the package changes, except one switch of Haiku. The wheel also lacks two files:
placeholder strings of its TensorFlow part, and the stereochemistry table, which it gets from ours.
"""

import collections
import collections.abc
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import sys
import types
from collections.abc import Iterator
from importlib import resources
from types import ModuleType
from typing import Any

MISSING = "alphafold==2.0.0 is not installed: make oracle"
_MODULES = (
    *("all_atom", "folding", "layer_stack", "lddt", "mapping", "modules", "prng"),
    *("quat_affine", "r3", "utils"),
)
_PLACEHOLDERS = ("NUM_RES", "NUM_MSA_SEQ", "NUM_EXTRA_SEQ", "NUM_TEMPLATES")


def available() -> bool:
    """Whether the package is installed."""
    return all(importlib.util.find_spec(name) for name in ("alphafold", "haiku"))


@functools.cache
def install() -> None:
    """Make ``alphafold.common`` and ``alphafold.model`` importable and runnable."""
    import haiku as hk

    hk.vmap.require_split_rng = False  # vmap over templates says nothing about random numbers
    _provide_placeholders()
    _import_tables()
    for name in _MODULES:
        _modernise(importlib.import_module(f"alphafold.model.{name}"))


class Namespace(ModuleType):
    """A module with names added or replaced; everything else comes from the original."""

    def __init__(self, original: ModuleType, **names: Any):
        super().__init__(original.__name__)
        self.__dict__.update(names)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class _Widened(Namespace):
    """``jax.numpy`` whose ``float32`` follows the run's precision.

    The code casts some masks to float32, and constants multiplied by them. That is no statement
    about precision: in a run in float64 these casts would hide everything below 1e-7.
    """

    @property
    def float32(self) -> Any:
        """What a cast to float32 means in this run."""
        wide = self.jax_config.jax_enable_x64
        return self._original.float64 if wide else self._original.float32


def _modernise(module: ModuleType) -> None:
    """Replace what a module knows as ``jax``, ``jnp`` and ``collections``."""
    import jax
    import jax.numpy as jnp

    def index_add(x: Any, index: Any, value: Any) -> Any:
        return jnp.asarray(x).at[index].add(value)

    def clip(x: Any, a_min: Any, a_max: Any) -> Any:
        return jnp.clip(x, a_min, a_max)

    def wraps(function: Any, docstr: str | None = None) -> Any:
        del docstr
        return functools.wraps(function)

    names = {
        "jax": Namespace(
            jax,
            tree_map=jax.tree.map,
            tree_multimap=jax.tree.map,
            tree_flatten=jax.tree.flatten,
            tree_unflatten=jax.tree.unflatten,
            ops=types.SimpleNamespace(index_add=index_add),
            util=types.SimpleNamespace(wraps=wraps),
        ),
        "jnp": _Widened(jnp, clip=clip, jax_config=jax.config),
        "collections": Namespace(collections, Iterable=collections.abc.Iterable),
    }
    module.__dict__.update({name: new for name, new in names.items() if hasattr(module, name)})
    if module.__name__.endswith(".utils"):
        module.batched_gather = _gather_from_anything(module.batched_gather)  # type: ignore


def _gather_from_anything(gather: Any) -> Any:
    """``batched_gather`` of lists and numpy arrays, which JAX no longer takes.

    Lists are tables of constants: rounded to float32, as they always were in this code.
    """
    import jax.numpy as jnp

    def batched_gather(params: Any, indices: Any, axis: int = 0, batch_dims: int = 0) -> Any:
        dtype = jnp.float32 if isinstance(params, list) else None
        return gather(jnp.asarray(params, dtype), jnp.asarray(indices), axis, batch_dims)

    return batched_gather


def _provide_placeholders() -> None:
    """``alphafold.model.tf.shape_placeholders``: names of dimensions, only stored by the config."""
    package = ModuleType("alphafold.model.tf")
    package.__path__ = []
    module = ModuleType("alphafold.model.tf.shape_placeholders")
    module.__dict__.update({name: name.lower() for name in _PLACEHOLDERS})
    package.shape_placeholders = module  # type: ignore[attr-defined]
    sys.modules[package.__name__], sys.modules[module.__name__] = package, module


def _import_tables() -> None:
    """Import the chemistry tables, with ``np.int`` while they are built, and the missing file."""
    with _numpy_aliases():
        tables = importlib.import_module("alphafold.common.residue_constants")
    text = stereochemistry_text()
    tables.open = lambda path, mode: io.StringIO(text)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _numpy_aliases() -> Iterator[None]:
    import numpy as np

    np.int = int  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del np.int  # type: ignore[attr-defined]


def stereochemistry_text() -> str:
    """Bonds and angles in the layout the package parses: two tables, each ended by a dash."""
    source = resources.files("foldcore").joinpath("residue_constants.json")
    tables = json.loads(source.read_text(encoding="utf-8"))
    lines = ["Bond Residue Mean StdDev"]
    for residue, bonds in tables["residue_bonds"].items():
        lines += [f"{a}-{b} {residue} {mean!r} {stddev!r}" for a, b, mean, stddev in bonds]
    lines += ["-", "", "Angle Residue Mean StdDev"]
    for residue, angles in tables["residue_bond_angles_deg"].items():
        lines += [f"{a}-{b}-{c} {residue} {mean!r} {std!r}" for a, b, c, mean, std in angles]
    return "\n".join([*lines, "-"])
