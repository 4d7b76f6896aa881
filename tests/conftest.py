"""Fixtures: inputs, and the demo model converted once per run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conversion import DEMO, convert_model
from gguf import GGUFReader
from made_once import Once, make_once

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true",
                     help="every kill that `make test-trust` makes, not a sample of them")


@pytest.fixture(scope="session")
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether tests that take a sample by default take all there is."""
    return bool(pytestconfig.getoption("thorough"))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """`once(name, fill)`, the folder `name`, which is filled once in a run of several processes."""
    base = tmp_path_factory.getbasetemp()
    return partial(make_once, base if worker_id == "master" else base.parent)


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


@pytest.fixture(scope="session")
def demo_by_type(once: Once, demo_dense_gguf: Path) -> dict[str, Path]:
    """The demo model at ratio 0.8, by the factors' type."""
    types = ("Q8_0", "Q4_0", "F16")

    def convert(folder: Path) -> None:
        for quant in types:
            convert_model(DEMO / "model", folder / f"{quant}.gguf", base=demo_dense_gguf, quant=quant,
                          method="auto", calibration=DEMO / "calibration.txt", calib_tokens=8000,
                          compensate=False, stats=folder / "statistics")

    folder = once("demo-by-type", convert)
    return {quant: folder / f"{quant}.gguf" for quant in types}


@pytest.fixture(scope="module")
def source() -> Any:
    """The demo model as its Hugging Face module."""
    from skipcat_converter.source_model import load_source

    return load_source(DEMO / "model", "cpu")


@pytest.fixture(scope="module")
def layers(source: Any, demo_dense_gguf: Path) -> Any:
    """The demo model's layers, each with its module."""
    from skipcat_converter.layers import map_layers

    from skipcat_edge.runtime.source import stock_tree

    return map_layers(GGUFReader(demo_dense_gguf), source.module, stock_tree())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: not item.path.name.startswith("test_quality"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests that passed have measured: record_property("shown", text)."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties if report.when == "call" else ():
            if name == "shown":
                terminalreporter.write_line(f"{report.location[2]}: {text}")
