"""Which file of a model suits a device: memory and speed of dense and low-rank candidates, predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skipcat_edge.errors import UserError, require_at_least
from skipcat_edge.plan_memory import MemoryNeed, memory_need

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from skipcat_edge.device import Device
    from skipcat_edge.model_table import ModelDimensions
    from skipcat_edge.synth_plan import Plan as PlannedModel

TYPES, RATIOS = ("Q8_0", "Q4_0"), (0.9, 0.8, 0.6)
DEFAULT_CONTEXT = 4096
_FLOATS = ("F32", "F16", "BF16")
_WORTH_A_THOUGHT = 1.1
_SHARE_OF_RAM = 0.8
"""Of a device's memory that a model may take; the system needs the rest."""


class Speed(Protocol):
    """Predicts seconds; None where it cannot."""

    def prompt_s(self, model: PlannedModel, tokens: int) -> float | None: ...

    def decode_s(self, model: PlannedModel, depth: float) -> float | None: ...


@dataclass(frozen=True)
class Wishes:
    """What a candidate must keep to, as far as it is said."""

    context: int
    """Tokens."""
    prompt_tokens: int = 512
    min_speed: float | None = None
    """Decoded tokens per second, from an empty context."""
    max_first_token: float | None = None
    """Seconds until the answer to a prompt of `prompt_tokens` begins."""
    max_ram: int | None = None
    """Bytes; None: four fifths of the device's memory."""


@dataclass(frozen=True)
class Candidate:
    """One file that could be made of the model."""

    type: str
    """ggml type of all matrices, embeddings and head included."""
    ratio: float
    """Asked for; 1 is dense."""
    kept: float
    """Stored over dense parameters of the linear layers."""
    memory: MemoryNeed
    prompt_tps: float | None
    """Tokens per second; None where nothing is known of the device's prompts; so for those below."""
    first_token_s: float | None
    decode_tps: float | None
    """From an empty context."""
    decode_full_tps: float | None
    """At the end of a full one."""
    misses: tuple[str, ...]
    """Why it does not suit; empty where it does."""
    least_ram: int | None = None
    """Bytes of the smallest memory that the device is sold with and that holds it beside the system; None
    where none does, or none is known."""

    @property
    def name(self) -> str:
        """As in `Q4_0 dense` or `Q4_0 at ratio 0.8`."""
        return f"{self.type} dense" if self.ratio == 1 else f"{self.type} at ratio {self.ratio:g}"


@dataclass(frozen=True)
class PlanResult:
    """What `plan` found."""

    source: str
    """As it was given."""
    device: str
    wishes: Wishes
    max_ram: int | None
    """Bytes that a candidate may take; None where the device's memory is not known."""
    candidates: tuple[Candidate, ...]
    """Best expected quality first."""
    impossible: tuple[str, ...]
    """Candidates that cannot be had, with the reason."""
    recommended: Candidate | None
    reason: str
    basis: str
    """What the speeds come from."""

    def to_json(self) -> dict[str, Any]:
        """The fields and properties above as plain values."""
        def plain(candidate: Candidate) -> dict[str, Any]:
            return {**asdict(candidate), "name": candidate.name, "peak_bytes": candidate.memory.peak}

        return {**asdict(self), "candidates": [plain(each) for each in self.candidates],
                "recommended": None if self.recommended is None else plain(self.recommended)}


