"""Calls the converter's pipeline from tests, without the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, quants

from skipcat_edge import format as fmt

DEMO = Path(__file__).resolve().parent.parent / "converter" / "demo"


@contextmanager
def quiet(title: str, total: float) -> Iterator[Any]:
    yield lambda amount: None


def convert_model(
    source: Path, out: Path, *, method: str = "skipcat", ratio: float = 0.8, quant: str = "F16",
    head_quant: str | None = None, **options: Any,
) -> Any:
    """Convert `source` to `out`; `options` as in ConvertOptions. Returns the ConvertResult."""
    from skipcat_converter.factorize import METHODS
    from skipcat_converter.options import ConvertOptions
    from skipcat_converter.pipeline import convert
    from skipcat_converter.writer import OutputTypes

    from skipcat_edge.runtime.source import stock_tree
    from skipcat_edge.weight_types import weight_type

    head = weight_type(head_quant) if head_quant else None
    return convert(
        ConvertOptions(
            source=source, output=out, method=METHODS[method], ratio=ratio,
            types=OutputTypes(weight_type(quant), head), tree=stock_tree(),
            **options,
        ),
        quiet,
    )


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a GGUF as float32, rows first; masks as they are."""
    return {
        tensor.name: np.array(tensor.data) if tensor.name.endswith("skip_mask")
        else quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in GGUFReader(path).tensors
    }


def multiplied_out(path: Path) -> dict[str, np.ndarray]:
    """W: [m, n] = B' A of every factored layer of a low-rank file, by its dense name.

    Written from the format's definition alone: bit j of the mask says whether input j's column
    of A is the next unit vector or the next column of T.
    """
    data = tensors(path)
    weights = {}
    for owner in fmt.read_owners(GGUFReader(path)):
        T = data[fmt.lr_a_name(owner.layer, owner.name)]
        A = T
        if owner.skip:
            words = data[fmt.skip_mask_name(owner.layer, owner.name)].view(np.uint32)
            A = np.zeros((owner.rank, owner.n), np.float32)
            units, rest = iter(np.eye(owner.rank, dtype=np.float32)), iter(T.T)
            for j in range(owner.n):
                A[:, j] = next(units if int(words[j // 32]) >> j % 32 & 1 else rest)
        for member in owner.members:
            B = data[fmt.lr_b_name(owner.layer, member.name)]
            weights[fmt.weight_name(owner.layer, member.name)] = B @ A
    return weights
