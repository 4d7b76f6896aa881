"""The keys that say how a file was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gguf import GGUFValueType

from skipcat_edge import format as fmt

from .layers import LayerMap
from .options import ConvertOptions
from .statistics_file import Statistics


def metadata(
    options: ConvertOptions, layers: LayerMap, statistics: Statistics | None, ratio: float,
    level_losses: Sequence[float],
) -> dict[str, tuple[Any, GGUFValueType]]:
    """Of a low-rank file, beside what the base file has."""
    known = statistics.provenance if statistics else None
    levels: dict[str, tuple[Any, GGUFValueType]] = {} if not options.levels else {
        fmt.KEY_LEVELS: (list(options.levels), GGUFValueType.FLOAT32),
        fmt.KEY_LEVELS_LOSS: (list(level_losses), GGUFValueType.FLOAT32),
    }
    version, runtime = (
        (fmt.LEVELS_FORMAT_VERSION, fmt.LEVELS_RUNTIME_MIN) if levels else
        (fmt.FORMAT_VERSION, fmt.RUNTIME_MIN))
    return {
        **calibration_keys(statistics),
        fmt.KEY_ARCHITECTURE: (fmt.ARCHITECTURE_PREFIX + layers.architecture, GGUFValueType.STRING),
        fmt.KEY_FORMAT_VERSION: (version, GGUFValueType.UINT32),
        fmt.KEY_RUNTIME_MIN: (runtime, GGUFValueType.STRING),
        fmt.KEY_RATIO: (ratio, GGUFValueType.FLOAT32),
        fmt.KEY_METHOD: (options.method.name, GGUFValueType.STRING),
        fmt.KEY_SOURCE_NAME: (options.source_name or options.source.resolve().name, GGUFValueType.STRING),
        fmt.KEY_SEED: ((known and known.seed) or options.seed or 0, GGUFValueType.UINT32),
        **levels,
    }


def calibration_keys(statistics: Statistics | None) -> dict[str, tuple[Any, GGUFValueType]]:
    """What the file was calibrated with."""
    known = statistics.provenance if statistics else None
    return {
        fmt.KEY_CALIBRATION_SHA256: (known.text_sha256 or "" if known else "", GGUFValueType.STRING),
        fmt.KEY_CALIBRATION_TOKENS: (known.tokens if known else 0, GGUFValueType.UINT32),
    }
