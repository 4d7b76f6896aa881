"""Files with levels from the converter: what is in them, and what a person reads on bad input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conversion import DEMO, convert_model
from gguf import GGUFReader, quants

from skipcat_edge import format as fmt
from skipcat_edge.cli import main
from skipcat_edge.decoding import all_logits
from skipcat_edge.inspection import inspect
from skipcat_edge.levels import set_level
from skipcat_edge.session import open_model

torch = pytest.importorskip("torch", reason="the converter needs torch")

pytestmark = pytest.mark.runtime

TEXT = DEMO / "calibration.txt"
LEVELS = 0.5, 0.65, 0.8


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module", params=["F16", "Q4_0"])
def leveled(request: pytest.FixtureRequest, demo_dense_gguf: Path,
            tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("levels") / "levels.gguf"
    result = convert_model(DEMO / "model", out, base=demo_dense_gguf, quant=request.param, method="auto",
                           ratio=LEVELS[-1], levels=LEVELS, calibration=TEXT, calib_tokens=4000)
    return out, result


@pytest.fixture
def quant(request: pytest.FixtureRequest) -> str:
    """The type of `leveled`."""
    return str(request.node.callspec.params["leveled"])


def weights_at(path: Path, level: int) -> dict[str, np.ndarray]:
    """W: [m, n] of every linear layer at the level, from the format's definition alone."""
    found: dict[str, np.ndarray] = {}
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    def matrix(name: str) -> np.ndarray:
        tensor = stored[name]
        return quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    for owner in fmt.read_owners(GGUFReader(path)):
        if not owner.levels[0] <= level <= owner.levels[1]:
            continue
        used = None if owner.levels == (0, len(LEVELS) - 1) else owner.levels
        A = matrix(fmt.lr_a_name(owner.layer, owner.name, used))
        if owner.skip:
            mask = stored[fmt.skip_mask_name(owner.layer, owner.name, used)]
            skip = np.unpackbits(mask.data.view(np.uint8), bitorder="little")[: owner.n].astype(bool)
            whole = np.zeros((owner.rank, owner.n))
            whole[:, skip], whole[:, ~skip] = np.eye(owner.rank), A
            A = whole
        for member in owner.members:
            name = fmt.weight_name(owner.layer, member.name)
            W = matrix(fmt.lr_b_name(owner.layer, member.name, used)) @ A
            found[name] = found.get(name, 0) + W
    return found


def test_the_file_is_no_larger_than_said(
    leveled: tuple[Path, Any], demo_dense_gguf: Path, tmp_path: Path, quant: str
) -> None:
    """A tenth more than the file of the last level alone, and the tenth is made use of."""
    alone = tmp_path / "alone.gguf"
    convert_model(DEMO / "model", alone, base=demo_dense_gguf, quant=quant, method="auto", ratio=LEVELS[-1],
                  calibration=TEXT, calib_tokens=4000, compensate=False)
    # corrections of a smaller type leave some of it
    assert (1.05 if quant == "Q4_0" else 1.0) < leveled[0].stat().st_size / alone.stat().st_size <= 1.1


def types_of(owners: Sequence[fmt.Owner]) -> set[str]:
    return {type_.name for owner in owners for type_ in (owner.type, *(each.type for each in owner.members))}


def f16_bytes(owner: fmt.Owner) -> int:
    """What it would take in the type of the others."""
    masks = 4 * -(-owner.n // 32) if owner.skip else 0
    return 2 * owner.rank * (owner.n - (owner.rank if owner.skip else 0) + owner.m) + masks


def is_added(owner: fmt.Owner, owners: Sequence[fmt.Owner]) -> bool:
    """Whether a lower level has factors of the same layers, which the owner's first level uses too."""
    return any(other.layer == owner.layer and {each.name for each in other.members} & {
        each.name for each in owner.members} and other.levels[0] < owner.levels[0] <= other.levels[1]
        for other in owners)


def test_every_level_keeps_its_ratio(leveled: tuple[Path, Any], quant: str) -> None:
    path, result = leveled
    reader = GGUFReader(path)
    assert fmt.field_value(reader, fmt.KEY_FORMAT_VERSION) == 2
    assert fmt.field_value(reader, fmt.KEY_RUNTIME_MIN) == "skipcat.5"
    assert fmt.field_value(reader, fmt.KEY_RATIO) == pytest.approx(0.8)
    assert fmt.read_levels(reader) == LEVELS
    losses = [each.loss for each in result.levels]
    assert fmt.field_value(reader, fmt.KEY_LEVELS_LOSS) == pytest.approx(losses)
    assert losses == sorted(losses, reverse=True)
    owners = fmt.read_owners(reader)
    dense = {tensor.name: int(np.prod(tensor.shape)) for tensor in reader.tensors
             if fmt.parse_weight_name(tensor.name)}
    whole = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768)
    for place, level in enumerate(result.levels):
        used = [owner for owner in owners if owner.levels[0] <= place <= owner.levels[1]]
        factored = {fmt.weight_name(owner.layer, each.name) for owner in used for each in owner.members}
        read = sum(owner.parameters * (owner.total_bytes / f16_bytes(owner) if quant == "F16" else 1.0)
                   for owner in used)
        read += sum(size for name, size in dense.items() if name not in factored)
        # the file pads a small owner's tensors
        assert read / whole == pytest.approx(level.read, rel=1e-9 if place == 0 or quant == "Q4_0" else 1e-3)
        assert level.read <= LEVELS[place] + 1e-9


