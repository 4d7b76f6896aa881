"""Weights in memory only while they are used: of a model, one block or the output head at a time.

The model is built without weights (on PyTorch's meta device). A block's are read from its safetensors file
when its forward pass begins, and go when another's does. Of the token embeddings only the rows that a text
uses are read. What is small stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from skipcat_edge.errors import UserError, first_line

from .without_model_code import read_index

# Elements of a module outside the blocks, such as an encoder's position embeddings, that stay.
_SMALL = 1 << 21

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass
class Residency:
    """Which weights are there: those of the unit that was brought last."""

    device: torch.device
    stored: dict[torch.nn.Module, dict[str, tuple[Path, str]]]
    """Of each module by its own parameters' names: the file, and the tensor in it."""
    units: dict[torch.nn.Module, torch.nn.Module]
    """Of each module the block, or the head, that it is in."""
    _there: torch.nn.Module | None = None
    _meta: list[tuple[torch.nn.Module, str, torch.nn.Parameter | None]] = field(default_factory=list)

    def bring(self, module: torch.nn.Module) -> None:
        """Read the weights of the unit that `module` is in, unless they are there; another's go."""
        unit = self.units.get(module)
        if unit is None or unit is self._there:
            return
        self.release()
        self._there = unit
        for owner in unit.modules():
            for name, (file, tensor) in self.stored.get(owner, {}).items():
                self._meta.append((owner, name, owner._parameters[name]))
                owner._parameters[name] = _parameter(_read(file, tensor, self.device))

    def release(self) -> None:
        """No unit's weights are in memory any more, unless somebody else holds them."""
        for owner, name, meta in self._meta:
            owner._parameters[name] = meta
        self._meta.clear()
        self._there = None


@dataclass(frozen=True)
class _Bring:
    """A block's or the head's weights come before it runs."""

    residency: Residency

    def __call__(self, unit: torch.nn.Module, _args: Any) -> None:
        # one whose forward pass was replaced needs none
        if "forward" not in unit.__dict__:
            self.residency.bring(unit)

    def __deepcopy__(self, _memo: Any) -> Any:
        # a block's copy has weights of its own
        return _nothing


def _nothing(_unit: torch.nn.Module, _args: Any) -> None:
    pass


@dataclass(frozen=True)
class _Rows:
    """Embeddings of which only the rows that are asked for are read."""

    file: Path
    tensor: str
    device: torch.device

    def before(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, places = args[0].unique(return_inverse=True)
        with _opened(self.file) as file:
            rows = file.get_tensor(self.tensor)[ids.cpu()]
        module._parameters["weight"] = _parameter(rows.float().to(self.device))
        return (places, *args[1:])


def stream_weights(module: torch.nn.Module, source: Path, device: str) -> Residency:
    """Let `module`, built on the meta device, read its weights from the safetensors files in `source`.

    Raises UserError where one of its tensors is not in them under its own name.
    """
    known, sizes = _tensors(source), shapes(source)
    prefix = getattr(module, "base_model_prefix", "")
    by_parameter: dict[int, tuple[Path, str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if candidate in known:
                by_parameter.setdefault(id(parameter), (known[candidate], candidate))
                break
    residency = Residency(torch.device(device), {}, {})
    for path, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in by_parameter:
                raise UserError(f"{path}.{name} is not in the safetensors files of {source} under its own "
                                "name, so that it cannot be streamed; leave out --max-memory.")
            residency.stored.setdefault(owner, {})[name] = by_parameter[id(parameter)]
    _check_shapes(residency, sizes)
    _take_buffers(module, known, prefix, residency.device)
    units = list(_blocks(module))
    below = {each for unit in units for each in unit.modules()}
    embeddings = module.get_input_embeddings()  # type: ignore[operator]
    for owner in [each for each in residency.stored if each not in below]:
        parts = residency.stored[owner]
        size = sum(parameter.numel() for parameter in owner._parameters.values() if parameter is not None)
        if size <= _SMALL:
            for name, (file, tensor) in residency.stored.pop(owner).items():
                owner._parameters[name] = _parameter(_read(file, tensor, residency.device))
        elif owner is embeddings:
            _read_rows(owner, _Rows(*parts["weight"], residency.device))
        else:
            units.append(owner)
    for unit in units:
        residency.units |= dict.fromkeys(unit.modules(), unit)
        unit.register_forward_pre_hook(_Bring(residency))
    return residency


def without_weights(build: Any, config: Any) -> torch.nn.Module:
    """What `build` (from_config of one of transformers' classes) makes of `config`, its parameters on the
    meta device; buffers, which no file holds, are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module: torch.nn.Module = build(config, dtype=torch.float32)
    # what was tied was torn apart by the move to the meta device
    module.tie_weights()  # type: ignore[operator]
    return module


def shapes(source: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor in the directory's safetensors files."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted({*_tensors(source).values()}):
        with _opened(path) as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def _tensors(source: Path) -> dict[str, Path]:
    """The file of each tensor in the directory's safetensors files."""
    if (source / _INDEX).is_file():
        index = read_index(source / _INDEX)
        try:
            return {str(name): source / file for name, file in index["weight_map"].items()}
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{source / _INDEX} is no index of weights; get the model again.") from None
    if not (source / _SINGLE).is_file():
        raise UserError(f"{source} has no safetensors files, the only ones that can be streamed; leave out "
                        "--max-memory.")
    with _opened(source / _SINGLE) as file:
        return dict.fromkeys(file.keys(), source / _SINGLE)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises UserError where it is missing or damaged."""
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; get the model again.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({first_line(error)}); get the model "
                        "again.") from None
    with file:
        yield file


def _blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The elements of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _check_shapes(residency: Residency, sizes: dict[str, tuple[int, ...]]) -> None:
    for owner, parts in residency.stored.items():
        for name, (path, tensor) in parts.items():
            parameter = owner._parameters[name]
            assert parameter is not None
            if sizes.get(tensor) != tuple(parameter.shape):
                raise UserError(f"{path}: {tensor} has the shape {list(sizes.get(tensor, ()))}, but "
                                f"config.json asks for {list(parameter.shape)}; check the model.")


def _take_buffers(
    module: torch.nn.Module, known: dict[str, Path], prefix: str, device: torch.device
) -> None:
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else buffer.to(device)
    for name, buffer in module.named_buffers():
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if candidate in known:
                with _opened(known[candidate]) as file:
                    buffer.copy_(file.get_tensor(candidate))
                break


def _read_rows(owner: torch.nn.Module, rows: _Rows) -> None:
    meta = owner._parameters["weight"]
    # its row has another place among those that are read; only gradients, which nobody takes, need it
    owner.padding_idx = None  # type: ignore[assignment]
    owner.register_forward_pre_hook(rows.before)

    def after(module: torch.nn.Module, _args: Any, _output: Any) -> None:
        module._parameters["weight"] = meta

    owner.register_forward_hook(after)


def _read(path: Path, tensor: str, device: torch.device) -> torch.Tensor:
    """A tensor in float32 of its own; what the file's reader maps goes with it."""
    with _opened(path) as file:
        stored = file.get_tensor(tensor)
        return torch.empty(stored.shape, dtype=torch.float32, device=device).copy_(stored)


def _parameter(value: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value, requires_grad=False)
