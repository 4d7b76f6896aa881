"""How many threads a sum is spread over: with another number its parts are added in another order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from threadpoolctl import threadpool_info, threadpool_limits


@dataclass(frozen=True)
class Threads:
    """Numbers of threads."""

    torch: int
    libraries: dict[str, int]
    """Of others, by the kind that threadpoolctl knows."""

    @classmethod
    def here(cls) -> Threads:
        """Those of this process."""
        import scipy.linalg  # noqa: F401 (its BLAS is among them once it is loaded)

        pools = {pool["user_api"]: pool["num_threads"] for pool in threadpool_info()}
        return cls(torch.get_num_threads(), {kind: pools[kind] for kind in ("blas",) if kind in pools})

    def __str__(self) -> str:
        others = (f"{count} of {kind}" for kind, count in self.libraries.items() if count != self.torch)
        return ", ".join([f"{self.torch} thread{'s' * (self.torch != 1)}", *others])

    @classmethod
    def told(cls, told: Mapping[str, Any]) -> Threads:
        """What `asdict` told, in JSON's types. Raises TypeError, ValueError or KeyError where it is none."""
        found = cls(told["torch"], dict(told["libraries"]))
        for count in (found.torch, *found.libraries.values()):
            if type(count) is not int or not 0 < count < 1 << 16:
                raise ValueError(count)
        return found

    @contextmanager
    def used(self) -> Iterator[None]:
        """This process computes with as many."""
        import scipy.linalg  # noqa: F401

        before = torch.get_num_threads()
        torch.set_num_threads(self.torch)
        try:
            with threadpool_limits(self.libraries):
                yield
        finally:
            torch.set_num_threads(before)