def test_corrections_are_smaller(leveled: tuple[Path, Any], quant: str) -> None:
    """In a file of F16 they are Q8_0; with Q4_0 there is nothing smaller."""
    owners = fmt.read_owners(GGUFReader(leveled[0]))
    corrections = [owner for owner in owners if is_added(owner, owners)]
    others = [owner for owner in owners if owner not in corrections]
    assert corrections and others
    assert types_of(corrections) == {"Q8_0" if quant == "F16" else quant}
    assert types_of(others) == {quant}
    assert fmt.field_value(GGUFReader(leveled[0]), "general.quantization_version") == 2


def test_convert_and_inspect_say_the_same(leveled: tuple[Path, Any]) -> None:
    path, result = leveled
    found = inspect(path)
    assert found.kept == pytest.approx(result.kept)
    assert [level.ratio for level in found.levels] == [level.ratio for level in result.levels]


def test_higher_levels_are_nearer_to_the_model(leveled: tuple[Path, Any], demo_dense_gguf: Path) -> None:
    path, _ = leveled
    dense, model = (open_model(each, context=256) for each in (demo_dense_gguf, path))
    try:
        tokens = dense.tokenize(TEXT.read_bytes()[:1500])[:250]
        wanted = all_logits(dense, tokens).copy()
        errors = []
        for level in LEVELS:
            set_level(model, level)
            errors.append(float(np.square(all_logits(model, tokens) - wanted).mean()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.6 * errors[0]
    finally:
        dense.close()
        model.close()


def test_lower_factors_are_no_worse_for_the_higher_ones(leveled: tuple[Path, Any],
                                                        demo_dense_gguf: Path) -> None:
    """What is added to a layer brings it nearer to W; nothing of the lower level is spoilt by it."""
    path, _ = leveled
    dense = {tensor.name: tensor for tensor in GGUFReader(demo_dense_gguf).tensors}
    low, high = weights_at(path, 0), weights_at(path, len(LEVELS) - 1)
    changed = [name for name in low if name in high and not np.array_equal(low[name], high[name])]
    assert changed
    nearer = [
        np.linalg.norm(high[name] - W) < np.linalg.norm(low[name] - W) for name in changed
        for W in [quants.dequantize(dense[name].data, dense[name].tensor_type).astype(np.float64)]
    ]
    # in the metric of the inputs all are; in the plain one nearly all
    assert np.mean(nearer) > 0.9


@pytest.mark.parametrize(("options", "words"), [
    (["--levels", "0.8"], "2 to 8 rising ratios"),
    (["--levels", "0.8,x"], "--levels is '0.8,x'"),
    (["--levels", "0.6,1"], "must be below 1"),
    (["--levels", "0.6,0.8", "--ratio", "0.7"], "leave out --ratio"),
    (["--levels", "0.6,0.8", "--budget", "3MB"], "leave out --ratio"),
    (["--levels", "0.6,0.8", "--level-overhead", "-1"], "--level-overhead is a share"),
    (["--level-quant", "Q8_0"], "give --levels too"),
    (["--levels", "0.6,0.8", "--level-quant", "Q4_K"], "has blocks of 256"),
    (["--levels", "0.6,0.8", "--level-quant", "Q9_9"], "not a type that weights can have"),
    (["--levels", "0.6,0.8", "--method", "skipcat"], "--levels needs --allocation loss"),
    (["--levels", "0.01,0.8", "--calib-tokens", "500"], "ratio of 0.01 is too little"),
])  # fmt: skip
def test_refused(options: list[str], words: str, demo_dense_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = run(DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--calibration", TEXT, *options)
    assert result.exit_code == 2, result.output
    assert words in result.output and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_what_the_command_says(demo_dense_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = run(DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--calibration", TEXT, "--levels",
                 "0.6,0.8", "--calib-tokens", "1500", "--no-compensation", "--quant", "F16", "--level-quant",
                 "Q4_0")
    assert result.exit_code == 0, result.output
    assert "level 0.6 reads 0.5" in result.output or "level 0.6 reads 0.6000" in result.output
    assert "level 0.8 reads 0.7" in result.output or "level 0.8 reads 0.8000" in result.output
    owners = fmt.read_owners(GGUFReader(out))
    assert types_of([owner for owner in owners if is_added(owner, owners)]) == {"Q4_0"}
    assert "No level adds" not in result.output


def test_says_where_no_level_adds_to_another(demo_dense_gguf: Path, tmp_path: Path) -> None:
    """The file may hold a copy of everything for each level."""
    out = tmp_path / "out.gguf"
    result = run(DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--calibration", TEXT, "--levels",
                 "0.3,0.9", "--calib-tokens", "1500", "--no-compensation", "--quant", "Q4_0", "--level-quant",
                 "Q8_0", "--level-overhead", "2")
    assert result.exit_code == 0, result.output
    owners = fmt.read_owners(GGUFReader(out))
    assert len(owners) > 1 and not any(is_added(owner, owners) for owner in owners)
    assert "No level adds to the factors of a lower one: --level-quant Q8_0 is not used." in result.output
