"""Counts of a distribution in a few readable classes, for bars of text and of pages."""

import numpy as np

MAX_CLASSES = 12


def histogram(values: np.ndarray) -> list[tuple[str, int]]:
    """(label, count) of each class: single numbers where they are few, else round steps.

    Wide distributions of whole numbers, such as depths of alignments, get classes that double.
    """
    low, high = float(values.min()), float(values.max())
    whole = bool((values == np.round(values)).all())
    if whole and high - low < MAX_CLASSES:
        numbers = range(int(low), int(high) + 1)
        return [(str(number), int((values == number).sum())) for number in numbers]
    if low == high:
        return [(f"{low:.3g}", len(values))]
    if whole and low >= 0 and high > 20 * max(np.median(values), 1):
        edges = _doubling(low, high)
    else:
        edges = _steps(low, high)
    counts = np.histogram(values, edges)[0]
    labels = [_label(a, b, whole) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return [(label, int(count)) for label, count in zip(labels, counts, strict=True)]


def _doubling(low: float, high: float) -> np.ndarray:
    first = 2 ** int(np.floor(np.log2(max(low, 1))))
    edges = [float(first) if low >= 1 else 0.0]
    while edges[-1] <= high:
        edges.append(edges[-1] * 2 if edges[-1] else 1.0)
    return np.array(edges)


def _steps(low: float, high: float) -> np.ndarray:
    """Steps of 1, 2, 2.5 or 5 times a power of ten."""
    rough = max(high - low, 1e-9) / (MAX_CLASSES - 2)
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough)
    start = np.floor(low / step) * step
    edges = start + step * np.arange(int(np.floor((high - start) / step)) + 2)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # whatever rounding did
    return edges


def _label(low: float, high: float, whole: bool) -> str:
    if whole and float(low).is_integer() and float(high).is_integer():
        return f"{int(low)}" if high - low == 1 else f"{int(low)}-{int(high) - 1}"
    return f"{low:.3g}-{high:.3g}"
