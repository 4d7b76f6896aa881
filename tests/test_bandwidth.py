"""The measurement of read bandwidth: what it divides by what."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from skipcat_edge import bandwidth


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bytes_of_all_threads_over_the_shortest_time(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def clock() -> Iterator[float]:
        for taken in (4.0, 2.0, 8.0):
            yield 100.0
            yield 100.0 + taken

    times = clock()
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(times))
    assert bandwidth.read_bandwidth(threads, 1 << 20, passes=3) == threads * (1 << 20) / 2.0


def test_a_real_measurement_is_plausible() -> None:
    found = bandwidth.read_bandwidth(1, 32 << 20, passes=2)
    assert 1e8 < found < 1e13
