"""Least squares with coefficients of at least zero (Lawson and Hanson's active set), so that scipy is not needed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def nonnegative_least_squares(matrix: FloatArray, target: FloatArray) -> FloatArray:
    """Minimise ``|matrix @ x - target|`` over x >= 0.

    Columns are scaled to unit length first, so coefficients of very different size (s per token squared beside s per
    micro-batch) do not spoil the numbers.

    Args:
        matrix: Shape [rows, columns].
        target: Shape [rows].

    Returns:
        The coefficients, shape [columns]; 0 for columns of zeros.

    Source:
        C. Lawson and R. Hanson, Solving Least Squares Problems (1974), chapter 23.
    """
    norms = np.linalg.norm(matrix, axis=0)
    scaled = matrix / np.where(norms > 0, norms, 1.0)
    num_columns = matrix.shape[1]
    x = np.zeros(num_columns)
    active = np.zeros(num_columns, dtype=bool)
    tolerance = 1e-12 * max(1.0, float(np.linalg.norm(target)))
    # Each round adds a column; the classical limit of rounds guards against cycling in the last digits.
    for _ in range(3 * num_columns + 10):
        gradient = scaled.T @ (target - scaled @ x)
        candidates = ~active & (norms > 0) & (gradient > tolerance)
        if not candidates.any():
            break
        active[int(np.argmax(np.where(candidates, gradient, -np.inf)))] = True
        while True:
            solution = np.zeros(num_columns)
            solution[active] = np.linalg.lstsq(scaled[:, active], target, rcond=None)[0]
            negative = active & (solution <= 0)
            if not negative.any():
                x = solution
                break
            steps = x[negative] / np.maximum(x[negative] - solution[negative], 1e-300)
            x = x + float(np.min(steps)) * (solution - x)
            active &= x > 1e-15
            x[~active] = 0.0
    return np.where(norms > 0, x / np.where(norms > 0, norms, 1.0), 0.0)
