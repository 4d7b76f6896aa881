"""ggml types that a user may name for weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipcat_edge.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# Integers, and types that ggml only computes with.
_NOT_FOR_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})
# ggml refuses to quantise to these without the second moments of a layer's input.
_NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})

LARGEST_BLOCK = 32
"""Of what levels add, whose ranks are few."""
# What corrects a projection is small beside it, and so is what rounding it loses.
_CORRECTIONS = {"F16": "Q8_0", "BF16": "Q8_0", "Q8_0": "Q4_0"}


def correction_type(type_: GGMLQuantizationType) -> GGMLQuantizationType:
    """What factors that a level adds to lower ones are stored as where all others have `type_`."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[_CORRECTIONS.get(type_.name, type_.name)]


def weight_type(name: str, *, have_importance: bool = False) -> GGMLQuantizationType:
    """The ggml type called `name`, in any case.

    `have_importance`: calibration statistics will be at hand. Raises UserError if weights cannot
    have the type.
    """
    from gguf import GGMLQuantizationType

    refused = _NOT_FOR_WEIGHTS if have_importance else _NOT_FOR_WEIGHTS | _NEED_IMPORTANCE
    usable = {type_.name: type_ for type_ in GGMLQuantizationType if type_.name not in refused}
    if name.upper() not in usable:
        raise UserError(f"{name!r} is not a type that weights can have; choose one of {', '.join(usable)}.")
    return usable[name.upper()]
