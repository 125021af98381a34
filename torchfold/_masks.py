"""The generator of dropout masks, and all masks of a recycling pass from one call of it.

Drawn one by one, the masks of a pass are tens of thousands of tiny operations. Which masks a model
asks for depends on the shapes alone, so a rehearsal notes them (``MaskPlan``) and every pass draws
them together, by one kernel where these are chosen. Their bits are those of ``foldcore/dropout.py``
in any case.
"""

import itertools
import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Int32
from torch import Tensor

from foldcore import dropout as definition
from torchfold import ops
from torchfold._compiled import piece

Word = Tensor | int
Owner = tuple[str, int]  # scope and position of the block in a stack that asks
_SIGN = -(2**31)


def threefry(
    key: tuple[Word, Word], counter: tuple[Word, Word], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 with 20 rounds in int32, elementwise over broadcast tensors.

    PyTorch lacks arithmetic on unsigned words; sums and products of signed ones have the same bits.
    """
    k0, k1, x0, x1 = (_word(w, device) for w in (*key, *counter))
    keys = (k0, k1, k0 ^ k1 ^ definition.PARITY)
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(definition.GROUPS):
        for rotation in definition.ROTATIONS[group % 2]:
            x0 = x0 + x1
            # the shift to the right copies the sign, which the mask removes
            low = (x1 >> (32 - rotation)) & (2**rotation - 1)
            x1 = x0 ^ ((x1 << rotation) | low)
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + (group + 1)
    return x0, x1


def kept(bits: Int32[Tensor, "..."], rate: float) -> Bool[Tensor, "..."]:
    """Which elements are kept; ``bits`` are words of the generator."""
    # words are signed here: with the top bit turned, their order is that of unsigned ones
    return (bits ^ _SIGN) < definition.threshold(rate) + _SIGN


def _word(value: Word, device: torch.device) -> Int32[Tensor, "..."]:
    """A 32-bit word; negative numbers keep their bits."""
    if isinstance(value, int):
        return torch.full((), signed(value), dtype=torch.int32, device=device)
    return value.to(torch.int32)


def signed(value: int) -> int:
    """The signed number with the same 32 bits."""
    return (value + 2**31) % 2**32 - 2**31


class Request(NamedTuple):
    """One mask: ``shape`` is that of one example, which stands ``repeat`` times in the batch."""

    path: str
    shape: tuple[int, ...]
    rate: float
    repeat: int


class Drawn(NamedTuple):
    """One mask: which elements are kept; what to multiply by, where it was computed beside it."""

    kept: Bool[Tensor, "b ..."]
    factor: Float32[Tensor, "b ..."] | None


class Masks:
    """The masks of a pass, by who asks for them."""

    def __init__(self, by_owner: dict[Owner, dict[str, Drawn]], owner: Owner) -> None:
        self._by_owner = by_owner
        self._own = by_owner.get(owner, {})

    def of(self, owner: Owner) -> "Masks":
        """Those of one block, and no others: a compiled block sees the same names every time."""
        return Masks({owner: self._by_owner.get(owner, {})}, owner)

    def get(self, request: Request) -> Tensor:
        """The mask for this request, batch axis first."""
        return self._own[request.path].kept

    def factor(self, request: Request) -> Tensor | None:
        """1 / (1 - rate) where an element is kept, else 0; None where nobody computed it."""
        return self._own[request.path].factor


class MaskPlan:
    """Notes the masks that a model asks for; then draws them all at once."""

    def __init__(self) -> None:
        self._requests: dict[float, list[tuple[Owner, Request]]] = {}  # by rate
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._tables: dict[torch.device, tuple[Tensor, list[int], int]] = {}  # of the kernel

    def note(self, owner: Owner, request: Request) -> None:
        """Take one more mask into the plan."""
        self._requests.setdefault(request.rate, []).append((owner, request))

    def draw(
        self, seed: Word, step: Word, example_id: Int32[Tensor, " b"], recycling: Word
    ) -> Masks:
        """Every mask of a recycling pass."""
        draw = self._by_kernel if ops._chosen == "triton" else self._plain
        parts = draw(seed, step, example_id, recycling)
        drawn: dict[Owner, dict[str, Drawn]] = {}
        for (owner, request), part in zip(self._in_order(), parts, strict=True):
            factor = None if part.factor is None else _of_request(part.factor, request)
            mask = Drawn(_of_request(part.kept, request), factor)
            drawn.setdefault(owner, {})[request.path] = mask
        return Masks(drawn, ("", 0))

    def _plain(
        self, seed: Word, step: Word, example_id: Int32[Tensor, " b"], recycling: Word
    ) -> list[Drawn]:
        """Mask by mask, each as a row for every example."""
        paths, blocks = self._paths_and_blocks(example_id.device)
        streams, _ = threefry((paths, example_id), (blocks, recycling), example_id.device)
        bits = _draw_bits(streams, self._sizes(), seed, step)
        rates = list(self._requests)
        by_rate = bits.split([sum(self._sizes(rate)) for rate in rates], dim=1)
        return [
            Drawn(part, None)
            for rate, words in zip(rates, by_rate, strict=True)
            for part in kept(words, rate).split(self._sizes(rate), dim=1)
        ]

    def _by_kernel(
        self, seed: Word, step: Word, example_id: Int32[Tensor, " b"], recycling: Word
    ) -> list[Drawn]:
        """The same from one launch; the factors of all masks of a rate together."""
        from foldcore.kernels import dropout as kernel
        from torchfold._triton import call

        device = example_id.device
        if device not in self._tables:
            table, places, total = kernel.table(self._masks())
            words = [[signed(word) for word in row] for row in table]
            rows = torch.tensor(words, dtype=torch.int32, device=device)
            self._tables[device] = rows, places, total
        rows, places, total = self._tables[device]
        key = torch.stack([_word(word, device) for word in (seed, step, recycling)])
        (drawn,) = call(kernel.draw(len(rows), len(example_id), total), rows, example_id, key)
        found, counts = [], [len(requests) for requests in self._requests.values()]
        starts = [0, *itertools.accumulate(counts)]
        for rate, first, last in zip(self._requests, starts, starts[1:], strict=False):
            begin, end = places[first], places[last] if last < len(places) else total
            factors = drawn[:, begin:end].to(torch.float32) / (1 - rate)
            for place, size in zip(places[first:last], self._sizes(rate), strict=True):
                keep = drawn[:, place : place + size].view(torch.bool)
                found.append(Drawn(keep, factors[:, place - begin : place - begin + size]))
        return found

    def _masks(self) -> list[tuple[int, int, int, int]]:
        """What the kernel needs to know of each."""
        return [
            (
                definition.path_hash(request.path),
                block,
                math.prod(request.shape),
                definition.threshold(request.rate),
            )
            for (_, block), request in self._in_order()
        ]

    def _in_order(self) -> list[tuple[Owner, Request]]:
        return [both for group in self._requests.values() for both in group]

    def _all(self, rate: float | None = None) -> list[Request]:
        rates = self._requests if rate is None else [rate]
        return [request for r in rates for _, request in self._requests[r]]

    def _sizes(self, rate: float | None = None) -> list[int]:
        return [math.prod(request.shape) for request in self._all(rate)]

    def _paths_and_blocks(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Hashes of the paths and numbers of the blocks, [requests, 1]."""
        if device not in self._constants:
            hashes = [signed(definition.path_hash(request.path)) for request in self._all()]
            words = ([[h] for h in hashes], [[owner[1]] for owner, _ in self._in_order()])
            paths, blocks = (torch.tensor(w, dtype=torch.int32, device=device) for w in words)
            self._constants[device] = paths, blocks
        return self._constants[device]


def _of_request(rows: Tensor, request: Request) -> Tensor:
    mask = rows.reshape(-1, *request.shape)
    return mask.repeat_interleave(request.repeat, dim=0) if request.repeat > 1 else mask


@piece
def _draw_bits(
    streams: Int32[Tensor, "n b"], sizes: list[int], seed: Word, step: Word
) -> Int32[Tensor, "b total"]:
    """The words of ``n`` masks of these sizes, one mask after another."""
    device, batch = streams.device, streams.shape[1]
    element = torch.arange(max(sizes), dtype=torch.int32, device=device)
    elements = torch.cat([element[:size] for size in sizes])
    by_mask = [s[:, None].expand(batch, size) for s, size in zip(streams, sizes, strict=True)]
    return threefry((seed, step), (torch.cat(by_mask, dim=1), elements), device)[0]


class Rehearsal:
    """Stands where ``Masks`` do and only notes what is asked for; everything is kept."""

    def __init__(self, plan: MaskPlan, device: torch.device, owner: Owner = ("", 0)) -> None:
        self._plan, self._device, self._owner = plan, device, owner

    def of(self, owner: Owner) -> "Rehearsal":
        """The same for one block."""
        return Rehearsal(self._plan, self._device, owner)

    def get(self, request: Request) -> Tensor:
        """A mask that keeps everything."""
        self._plan.note(self._owner, request)
        return torch.ones((1, *request.shape), dtype=torch.bool, device=self._device)

    def factor(self, request: Request) -> None:
        """None, as ``Masks`` has where nobody computed it."""
