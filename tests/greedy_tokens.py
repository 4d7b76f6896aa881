"""Whether two CPUs write the same text, by what greedy_worker.py printed on each."""

from __future__ import annotations

NEAR_TIE = 0.2
"""Of logits. Activations are rounded to eight bits: a sum that differs in its last bit may round another way,
and errors of some 0.02 of the logits' spread are what the runtime's selftest finds, too."""


def assert_same_tokens(here: str, there: str, count: int) -> None:
    """The same tokens, up to a near tie: sums in another order may decide it, and the texts differ then."""
    lines = [[line.split() for line in out.splitlines()] for out in (here, there)]
    assert [len(each) for each in lines] == [count, count]
    for (token, second, margin), (other, *_) in zip(*lines, strict=True):
        if other != token:
            assert other == second and float(margin) < NEAR_TIE, (token, other, second, margin)
            return
