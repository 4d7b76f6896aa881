"""Hidden states, or gradients with respect to them, of every batch at one place of a model, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod
from typing import Protocol

import numpy as np
import torch

from .block_chain import BlockChain, Recorded
from .calibration import Batch
from .job import Job

Put = Callable[[torch.Tensor], None]


class States(Protocol):
    """Float32 tensors of the same shapes under every name, one for each batch."""

    def writing(self, name: str) -> AbstractContextManager[Put]:
        """Takes the batches in their order; they are there under `name` once it ends without an error."""

    def read(self, name: str, number: int) -> torch.Tensor:
        """What was put at this place."""

    def has(self, name: str) -> bool: ...

    def drop(self, name: str) -> None: ...


class MemoryStates:
    """For who resumes nothing."""

    def __init__(self) -> None:
        self._known: dict[str, list[torch.Tensor]] = {}

    @contextmanager
    def writing(self, name: str) -> Iterator[Put]:
        batches: list[torch.Tensor] = []
        yield batches.append
        self._known[name] = batches

    def read(self, name: str, number: int) -> torch.Tensor:
        return self._known[name][number]

    def has(self, name: str) -> bool:
        return name in self._known

    def drop(self, name: str) -> None:
        self._known.pop(name, None)


class DiskStates:
    """Artifacts of a job: the numbers of one batch after another."""

    def __init__(self, job: Job, shapes: list[tuple[int, ...]], device: torch.device) -> None:
        self._job = job
        self._shapes = shapes
        self._device = device
        sizes = [4 * prod(shape) for shape in shapes]
        self._starts = [sum(sizes[:number]) for number in range(len(sizes))]

    @contextmanager
    def writing(self, name: str) -> Iterator[Put]:
        with self._job.artifact(states_artifact(name)) as path, path.open("wb") as file:

            def put(batch: torch.Tensor) -> None:
                assert batch.dtype == torch.float32
                file.write(np.ascontiguousarray(batch.detach().cpu().numpy()).data)

            yield put

    def read(self, name: str, number: int) -> torch.Tensor:
        shape = self._shapes[number]
        artifact = states_artifact(name)
        with self._job.reading(artifact):
            numbers = np.fromfile(self._job.path(artifact), np.float32, prod(shape),
                                  offset=self._starts[number]).reshape(shape)
        return torch.from_numpy(numbers).to(self._device)

    def has(self, name: str) -> bool:
        return self._job.has(states_artifact(name))

    def drop(self, name: str) -> None:
        self._job.drop(states_artifact(name))


def open_states(
    chain: BlockChain, batches: Sequence[Batch], job: Job | None, first: str
) -> tuple[States, list[Recorded]]:
    """The states of `batches`, with what enters the first block under the name `first`, and what else
    the blocks take. In memory, unless there is a `job`."""
    if job is None:
        states: States = MemoryStates()
        with states.writing(first) as put:
            return states, chain.record_all(batches, put)
    shapes: list[tuple[int, ...]] = []
    writer = DiskStates(job, [], torch.device("cpu"))
    with writer.writing(first) as write:

        def put_shape(hidden: torch.Tensor) -> None:
            shapes.append(tuple(hidden.shape))
            write(hidden)

        recorded = chain.record_all(batches, put_shape)
    return DiskStates(job, shapes, recorded[0].hidden.device), recorded


def states_artifact(name: str) -> str:
    """The artifact of these states."""
    return f"{name}.f32"
