"""Modules as the blocks of a stack call them: given what they derive from parameters.

A stack derives it for all its blocks at once, which is timed by itself. Parameters that are read
for it are left out.
"""

from collections.abc import Mapping
from typing import Any

import jax
import torch
from flax import nnx
from torch import Tensor
from torch.func import functional_call

import jaxfold.stack
import torchfold.stack
from parity.module_run import Module, _load_in_jax, abstract
from parity.tracks import JAX, Named


class _Derive(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> dict[str, Tensor]:
        return torchfold.stack._derive(self.module)


def in_torch(module: torch.nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by path, and what the module derives from some, in place of these."""
    own = {f"module.{path}": x.detach().requires_grad_() for path, x in parameters.items()}
    with torch.enable_grad():
        derived = functional_call(_Derive(module), own, ())
    found = {path: x.detach() for path, x in derived.items()}
    if found:
        starts = [torch.zeros_like(x) for x in derived.values()]
        read = torch.autograd.grad(
            list(derived.values()), list(own.values()), starts, allow_unused=True
        )
        pairs = zip(parameters.items(), read, strict=True)
        return {path: x for (path, x), gradient in pairs if gradient is None} | found
    return dict(parameters)


def give_in_torch(modules: Named) -> dict[str, Tensor]:
    """Give modules what they derive; the leaves by which gradients are taken."""
    leaves: dict[str, Tensor] = {}
    for key, module in modules.items():
        for path, x in in_torch(module, dict(module.named_parameters())).items():
            owner, _, name = path.rpartition(".")
            leaf = x.requires_grad_()
            leaves[f"{key}.{path}"] = leaf
            own = module.get_submodule(owner)
            if name not in dict(own.named_parameters(recurse=False)):
                setattr(own, name, leaf)
    return leaves


class InJax:
    """The modules of a case as a function of a list of arrays."""

    def __init__(self, module: Module) -> None:
        self._abstract = nnx.split(abstract(JAX, module))
        leaves = jax.tree_util.tree_flatten_with_path(self._abstract[1])[0]
        program = jax.make_jaxpr(self._derive)([leaf for _, leaf in leaves]).jaxpr
        read = {id(x) for equation in program.eqns for x in equation.invars}
        pairs = zip(leaves, program.invars, strict=True)
        self._left_out = {str(path): leaf for (path, leaf), x in pairs if id(x) in read}

    def arrays(self, parameters: Named) -> list[Any]:
        """Of parameters by name."""
        modules = nnx.merge(*self._abstract)
        _load_in_jax(modules, parameters)
        found = self._derive(jax.tree.leaves(nnx.state(modules)))
        return [x for path, x in found.items() if path not in self._left_out]

    def modules(self, arrays: list[Any]) -> Named:
        """With these arrays."""
        given = iter(arrays)
        leaves = [
            self._left_out[path] if path in self._left_out else next(given) for path in self._paths
        ]
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))

    def _derive(self, leaves: list[Any]) -> dict[str, Any]:
        """All arrays by path, those derived and those read for it as well."""
        graph, state = self._abstract
        modules = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
        self._graph, state = nnx.split(jaxfold.stack._derive(modules))
        found, self._structure = jax.tree_util.tree_flatten_with_path(state)
        self._paths = [str(path) for path, _ in found]
        return dict(zip(self._paths, (x for _, x in found), strict=True))