def plan(source: str | Path, *, device: str = "host", context: int | None = None, prompt_tokens: int = 512,
         min_speed: float | None = None, max_first_token: float | None = None, max_ram: int | None = None,
         types: Sequence[str] = TYPES, ratios: Sequence[float] = RATIOS, threads: int | None = None,
         begin: Callable[[str, int], Callable[[], None]] = lambda title, total: lambda: None) -> PlanResult:
    """Predict memory and speed of `source` on `device`, dense and at `ratios`, in each of `types`.

    On `host`, this machine, some layers are timed for some seconds; of other devices the preset says what is
    known.

    Args:
        source: as of `model_config.read_dimensions`; the config alone is read.
        context: tokens of a conversation; None: 4,096, or fewer where the model was trained for fewer.
        prompt_tokens: of a prompt.
        min_speed: decoded tokens per second from an empty context, at least.
        max_first_token: seconds of the prompt, at most.
        max_ram: bytes; None: four fifths of the device's memory, of the largest that is sold.
        types: ggml types; `ratios`: kept shares of the linear layers' parameters.
        threads: of this machine; None: one for each physical core.
        begin: hears a title and a number of steps, and gives what is called after each.

    Raises:
        UserError: for a source, device, type or ratio that there is not, a context that is too long, or
            another number that is out of range.
    """
    from skipcat_edge.device import load_device
    from skipcat_edge.model_config import read_dimensions
    from skipcat_edge.ranks import check_ratio

    for ratio in ratios:
        check_ratio(ratio)
    require_at_least(1, max_ram=max_ram, threads=threads)
    require_at_least(0, min_speed=min_speed, max_first_token=max_first_token)
    dimensions, target = read_dimensions(str(source)), load_device(device)
    wishes = Wishes(_context(dimensions, context), prompt_tokens, min_speed, max_first_token, max_ram)
    if not 0 < prompt_tokens <= wishes.context:
        raise UserError(f"A prompt of {prompt_tokens:,} tokens does not fit into a context of "
                        f"{wishes.context:,}; change --prompt-tokens or --context.")
    models, impossible = _models(dimensions, types, ratios)
    limit = max_ram
    if limit is None and target.memory.ram_bytes:
        limit = _for_models(max(target.memory.ram_bytes))
    needs = [memory_need(model, wishes.context, prompt_tokens, target.features) for model in models]
    fitting = [model for model, need in zip(models, needs, strict=True)
               if limit is None or need.peak <= limit]
    speed, basis = _speed(target, dimensions, fitting, wishes, threads, begin)
    candidates = tuple(_candidate(model, need, speed, wishes, limit, target.memory.ram_bytes)
                       for model, need in zip(models, needs, strict=True))
    recommended, reason = recommend(candidates)
    return PlanResult(str(source), device, wishes, limit, candidates, impossible, recommended,
                      reason + _unchecked(candidates, wishes), basis)


def _for_models(ram: int) -> int:
    return round(_SHARE_OF_RAM * ram)


def _context(dimensions: ModelDimensions, wanted: int | None) -> int:
    trained = dimensions.context_length
    if wanted is None:
        return min(DEFAULT_CONTEXT, trained)
    if not 0 < wanted <= trained:
        raise UserError(f"{dimensions.name} was trained for a context of {trained:,} tokens, but {wanted:,} "
                        "are asked for; use another --context.")
    return wanted


def _unchecked(candidates: Sequence[Candidate], wishes: Wishes) -> str:
    """A sentence on wishes that nothing is known about."""
    unknown = []
    if wishes.min_speed is not None and all(each.decode_tps is None for each in candidates):
        unknown.append("decode speed")
    if wishes.max_first_token is not None and all(each.first_token_s is None for each in candidates):
        unknown.append("time to first token")
    return f" The {' and the '.join(unknown)} could not be checked: it is not known here." if unknown else ""


def _models(dimensions: ModelDimensions, types: Sequence[str],
            ratios: Sequence[float]) -> tuple[list[PlannedModel], tuple[str, ...]]:
    """By expected quality: dense ones by bits, then low-rank ones by ratio and bits; and what cannot be had.

    Of models with billions of parameters, plain quantisation to 4 bits loses less than any published low-rank
    method at the same bytes (docs/quality.md measures small ones, and `skipcat-edge compare` yours).
    """
    from skipcat_edge import synth_plan
    from skipcat_edge.format import tensor_bytes
    from skipcat_edge.weight_types import weight_type

    def bits(type_: GGMLQuantizationType) -> int:
        return tensor_bytes(type_, 1, 256)

    names = [types] if isinstance(types, str) else types
    known = sorted({weight_type(name) for name in names}, key=bits, reverse=True)
    if not known:
        raise UserError("No type is named; give one or more ggml types.")
    models, impossible = [], []
    for ratio in (1.0, *sorted({*ratios} - {1.0}, reverse=True)):
        for type_ in known:
            try:
                model = synth_plan.plan(dimensions, type_, ratio, 0)
            except UserError as error:
                impossible.append(f"{type_.name} at ratio {ratio:g}: {error}")
                continue
            linear = [tensor for tensor in model.fallbacks if tensor.role is synth_plan.Role.LINEAR]
            if linear:
                impossible.append(f"{type_.name} at ratio {ratio:g}: rows of {linear[0].name} are no whole "
                                  "blocks.")
            else:
                models.append(model)
    if not models:
        raise UserError(f"No candidate is left: {impossible[0]}")
    return models, tuple(impossible)


