"""What ``train.compile`` compiles in the PyTorch track: few programs, with the results of none."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import default_partition, nop
from torch._dynamo.backends.common import aot_autograd

from foldcore.config import Config
from tests import toy_model
from tests.test_torch_step import STEP, as_torch, flat_parameters, network_and_parameters
from torchfold import _compiled
from torchfold.losses import alphafold_loss
from torchfold.model import RESAMPLED
from torchfold.primitives import DropoutKey
from torchfold.step import Network, value_and_grad

# without gradient; with it, forward and backward
ITERATION = {"inference": 1, "forward": 1, "backward": 1}
PROGRAMS = {
    "template_pair_features": {"inference": 1},
    "_torsion_features": {"inference": 1},
    "_draw_bits": {"inference": 2},  # a kernel's work on a GPU
    "StructureModule._iteration": ITERATION,
    "StructureModule._finish": ITERATION,
    "_weighted": {"forward": 1, "backward": 1},
}


class Backend:
    """Stands where ``torch.compile`` does: counts programs; runs them operation by operation."""

    def __init__(self) -> None:
        self.programs: Counter[tuple[str, str]] = Counter()

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        name = function.__qualname__

        def counted(kind: str) -> Callable[..., Any]:
            def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
                self.programs[name, kind] += 1
                return nop(graph, inputs)

            return compiler

        backend = aot_autograd(
            fw_compiler=counted("forward"),
            bw_compiler=counted("backward"),
            inference_compiler=counted("inference"),
            partition_fn=default_partition,
        )
        return real_compile(function, backend=backend, **options)


real_compile = torch.compile


def two_passes(network: Network) -> dict[str, Any]:
    """A pass without gradient, then the loss and the gradient of the next; with dropout."""
    batch = as_torch(toy_model.random_batch())
    batch = {n: x[:1, :1] if n in RESAMPLED else x[:1] for n, x in batch.items()}
    key = DropoutKey(0, torch.tensor(STEP), batch["example_id"])
    flat = torch.from_numpy(flat_parameters(network))

    def loss(params: Any, batch: Any) -> Any:
        total, terms = alphafold_loss(network(params, batch, key), batch, Config().loss)
        return total.mean(), terms

    first = network._next_pass(flat, None, batch, None, key)
    second = network._next_pass(flat, None, batch, first, key)._asdict()
    terms, gradient = value_and_grad(loss, network)(flat, None, {**batch, **second})
    return {**second, **terms, "gradient": gradient}


@pytest.mark.slow
def test_pieces_are_few_programs_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = network_and_parameters(
        evoformer_blocks=1, extra_msa_blocks=1, template_blocks=1, structure_iterations=3
    )
    plain = two_passes(network)
    backend = Backend()
    monkeypatch.setattr(torch, "compile", backend.compile)
    monkeypatch.setattr(_compiled, "_programs", {})
    monkeypatch.setattr(_compiled, "_enabled", "structure")
    compiled = two_passes(network)
    found: dict[str, dict[str, int]] = {}
    for (name, kind), count in backend.programs.items():
        found.setdefault(name, {})[kind] = count
    assert found == PROGRAMS
    assert compiled.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5, msg=name)
