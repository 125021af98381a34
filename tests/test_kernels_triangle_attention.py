"""Triangle attention by kernels, as modules: along columns it is that along rows, transposed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import kernel_checks
from tests.kernel_checks import normal
from tests.test_kernels_rows import poisoned  # noqa: F401, a fixture
from torchfold import ops, triangle
from torchfold.primitives import Attention

BFLOAT16 = torch.bfloat16
C, HEADS, WIDTH = 24, 2, 16
KINDS = {
    "starting": triangle.TriangleAttentionStartingNode,
    "ending": triangle.TriangleAttentionEndingNode,
}


def arrays(b: int, n: int, shared: int) -> dict[str, Tensor]:
    """Random arrays of a module, of pairs that are not symmetric, and of its input; some pairs are
    masked, one way only, and all of one row and of one column."""
    generator = torch.Generator().manual_seed(n + shared)
    mask = (torch.rand((b, n, n), generator=generator) > 0.2).float()
    if n > 2:
        mask[0, 1], mask[0, :, 2] = 0, 0
    named = {
        "pair": normal(generator, b, n, n, C) * 2 + 1,
        "pair_mask": mask,
        "query_norm.scale": normal(generator, C),
        "query_norm.offset": normal(generator, C),
        "feat_2d_weights": normal(generator, C, HEADS, scale=C**-0.5),
        "attention.output_w": normal(generator, HEADS, WIDTH, C, scale=WIDTH**-0.5),
        "attention.output_b": normal(generator, C),
        "attention.gating_b": normal(generator, HEADS, WIDTH),
        "seed": normal(generator, b, n, n, C),
    }
    for name in ("query", "key", "value", "gating"):
        named[f"attention.{name}_w"] = normal(generator, C, HEADS, WIDTH, scale=C**-0.5)
    if shared:
        shape = [b, n, n, C]
        shape[shared] = 1
        named["factor"] = (torch.rand(shape, generator=generator) > 0.25) / 0.75
    return named


def with_kernels(kind: str, given: dict[str, Tensor], residual: bool) -> Tensor:
    inputs = {name: given.pop(name) for name in ("pair", "pair_mask", "factor") if name in given}
    module: Any = KINDS[kind](C, HEADS, WIDTH)
    call = (inputs.pop("pair"), inputs.pop("pair_mask"))
    before = ops._chosen
    ops.use("triton")
    try:
        return torch.func.functional_call(
            module, given, call, {"residual": residual, **inputs}, strict=True
        )
    finally:
        ops.use(before)


def plain(kind: str, given: dict[str, Tensor], residual: bool) -> Tensor:
    """As the supplement has it (Alg. 13 and 14), with sums over all that are named."""
    pair, mask = given["pair"], given["pair_mask"]
    w = {name.rpartition(".")[2]: x for name, x in given.items()}
    z = ops.layer_norm(pair, w["scale"], w["offset"], implementation="reference")
    query, key, value, gate = (
        torch.einsum("bijc,chd->bijhd", z, w[f"{name}_w"])
        for name in ("query", "key", "value", "gating")
    )
    bias = torch.einsum("bijc,ch->bijh", z, w["feat_2d_weights"])
    if kind == "starting":  # ij to ik, with the bias of jk
        logits = torch.einsum("bijhd,bikhd->bijkh", query, key) * WIDTH**-0.5 + bias[:, None]
        kept = mask[:, :, None, :, None]
    else:  # ij to kj, with the bias of ki
        logits = torch.einsum("bijhd,bkjhd->bijkh", query, key) * WIDTH**-0.5
        logits = logits + bias.transpose(1, 2)[:, :, None]
        kept = mask.transpose(1, 2)[:, None, :, :, None]
    weights = torch.softmax(torch.where(kept > 0, logits, ops.MASKED_LOGIT), dim=3)
    equation = "bijkh,bikhd->bijhd" if kind == "starting" else "bijkh,bkjhd->bijhd"
    gathered = torch.einsum(equation, weights.to(value.dtype), value)
    gathered = gathered * torch.sigmoid(gate + w["gating_b"])
    update = torch.einsum("bijhd,hdc->bijc", gathered, w["output_w"]) + w["output_b"]
    return ops.apply_update(pair, update, given.get("factor"), residual)


def check(kind: str, given: dict[str, Tensor], residual: bool, dtype: torch.dtype) -> None:
    def run(implementation: str, **given: Tensor) -> Tensor:
        function = with_kernels if implementation == "triton" else plain
        return function(kind, given, residual)

    kernel_checks.check(run, given, dtype, constant=("pair_mask", "factor"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("b", "n", "shared", "residual"), [(1, 2, 0, True), (2, 7, 1, False), (1, 37, 2, True)]
)
def test_any_size(kind: str, b: int, n: int, shared: int, residual: bool) -> None:
    check(kind, arrays(b, n, shared), residual, torch.float32)


@pytest.mark.parametrize("shared", [0, 2])
def test_ending_in_bfloat16(shared: int) -> None:
    check("ending", arrays(1, 16, shared), True, BFLOAT16)


@pytest.mark.parametrize("wrong", ["mask", "bias", "update"])
def test_a_table_that_is_transposed_once_too_often_is_seen(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the mask, of the bias, or of the result."""
    within = Attention.within

    def broken(self: Attention, x: Tensor, mask: Tensor, base: Tensor, *rest: Any, **options: Any):  # type: ignore[no-untyped-def]
        (bias,) = rest
        mask, bias = mask.mT if wrong == "mask" else mask, bias.mT if wrong == "bias" else bias
        if wrong == "update":
            options["transposed"] = not options["transposed"]
        return within(self, x, mask, base, bias, **options)

    monkeypatch.setattr(Attention, "within", broken)
    for kind in KINDS:
        with pytest.raises(AssertionError, match="result: .*expected less than"):
            check(kind, arrays(1, 7, 2), True, torch.float32)


@pytest.mark.parametrize(("kind", "expected"), [("starting", []), ("ending", [(1, 9, 9)])])
def test_only_the_mask_is_transposed(
    kind: str, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once: every kernel takes what others left as it is."""
    copied = []

    def contiguous(x: Tensor) -> Tensor:
        if not is_contiguous(x):
            copied.append(tuple(x.shape))
        return as_it_is(x)

    is_contiguous, as_it_is = Tensor.is_contiguous, Tensor.contiguous
    given = {k: x.to(kernel_checks.DEVICE) for k, x in arrays(1, 9, 2).items()}
    seed = given.pop("seed")
    leaves = {k: x.clone().requires_grad_(k != "pair_mask") for k, x in given.items()}
    monkeypatch.setattr(Tensor, "contiguous", contiguous)
    with_kernels(kind, leaves, True).backward(seed)
    assert copied == expected
