"""Hand-made figures for the tests of compare's report."""

from __future__ import annotations

from typing import Any

from skipcat_edge.compare.figures import Comparison, Figures, Kind, Measured

MEGA = 1_000_000


def measured(value: float, spread: float = 0.0) -> Measured:
    return Measured(value, value - spread, value + spread)


def figures(kind: Kind, type_: str, ratio: float, megabytes: float, loss: float, first_ms: float,
            decode: float | None, *, loss_se: float | None = None, spread: float = 0.0,
            **more: Any) -> Figures:
    """`spread` is a share of the speeds."""
    label = f"{type_} {ratio:g}" if kind is Kind.LOW_RANK else type_
    known: dict[str, Any] = {"file": f"{kind.name.lower()}-{type_}-{ratio:g}.gguf", "label": label} | more
    return Figures(
        kind=kind, type=type_, ratio=ratio, nbytes=round(megabytes * MEGA), loss=loss,
        loss_se=0.02 * loss if loss_se is None else loss_se,
        first_token=measured(first_ms / 1e3, spread * first_ms / 1e3),
        decode=None if decode is None else measured(decode, spread * decode), **known)


def reference(megabytes: float = 2000, first_ms: float = 900, decode: float | None = 20) -> Figures:
    return figures(Kind.REFERENCE, "F16", 1, megabytes, 0.0, first_ms, decode)


def comparison(*files: Figures, **more: Any) -> Comparison:
    first = reference() if files[0].decode is not None else reference(decode=None)
    return Comparison("model", (first, *files), files[0].decode is None, **more)


def crowded() -> Comparison:
    """All kinds, with points that are close to each other in every picture."""
    low = [figures(Kind.LOW_RANK, type_, ratio, size * (0.25 + 0.75 * ratio), loss + cut,
                   first * (0.2 + 0.8 * ratio), decode / (0.3 + 0.7 * ratio), spread=0.03)
           for type_, size, loss, first, decode in (
               ("F16", 2000, 1e-5, 900, 20), ("Q8_0", 1100, 1e-4, 880, 34), ("Q4_0", 640, 9e-3, 860, 55))
           for ratio, cut in ((0.9, 2e-4), (0.8, 2.1e-3), (0.6, 3e-2))]
    return comparison(
        figures(Kind.PLAIN, "Q8_0", 1, 1100, 4e-4, 880, 34, spread=0.03, ppl=9.1234, ppl_se=0.08, top1=0.981),
        figures(Kind.PLAIN, "Q4_0", 1, 640, 3.4e-2, 861, 55.2, spread=0.03),
        figures(Kind.FEEDBACK, "Q8_0", 1, 1100, 3.9e-4, 882, 34.1, spread=0.03),
        figures(Kind.FEEDBACK, "Q4_0", 1, 640, 9.6e-3, 862, 55.1, spread=0.03),
        *low,
        figures(Kind.OTHER, "Q4_K", 1, 650, 3.3e-2, 870, 54, spread=0.03,
                label="somebody-elses-model-Q4_K_M"),
        notes=("There is no low-rank-Q4_K-0.6: its grid is too coarse.",),
        setting={"text": "other.txt", "command": "skipcat-edge compare model -o folder"},
    )
