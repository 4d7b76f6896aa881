"""Fixtures: inputs, and the demo model converted once per run."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversion import DEMO, convert_model

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of test models and texts that are not part of the repository."""
    if not (SHARED / "models").is_dir():
        pytest.skip("../shared with its models and texts is not here")
    return SHARED


@pytest.fixture(scope="session")
def demo_dense_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as an ordinary F16 GGUF."""
    out = tmp_path_factory.mktemp("demo") / "dense.gguf"
    convert_model(DEMO / "model", out, ratio=1.0)
    return out


@pytest.fixture(scope="session")
def demo_low_rank_gguf(tmp_path_factory: pytest.TempPathFactory, demo_dense_gguf: Path) -> Path:
    """The demo model, skipcat at ratio 0.8, F16."""
    out = tmp_path_factory.mktemp("demo") / "skipcat.gguf"
    convert_model(DEMO / "model", out, base=demo_dense_gguf, calibration=DEMO / "calibration.txt")
    return out
