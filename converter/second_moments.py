"""Second moments E[v v^T] with the shrinkage that their own noise asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .sums import HalfSums, slices

# Where sequences are not known, the two halves of a sample take turns in runs of this many rows.
_RUN = 64


@dataclass(frozen=True)
class Shrunk:
    """(1 - amount) S + amount * target, for S = E[v v^T]."""

    matrix: torch.Tensor
    """[n, n], float64, symmetric."""
    amount: float
    """In [0, 1]; 0 where S is known exactly."""
    tokens: int


class SecondMoment:
    """Accumulates E[v v^T] of row vectors in two halves, whose difference shows the noise."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.sums = HalfSums(n, device)
        self._counts = [0, 0]

    @property
    def tokens(self) -> int:
        return sum(self._counts)

    def add(self, rows: torch.Tensor, half: torch.Tensor | None = None) -> None:
        """Take rows: [tokens, n] in; `half`: [tokens], 0 or 1, says which half each belongs to.

        A sequence should be in one half whole: its tokens are correlated, and its first is often
        far from all others.
        """
        if half is None:
            half = (torch.arange(self.tokens, self.tokens + len(rows), device=rows.device) // _RUN) % 2
        for index in range(2):
            part = rows[half == index].float()
            self.sums.add(index, part.T @ part)
            self._counts[index] += len(part)

    def mean(self) -> torch.Tensor:
        """E[v v^T]: [n, n], as seen."""
        return self.sums.both(max(1, self.tokens))

    def half_mean(self, index: int) -> torch.Tensor:
        """E[v v^T] over one half: [n, n]."""
        return self.sums.half(index, max(1, self._counts[index]))

    def count(self, index: int) -> int:
        """Rows of one half."""
        return self._counts[index]

    def shrunk(self, target: torch.Tensor | None = None) -> Shrunk:
        """The mean, shrunk towards `target`: [n, n] (None: its own diagonal).

        The amount that minimises the expected squared error is the noise of the mean over its
        distance from the target (Ledoit and Wolf 2004; Schaefer and Strimmer 2005). The noise is
        measured: half the sample is compared with the other half, so correlated tokens count for
        what they are worth.
        """
        S = self.mean()
        distance = noise = 0.0
        # by rows: large matrices should not be in memory more often than they must
        for rows in slices(len(S)):
            goal = _target_rows(S, target, rows)
            distance += float((S[rows] - goal).square_().sum())
            if 0 not in self._counts:
                first, second = (self.sums.rows(half, rows) / self._counts[half] for half in range(2))
                difference = first - second
                if target is None:
                    # S and its own diagonal agree there, noise or not
                    difference.diagonal(rows.start).zero_()
                noise += float(difference.square_().sum())
        if distance == 0:
            return Shrunk(S, 0.0, self.tokens)
        amount = 1.0
        if 0 not in self._counts:
            amount = min(1.0, noise * self._counts[0] * self._counts[1] / self.tokens**2 / distance)
        for rows in slices(len(S)):
            S[rows] += amount * (_target_rows(S, target, rows) - S[rows])
        return Shrunk(S, amount, self.tokens)


def _target_rows(S: torch.Tensor, target: torch.Tensor | None, rows: slice) -> torch.Tensor:
    """Of `target`, or of S's own diagonal."""
    if target is not None:
        return target[rows]
    own = torch.zeros_like(S[rows])
    own.diagonal(rows.start).copy_(S.diagonal()[rows])
    return own
