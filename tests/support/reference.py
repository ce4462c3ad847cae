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


def hard_threshold_factor(rows: int, cols: int) -> float:
    """λ(β) of Gavish and Donoho 2014 for noise of standard deviation 1, β = short / long side."""
    beta = min(rows, cols) / max(rows, cols)
    return math.sqrt(2.0 * (beta + 1.0) + 8.0 * beta / (beta + 1.0 + math.sqrt(beta * beta + 14.0 * beta + 1.0)))


def white_noise_floor(rows: int, cols: int, noise: float) -> float:
    """The optimal hard threshold of Gavish and Donoho 2014 for white noise of known standard deviation."""
    return hard_threshold_factor(rows, cols) * math.sqrt(max(rows, cols)) * noise


def noise_spectrum(values: Array, max_signal: int) -> Array:
    """ScreeNOT's noise, if the first max_signal values may be signal: these are extrapolated from the ones below."""
    edge, lower = values[max_signal], values[2 * max_signal]
    shape = [(1 - (i / max_signal) ** (2 / 3)) / (2 ** (2 / 3) - 1) for i in range(max_signal)]
    return np.array([*(edge + part * (edge - lower) for part in shape), *values[max_signal:]])


def screenot(noise: Array, aspect: float) -> float:
    """The y above the noise at which Ψ(y) = y · D'(y) / D(y) = -4, by bisection: Ψ rises. Zero noise has 0."""
    edge = float(noise[0])
    if edge == 0.0:
        return 0.0
    # For equal values and a square matrix Ψ reaches -4 at √3 times the edge, for all others below.
    low, high = 1.0, math.sqrt(3.0)
    for _ in range(60):
        middle = (low + high) / 2.0
        if middle in (low, high):
            break
        ratios = (noise / edge / middle) ** 2
        phi = float((1.0 / (1.0 - ratios)).mean())
        derivative = -float(((1.0 + ratios) / (1.0 - ratios) ** 2).mean())
        psi = derivative / phi + (aspect * derivative - (1.0 - aspect)) / (aspect * phi + (1.0 - aspect))
        low, high = (middle, high) if psi < -4.0 else (low, middle)
    return high * edge


def noise_floor(values: Array, rows: int, cols: int) -> float:
    """The singular value above which components are signal. values: all min(rows, cols) of them."""
    count = min(rows, cols)
    assert len(values) == count
    if count < 3:
        return 0.0
    few, many = max(1, count // 4), (count - 1) // 2
    if_few, if_many = (screenot(noise_spectrum(values, most), count / max(rows, cols)) for most in (few, many))
    return if_many if int((values > if_many).sum()) > few else if_few
