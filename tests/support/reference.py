"""The method once more in NumPy float64, from the formulas alone: full matrices, full SVDs, plain loops."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def singular_values(matrix: Array) -> Array:
    return np.linalg.svd(matrix, compute_uv=False)


def delta(down: Array, up: Array, scale: float) -> Array:
    return scale * (up @ down)


def best_approximation(matrix: Array, rank: int) -> Array:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def weights(values: Array, measure: str) -> list[float]:
    largest = max(float(values[0]), np.finfo(np.float64).tiny)
    return [float(v / largest) ** (2 if measure == "energy" else 1) for v in values]


def signal_count(values: Array, threshold: float, measure: str) -> int:
    """AC-LoRA Eq. 3."""
    share = weights(values, measure)
    return max(1, sum(math.fsum(share[: i + 1]) < threshold * math.fsum(share) for i in range(len(share))))


def distance_to_tie(values: Array, threshold: float, measure: str) -> float:
    """How near the threshold comes to a cumulative share, where rounding may decide."""
    share = weights(values, measure)
    total = math.fsum(share)
    return (
        min((abs(math.fsum(share[: i + 1]) / total - threshold) for i in range(len(share))), default=1.0)
        if total
        else 1.0
    )


def restart_parts(matrix: Array, count: int) -> tuple[Array, float]:
    """AC-LoRA Eq. 2: the signal, and the standard deviation of the noise to draw."""
    signal = best_approximation(matrix, count)
    noise = matrix - signal
    return signal, math.sqrt(float(((noise - noise.mean()) ** 2).mean()))


def dynamic_threshold(loss: float, epoch: float, total: float) -> float:
    """AC-LoRA Eq. 5 and 6, not clamped."""
    return 1.0 - loss ** (1.0 + epoch / total)


def effective_rank(values: Array) -> float:
    shares = [float(v) / float(values.sum()) for v in values if v > 0]
    return math.exp(-sum(p * math.log(p) for p in shares))


def smallest_reaching(values: Array, keep: float, measure: str) -> int:
    share = weights(values, measure)
    return next(k for k in range(1, len(share) + 1) if math.fsum(share[:k]) >= keep * math.fsum(share))
