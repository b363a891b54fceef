"""Non-negative least squares by active sets (Lawson and Hanson 1974, chapter 23), in plain Python.

Works on the normal equations of a few dozen columns, each scaled to length one.
"""

from collections.abc import Sequence

from kvarn.core.errors import ConfigError

#: gradients below this are zero: columns have length one, so this is a share of the target
TOLERANCE = 1e-10


def nnls(matrix: Sequence[Sequence[float]], target: Sequence[float]) -> list[float]:
    """The x >= 0 with the least |matrix x - target|; columns of zeros get 0."""
    if not matrix or len(matrix) != len(target):
        raise ConfigError(f"{len(matrix)} rows and {len(target)} values: nothing to fit")
    n = len(matrix[0])
    columns = [[row[j] for row in matrix] for j in range(n)]
    norms = [sum(v * v for v in column) ** 0.5 for column in columns]
    scaled = [[v / norm for v in c] if norm else c for c, norm in zip(columns, norms)]
    gram = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            gram[i][j] = gram[j][i] = sum(map(_product, scaled[i], scaled[j]))
    right = [sum(map(_product, column, target)) for column in scaled]
    x = _active_set(gram, right, [norm > 0 for norm in norms])
    return [value / norm if norm else 0.0 for value, norm in zip(x, norms)]


def _active_set(gram: list[list[float]], right: list[float], usable: list[bool]) -> list[float]:
    n = len(right)
    x = [0.0] * n
    active: list[int] = []
    scale = max((abs(v) for v in right), default=0.0) or 1.0
    for _ in range(10 * n):
        slope = [right[i] - sum(map(_product, gram[i], x)) for i in range(n)]
        free = [i for i in range(n) if usable[i] and i not in active]
        best = max(free, key=lambda i: slope[i], default=None)
        if best is None or slope[best] <= TOLERANCE * scale:
            break
        active.append(best)
        while active:
            trial = _solve(
                [[gram[i][j] for j in active] for i in active], [right[i] for i in active]
            )
            if trial is None:  # the newest column is a mixture of the others
                usable[active.pop()] = False
                continue
            if min(trial) > 0:
                x = [0.0] * n
                for i, value in zip(active, trial):
                    x[i] = value
                break
            step = min(x[i] / (x[i] - v) for i, v in zip(active, trial) if v <= 0)
            for i, value in zip(active, trial):
                x[i] += step * (value - x[i])
            gone = [i for i, v in zip(active, trial) if v <= 0 and x[i] <= TOLERANCE]
            for i in gone or [min(active, key=lambda i: x[i])]:
                x[i] = 0.0
                active.remove(i)
    return x


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gaussian elimination with row pivots; None where the matrix is singular."""
    n = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        if abs(rows[pivot][i]) < 1e-11:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, n):
            factor = rows[r][i] / rows[i][i]
            if factor:
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i])]
    x = [0.0] * n
    for i in reversed(range(n)):
        x[i] = (rows[i][n] - sum(rows[i][j] * x[j] for j in range(i + 1, n))) / rows[i][i]
    return x


def _product(a: float, b: float) -> float:
    return a * b
