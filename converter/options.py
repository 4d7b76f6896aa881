"""What a conversion is asked for, and what it tells of its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from skipcat_edge.errors import UserError

from .compression import OwnerReport
from .executor import ExecutorName
from .factorize import Method
from .job import Restart
from .memory import MemoryPlan
from .quantized import Rounding
from .writer import OutputTypes


@dataclass(frozen=True)
class ConvertOptions:
    """What the user asked for."""

    source: Path
    """Hugging Face directory."""
    output: Path
    method: Method
    types: OutputTypes
    tree: Path
    """The pinned source, with llama.cpp's converter and tensor names."""
    ratio: float = 0.8
    """Unless one of the next two is given."""
    budget: int | None = None
    """Bytes of the whole file."""
    bpw: float | None = None
    """Bits per dense weight of the linear layers."""
    levels: tuple[float, ...] = ()
    """Ratios of the file's levels, rising; `ratio` is the last. None for a file without levels."""
    level_overhead: float = 0.1
    """How much larger the file may be than one of its last level alone, as a share."""
    allocation: str | None = None
    """None: the method's own."""
    grid: int | None = None
    """Ranks are its multiples; None: what the type needs."""
    rounding: Rounding = field(default_factory=Rounding)
    source_name: str | None = None
    """Of a model from the hub; a directory's own name otherwise."""
    base: Path | None = None
    calibration: Path | None = None
    stats: Path | None = None
    """Where statistics are kept."""
    gradients: bool = True
    compensate: bool = True
    calib_tokens: int | None = None
    seq_len: int | None = None
    device: str = "cpu"
    allow_pickle: bool = False
    """Weights that are pickles may be read."""
    seed: int | None = None
    """Of gradients; None: 0, or that of the statistics that are there."""
    card: Path | None = None
    """Where the model card goes; None: there is none."""
    force: bool = False
    device_map: Literal["auto"] | None = None
    """`auto`: the calibration's model is spread over all GPUs; None: it is on `device`."""
    executor: ExecutorName = "local"
    """Where blocks are measured, and factored where nothing is compensated; the result is the same."""
    restart: Restart = "no"
    """What becomes of an unfinished conversion to the same output."""
    max_memory: int | None = None
    """Bytes that all processes may have in memory; None: as much as is quickest."""

    @property
    def dense(self) -> bool:
        """A plain GGUF was asked for."""
        return self.budget is None and self.bpw is None and self.ratio == 1.0

    @property
    def calibration_device(self) -> str:
        """Where the model is run."""
        return self.device_map or self.device

    @property
    def compensated(self) -> bool:
        """Later layers make up for earlier ones; that runs the model on the text."""
        return self.compensate and self.calibration is not None and self.method.compensate

    @property
    def two_sided(self) -> bool:
        """Gradients say what matters."""
        return self.method.two_sided or self.allocation == "flrc"

    @property
    def calibrated(self) -> bool:
        """There are statistics to convert by."""
        return self.calibration is not None or self.stats is not None

    @property
    def takes_gradients(self) -> bool:
        """Statistics that are taken have gradients."""
        # statistics that are kept should serve the next conversion, whatever its method
        kept = self.stats is not None and not self.stats.exists()
        return self.gradients and (kept or (self.two_sided and not self.dense))

    def one_sided(self) -> ConvertOptions:
        """The same without gradients."""
        # gradients that kept statistics may hold are not looked at either
        method = replace(self.method, two_sided=False, allocation="uniform")
        return replace(self, gradients=False, method=method)

    def within(self, memory: MemoryPlan, say: Callable[[str], None]) -> ConvertOptions:
        """The same with what falls back; `say` hears it. Raises UserError where the allocation cannot."""
        options = self
        for sentence in memory.fallbacks:
            say(sentence)
        if options.compensated and not memory.compensation:
            options = replace(options, compensate=False)
        if memory.one_sided:
            if options.allocation == "flrc":
                raise UserError("--allocation flrc needs gradients, for which --max-memory is too little; "
                                "raise it, or choose another allocation.")
            options = options.one_sided()
        return options


@dataclass(frozen=True)
class LevelResult:
    """One level of what was written."""

    ratio: float
    """Asked for; the level's name."""
    read: float
    """What it reads of the layers that could be factored, over what they take where they are dense; by
    parameters, and what it adds to lower levels by the bytes of its type."""
    loss: float
    """Predicted, before compensation, in the unit of the statistics."""


@dataclass
class ConvertResult:
    """What was written."""

    output_bytes: int = 0
    owners: list[OwnerReport] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    """Linear layers that stayed dense -> why."""
    kept: float = 1.0
    """Stored over dense parameters of the layers that could be factored; of the last level, where there are
    levels."""
    levels: tuple[LevelResult, ...] = ()
    calibration_tokens: int = 0
    calibration_sha256: str | None = None
    """Of the text; None where it is not known."""
    not_compensated: str = ""
    """Why errors could not be compensated across layers, where that was asked for."""
    shrinkage: float = 0.0
    """The most that any second moments were moved towards their diagonal, in [0, 1]."""
    damped: dict[str, float] = field(default_factory=dict)
    """Tensors whose H needed more damping than usual -> how much of its mean diagonal."""