def _speed(device: Device, dimensions: ModelDimensions, models: Sequence[PlannedModel], wishes: Wishes,
           threads: int | None, begin: Callable[[str, int], Callable[[], None]]) -> tuple[Speed, str]:
    if device.name != "host":
        from skipcat_edge.preset_speed import PresetSpeed

        preset = PresetSpeed(device)
        return preset, preset.basis()
    from skipcat_edge.probe import MOST_PROMPT_TOKENS, probe, steps
    from skipcat_edge.session import default_threads

    threads = threads or default_threads()
    ratios: dict[GGMLQuantizationType, float | None] = dict.fromkeys(model.type for model in models)
    for model in models:
        if model.low_rank:
            ratios[model.type] = min(model.ratio, ratios[model.type] or 1.0)
    advance = begin("probing this machine", steps(ratios))
    found = probe(dimensions, ratios, threads=threads, advance=lambda _: advance(),
                  prompt_tokens=min(wishes.prompt_tokens, MOST_PROMPT_TOKENS))
    return found, f"Speeds: some layers of the model's size, timed on this machine with {threads} threads."


def _candidate(model: PlannedModel, memory: MemoryNeed, speed: Speed, wishes: Wishes,
               limit: int | None, sold: Sequence[int]) -> Candidate:
    def rate(seconds: float | None, tokens: int = 1) -> float | None:
        return None if seconds is None else tokens / seconds

    prompt_s = speed.prompt_s(model, wishes.prompt_tokens)
    decode_tps = rate(speed.decode_s(model, 0))
    misses = []
    if limit is not None and memory.peak > limit:
        misses.append("memory")
    if wishes.min_speed is not None and decode_tps is not None and decode_tps < wishes.min_speed:
        misses.append("decode speed")
    if wishes.max_first_token is not None and prompt_s is not None and prompt_s > wishes.max_first_token:
        misses.append("first token")
    return Candidate(
        model.type.name, model.ratio, model.kept, memory, rate(prompt_s, wishes.prompt_tokens), prompt_s,
        decode_tps, rate(speed.decode_s(model, wishes.context - 1)), tuple(misses),
        min((ram for ram in sold if memory.peak <= _for_models(ram)), default=None),
    )


def recommend(candidates: Sequence[Candidate]) -> tuple[Candidate | None, str]:
    """The candidate with the best expected quality of those that suit, and why. `candidates`: best first.

    F16 gives way to Q8_0, whose file is half as large and whose loss is within the noise (docs/quality.md).
    """
    suiting = [each for each in candidates if not each.misses]
    if not suiting:
        closest = min(candidates, key=lambda each: (len(each.misses), each.memory.peak))
        return None, (f"No candidate suits; {closest.name} comes closest and misses the limit of "
                      f"{' and of '.join(closest.misses)}: try a smaller model.")
    halved = {each.ratio for each in suiting if each.type == "Q8_0"}
    best = next(each for each in suiting if each.type not in _FLOATS or each.ratio not in halved)
    if best.ratio == 1 and best != suiting[0]:
        why = f"{suiting[0].type} suits too, in a file twice as large that is hardly better"
    elif best.ratio == 1:
        why = "the most bits that suit, and dense files lose least at their size"
    else:
        why = "no dense file suits, and of the low-rank ones it keeps most"
    return best, f"Recommended: {best.name}: {why}.{_faster(best, suiting)}"


def _faster(best: Candidate, suiting: Sequence[Candidate]) -> str:
    """A sentence on what low rank would gain, where that is worth a thought."""
    fastest = max(suiting, key=lambda each: (each.prompt_tps or 0, each.type == best.type))
    if not best.prompt_tps or not fastest.prompt_tps or fastest.ratio == 1:
        return ""
    gain = fastest.prompt_tps / best.prompt_tps
    if gain < _WORTH_A_THOUGHT:
        return ""
    return (f" Prompts would be {gain:.1f} times as fast with {fastest.name}, at a cost in quality that "
            "`skipcat-edge compare` measures.")
