"""Sizes as people type them."""

from __future__ import annotations

import re
from decimal import Decimal

from skipcat_edge.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Bytes of `480MB`, `1.5 GiB` or `1000000`. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmg]i?)?b?\s*", text, re.IGNORECASE | re.ASCII)
    size = 0 if match is None else int(Decimal(match[1]) * _UNITS[(match[2] or "").upper()])
    if not 0 < size < 2**63:
        raise UserError(f"{text[:40]!r} is not a size; write it like 480MB, 1.5GiB or 1000000.")
    return size
