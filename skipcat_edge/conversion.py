"""Converting a model, as the command `convert` does, from Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from skipcat_edge.errors import UserError, require_at_least
from skipcat_edge.extra import Phase

if TYPE_CHECKING:
    from skipcat_converter.options import ConvertResult

@contextmanager
def _silent(_title: str, _total: float) -> Iterator[Callable[[float], None]]:
    yield lambda amount: None


def convert(source: str | Path, output: str | Path, *, ratio: float | None = None, budget: int | None = None,
            bpw: float | None = None, levels: Sequence[float] = (), level_overhead: float = 0.1,
            level_quant: str | None = None, quant: str = "Q8_0", head_quant: str | None = None,
            method: str = "auto", allocation: str | None = None, rounding: str = "feedback",
            calibration: str | Path | None = None, stats: str | Path | None = None,
            compensate: bool = True, gradients: bool = True, calib_tokens: int | None = None,
            seq_len: int | None = None, device: str = "cpu", seed: int | None = None,
            base: str | Path | None = None, runtime_source: str | Path | None = None,
            device_map: Literal["auto"] | None = None, executor: Literal["local", "ray"] = "local",
            allow_pickle: bool = False, force: bool = False, restart: bool = False,
            max_memory: int | None = None, phase: Phase = _silent,
            warn: Callable[[str], None] = lambda text: None) -> ConvertResult:
    """Compress `source`, a Hugging Face directory or hub id, into the GGUF file `output`, with a model card
    beside it.

    What is finished is kept in a hidden folder beside `output`, `.NAME.job`, until all of it is: where the
    process was killed, or the disk was full, the same call goes on from there.

    Args:
        ratio: kept share of the linear layers' parameters, in (0, 1]; 0.8 unless one of the next two is
            given. 1 writes a plain dense file.
        budget: bytes of the whole file instead.
        bpw: bits per dense weight of the linear layers instead.
        levels: rising ratios of a file whose speed can be changed while it runs; the last is that of the
            whole file. `level_overhead`: how much larger it may be than one of its last level alone, as
            a share. `level_quant`: type of what a level adds to lower ones (None: what is usual
            with `quant`).
        quant: ggml type of the linear layers; `head_quant` of embeddings and head (None: as in `base`).
        method: `auto`, or one of factorize.METHODS; `allocation` and `rounding` as in `convert --help`.
        calibration: a text that shows which inputs matter; needed below ratio 1 unless `stats` exists.
        stats: file that keeps the calibration's statistics, or holds them.
        compensate, gradients: as --no-compensation and --no-grad, the other way round.
        base: dense GGUF of the same model, instead of converting it here.
        runtime_source: pinned llama-cpp-python archive (None: fetch it).
        device_map: `auto` spreads the model over all GPUs while it is run on the text; the rest of the work
            is done on `device`.
        executor: `ray` measures layers on the Ray cluster that RAY_ADDRESS names (unset: a new one, of this
            machine alone), and factors them there too without `compensate`; the file is the same.
        calib_tokens: tokens of the text that are read (None: up to 65,536); `seq_len` of one window.
        device: `cpu` or `cuda`, of the calibration. `seed`: of the loss whose gradients are taken.
        force: replace what is there. `restart`: begin anew where an unfinished conversion is there.
        allow_pickle: read weights that are pickles only, whose author must be trusted.
        max_memory: bytes that all processes together may have in memory (None: no limit); the model is
            streamed block by block then, and `warn` hears what falls back.
        phase: hears the stages' progress; `warn` a sentence for the user.

    Returns:
        What was written: bytes, and each projection's rank, form and relative error. The methods' sources are
        named in factorize.METHODS.

    Raises:
        UserError: for bad input; the extra `convert` or the runtime is missing. Then nothing is
            written; what took long is kept in the hidden folder, and the message says so, unless what was
            asked for can never be. DiskError, one of them, where a file could not be written.
    """
    from skipcat_converter.job import remove_rest, was_placing

    from skipcat_edge.card import card_path
    from skipcat_edge.extra import require_converter
    from skipcat_edge.format import block_size
    from skipcat_edge.output import check_output
    from skipcat_edge.ranks import check_ratio
    from skipcat_edge.weight_types import LARGEST_BLOCK, weight_type

    output = Path(output)
    calibration, stats, base, runtime_source = map(_path, (calibration, stats, base, runtime_source))
    if sum(given is not None for given in (ratio, budget, bpw)) > 1:
        raise UserError("--ratio, --budget and --bpw each say how large the model may be; give one of them.")
    levels = tuple(levels)
    if levels:
        _check_levels(levels, ratio if budget is None and bpw is None else -1, level_overhead)
        ratio = levels[-1]
    ratio = 0.8 if ratio is None else ratio
    check_ratio(ratio)
    if bpw is not None and not 0 < bpw < math.inf:
        raise UserError("--bpw must be a finite number above 0, for example 3.6.")
    require_at_least(1, budget=budget, calib_tokens=calib_tokens, max_memory=max_memory)
    require_at_least(2, seq_len=seq_len)
    if seed is not None and not 0 <= seed < 2**32:
        raise UserError(f"The seed is {seed}, but it must be from 0 to {2**32 - 1}.")
    if device not in ("cpu", "cuda"):
        raise UserError(f"There is no device {device} to calibrate on; it is cpu or cuda.")
    if device_map not in (None, "auto"):
        raise UserError(f"There is no device map {device_map}; it is auto.")
    if executor not in ("local", "ray"):
        raise UserError(f"There is no executor {executor}; it is local or ray.")
    if stats is not None and stats.absolute() == output.absolute():
        raise UserError(f"{stats} cannot be both the statistics and the output; name two files.")
    low_rank = ratio < 1 or budget is not None or bpw is not None
    have_importance = (calibration or stats) is not None and method != "svd"
    linear = weight_type(quant, have_importance=have_importance)
    head = weight_type(head_quant) if head_quant else None
    if level_quant is not None and not levels:
        raise UserError("--level-quant is the type of what levels add to lower ones; give --levels too.")
    added = weight_type(level_quant, have_importance=have_importance) if level_quant else None
    if added is not None and block_size(added) > LARGEST_BLOCK:
        raise UserError(f"--level-quant {added.name} has blocks of {block_size(added)}, which ranks seldom "
                        f"fill; choose a type with blocks of {LARGEST_BLOCK} at most, such as Q4_0.")
    remove_rest(output)
    own = force or was_placing(output)
    check_output(output, own)
    check_output(card_path(output), own)
    require_converter()
    from skipcat_converter.calibration import require_calibration
    from skipcat_converter.factorize import METHODS
    from skipcat_converter.options import ConvertOptions
    from skipcat_converter.pickled import has_pickled_weights
    from skipcat_converter.pipeline import convert as run
    from skipcat_converter.planning import ALLOCATIONS
    from skipcat_converter.quantized import Rounding
    from skipcat_converter.source_model import resolve_source
    from skipcat_converter.writer import OutputTypes

    if method not in METHODS:
        raise UserError(f"There is no method {method}; the known ones are {', '.join(METHODS)}.")
    if allocation is not None and allocation not in ALLOCATIONS:
        raise UserError(f"There is no allocation {allocation}; the known ones are {', '.join(ALLOCATIONS)}.")
    rule = allocation or METHODS[method].allocation
    if levels and rule != "loss":
        raise UserError(f"--levels needs --allocation loss; {rule} has no ranks of several levels.")
    if rounding not in ("feedback", "plain"):
        raise UserError(f"There is no rounding {rounding}; it is feedback or plain.")
    if low_rank and not (stats is not None and stats.exists()):
        require_calibration(METHODS[method], calibration)
    if stats is not None and not stats.exists():
        check_output(stats, force=False)
    if stats is not None and not stats.exists() and calibration is None:
        raise UserError(f"{stats} does not exist, and there is no text to take statistics from; "
                        "pass --calibration FILE.")
    if not gradients and METHODS[method].two_sided and low_rank and allocation is None:
        warn("Without gradients nothing tells which layers the loss depends on: ranks become uniform, "
             "and quality falls to about that of --method skipcat (docs/quality.md).")
    from skipcat_edge.gguf_file import open_gguf
    from skipcat_edge.runtime.source import stock_tree

    directory = resolve_source(str(source), allow_pickle)
    if base is None:
        has_pickled_weights(directory, allow_pickle)  # before all of it is read
    else:
        open_gguf(base)
    options = ConvertOptions(
        source=directory, output=output, method=METHODS[method], ratio=ratio, budget=budget, bpw=bpw,
        levels=levels, level_overhead=level_overhead,
        allocation=allocation, rounding=Rounding(feedback=rounding == "feedback"), stats=stats,
        gradients=gradients, compensate=compensate, types=OutputTypes(linear, head, added),
        tree=stock_tree(runtime_source), base=base,
        source_name=None if Path(source).is_dir() else str(source), calibration=calibration,
        calib_tokens=calib_tokens, seq_len=seq_len, device=device, seed=seed,
        card=card_path(output), force=force, restart="yes" if restart else "no", allow_pickle=allow_pickle,
        executor=executor, device_map=device_map, max_memory=max_memory,
    )
    result = run(options, phase, say=warn)
    if added is not None and not any(report.owner.added for report in result.owners):
        warn(f"No level adds to the factors of a lower one: --level-quant {added.name} is not used.")
    return result


def _check_levels(levels: tuple[float, ...], ratio: float | None, overhead: float) -> None:
    from skipcat_edge.ranks import check_levels

    check_levels(levels)
    if ratio is not None and ratio != levels[-1]:
        raise UserError("--levels says how large the model becomes by its last ratio; leave out --ratio, "
                        "--budget and --bpw.")
    if not 0 <= overhead <= 10:
        raise UserError("--level-overhead is a share of the file, for example 0.1.")


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)
