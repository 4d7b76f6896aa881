"""The statistics stage: a model and a text in, a file of statistics out; or the file of another time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gguf import GGUFReader

from skipcat_edge.errors import UserError
from skipcat_edge.extra import Phase
from skipcat_edge.output import atomic_output, sync_folder

from .calibration import BATCH_TOKENS, DEFAULT_SEQ_LEN, DEFAULT_TOKENS, load_calibration
from .job import Job, temporary_job
from .job_settings import file_sha256
from .layers import LayerMap, keeps_input_order, linear_weight, map_layers
from .memory import MemoryPlan
from .source_model import SourceModel, load_source
from .statistics import block_statistics, split_by_input
from .statistics_file import Provenance, Statistics, read_statistics, source_sha256, write_statistics
from .writer import read_weight

# Until every block's are in it.
UNFINISHED = "statistics.unfinished"


@dataclass(frozen=True)
class CalibrationOptions:
    """What to read, and how much of it."""

    text: Path | None
    """None: only statistics that are there already can be used."""
    tokens: int | None = None
    seq_len: int | None = None
    gradients: bool = True
    device: str = "cpu"
    seed: int | None = None
    """None: 0, or whatever statistics that are there already were taken with."""
    allow_pickle: bool = False
    memory: MemoryPlan | None = None
    """How to stay within an allowance."""

    @property
    def batch_tokens(self) -> int:
        """Of one forward pass."""
        return BATCH_TOKENS if self.memory is None else self.memory.batch_tokens


def obtain_statistics(
    source: Path, reader: GGUFReader, tree: Path, options: CalibrationOptions, path: Path, phase: Phase,
    model: SourceModel | None = None, job: Job | None = None, digest: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Statistics:
    """The statistics in `path`, or, where it does not exist, new ones that are written there.

    `reader`: the base file; `tree`: the pinned source, with its tensor names; `model`: the source,
    if it is loaded already; `digest`: its hash; `job`: where what is finished is kept and found. Raises
    UserError where the file holds those of another model or text.
    """
    if digest is None:
        with phase("Reading the model", 1) as advance:
            digest = source_sha256(source, path)
            advance(1)
    expected = Provenance(digest, None, 0, options.seq_len, options.tokens, options.gradients, options.seed)
    if options.text is not None:
        expected = Provenance(
            digest, file_sha256(options.text, "Calibration text"), 0, options.seq_len or DEFAULT_SEQ_LEN,
            DEFAULT_TOKENS if options.tokens is None else options.tokens, options.gradients,
            options.seed or 0)
    if path.exists():
        # its own are another's only where they are damaged
        own = job is not None and path.parent == job.folder
        with job.reading(path.name) if job is not None and own else nullcontext():
            statistics = read_statistics(path, expected)
            _check_shapes(statistics, reader, path)
        return statistics
    if options.text is None:
        raise UserError(f"{path} does not exist, and there is no text to take statistics from; "
                        "pass --calibration FILE.")
    model = model or load_model(source, options.device, phase, options.allow_pickle)
    calibration = load_calibration(options.text, model, options.tokens, options.seq_len, options.batch_tokens)
    layers = split_by_input(model, checked_layers(reader, map_layers(reader, model.module, tree), model),
                            calibration)
    blocks = sorted({group[0].index for group in layers.groups})
    if not blocks:
        raise UserError(f"{model.name} has no linear layers that the runtime factors.")
    provenance = replace(expected, text_sha256=calibration.sha256, tokens=calibration.tokens)
    with_output = set() if not options.gradients else {
        layer.tensor for layer in layers.members
        if linear_weight(model.module.get_submodule(layer.module), layer) is not None
    }
    with (
        (nullcontext(job) if job is not None else temporary_job(path)) as job,
        phase("Calibrating", 2 * (blocks[-1] + 1) * len(calibration.batches)) as advance,
    ):
        found = block_statistics(model, layers, calibration, lambda: advance(1), options.gradients,
                                 options.seed or 0, job, say, options.memory)
        write_statistics(job, UNFINISHED, provenance, layers, with_output, found)
        model.release()
        _keep(job, path)
        job.drop_states()
    return Statistics(path, provenance, layers)


def _keep(job: Job, path: Path) -> None:
    """Put the finished statistics where they will be read from."""
    unfinished = job.path(UNFINISHED)
    if unfinished.stat().st_dev == path.absolute().parent.stat().st_dev:
        unfinished.replace(path)
        sync_folder(path.absolute().parent)
        return
    with atomic_output(path, force=False) as partial:
        shutil.copyfile(unfinished, partial)
    unfinished.unlink()


def load_model(source: Path, device: str, phase: Phase, allow_pickle: bool = False,
               stream: bool = False) -> SourceModel:
    """Load the Hugging Face model at `source`, behind a progress display; `stream` as in `load_source`."""
    with phase("Loading the model", 1) as advance:
        model = load_source(source, device, allow_pickle, stream)
        advance(1)
    return model


def checked_layers(reader: GGUFReader, layers: LayerMap, model: SourceModel) -> LayerMap:
    """`layers` without those whose inputs llama.cpp's converter reorders."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    dense = dict(layers.dense)
    groups = []
    for group in layers.groups:
        kept = []
        for layer in group:
            module = model.module.get_submodule(layer.module)
            model.bring(module)
            own = linear_weight(module, layer)
            weight = module.weight if own is None else own
            assert isinstance(weight, torch.Tensor)
            if keeps_input_order(read_weight(tensors[layer.tensor]), weight):
                kept.append(layer)
            else:
                dense[layer.tensor] = "its inputs in the file are not its module's"
        if kept:
            groups.append(tuple(kept))
    return LayerMap(layers.architecture, groups, dense)


def _check_shapes(statistics: Statistics, reader: GGUFReader, path: Path) -> None:
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
    for layer in (layer for group in statistics.layers.groups for layer in group):
        if shapes.get(layer.tensor) != (layer.n, layer.m):
            raise UserError(f"{path} has statistics for {layer.tensor} of {layer.m} x {layer.n}, which the "
                            "base file does not have; give the base file of the same model.")
