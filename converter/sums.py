"""Large square matrices that may be moved to the disk between uses, and are worked on by rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# Rows that are worked on at a time.
_ROWS = 512


def slices(n: int) -> Iterator[slice]:
    """The rows of a matrix, some at a time."""
    return (slice(start, min(start + _ROWS, n)) for start in range(0, n, _ROWS))


@dataclass(frozen=True)
class SpilledMatrix:
    """[n, n] in float64, in a file of its own."""

    path: Path
    n: int
    device: torch.device

    @classmethod
    def of(cls, matrix: torch.Tensor, path: Path) -> SpilledMatrix:
        """Write `matrix` to `path`."""
        with path.open("wb") as file:
            file.write(np.ascontiguousarray(matrix.cpu().numpy()).data)
        return cls(path, len(matrix), matrix.device)

    def rows(self, rows: slice) -> torch.Tensor:
        """Some of them, read."""
        count = (rows.stop - rows.start) * self.n
        numbers = np.fromfile(self.path, np.float64, count, offset=8 * rows.start * self.n)
        return torch.from_numpy(numbers).reshape(-1, self.n).to(self.device)

    def read(self) -> torch.Tensor:
        """All of them."""
        return self.rows(slice(0, self.n))


class HalfSums:
    """Sums over the two halves of a sample, each [n, n] in float64."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n = n
        self._device = device
        self._halves: list[torch.Tensor | SpilledMatrix | None] = [None, None]

    def add(self, half: int, product: torch.Tensor) -> None:
        """Add to one half, which is in memory."""
        known = self._halves[half]
        if known is None:
            known = self._halves[half] = torch.zeros(self.n, self.n, dtype=torch.float64, device=self._device)
        assert isinstance(known, torch.Tensor)
        # PyTorch would have all of a float32 product in float64 at once
        for rows in slices(self.n):
            known[rows] += product[rows]

    def rows(self, half: int, rows: slice) -> torch.Tensor:
        """Some rows of one half."""
        known = self._halves[half]
        if known is None:
            return torch.zeros(rows.stop - rows.start, self.n, dtype=torch.float64, device=self._device)
        return known[rows] if isinstance(known, torch.Tensor) else known.rows(rows)

    def half(self, half: int, divisor: float) -> torch.Tensor:
        """One half over `divisor`: [n, n], a copy."""
        copy = torch.empty(self.n, self.n, dtype=torch.float64, device=self._device)
        for rows in slices(self.n):
            copy[rows] = self.rows(half, rows) / divisor
        return copy

    def both(self, divisor: float) -> torch.Tensor:
        """Their sum over `divisor`: [n, n]."""
        total = self.half(0, 1)
        for rows in slices(self.n):
            total[rows] += self.rows(1, rows)
        return total.div_(divisor)

    def finite(self) -> bool:
        """Whether all of their numbers are."""
        return all(bool(torch.isfinite(self.rows(half, rows)).all())
                   for half in range(2) for rows in slices(self.n))

    def spill(self, folder: Path, name: str) -> None:
        """Move both to files in `folder`."""
        for half, known in enumerate(self._halves):
            if isinstance(known, torch.Tensor):
                self._halves[half] = SpilledMatrix.of(known, folder / f"{name}-{half}.f64")
