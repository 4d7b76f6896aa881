"""Which tensors of the base GGUF can be low-rank, and which modules feed them.

Names are never our own: gguf's TensorNameMap, which llama.cpp's converter uses, maps the
modules of the Hugging Face model to tensors.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader

from skipcat_edge import format as fmt


@dataclass(frozen=True)
class Layer:
    """A linear layer W: [m, n] of the base file."""

    index: int
    """Of the block it is in."""
    member: str
    """For example `attn_q`."""
    module: str
    """Name in the Hugging Face model."""
    m: int
    n: int

    @property
    def tensor(self) -> str:
        return fmt.weight_name(self.index, self.member)


@dataclass(frozen=True)
class LayerMap:
    """What can be factored, and what stays dense with the reason."""

    architecture: str
    groups: list[tuple[Layer, ...]]
    """Layers of one block that read the same input, in file order."""
    dense: dict[str, str]
    """Tensor name -> why it stays dense."""

    @property
    def members(self) -> list[Layer]:
        """Those of all groups."""
        return [layer for group in self.groups for layer in group]


def map_layers(reader: GGUFReader, module: torch.nn.Module, tree: Path) -> LayerMap:
    """Pair the block matrices of a base GGUF with the modules of its Hugging Face model.

    `tree`: the pinned source, whose tensor names are used.
    """
    architecture = str(fmt.field_value(reader, fmt.KEY_ARCHITECTURE))
    n_blocks = int(fmt.field_value(reader, f"{architecture}.block_count"))
    modules = _module_of_tensor(architecture, n_blocks, module, tree)
    unserved = fmt.UNSERVED.get(architecture, frozenset())
    groups: dict[tuple[int, str], list[Layer]] = defaultdict(list)
    dense: dict[str, str] = {}
    for tensor in reader.tensors:
        index, rest = fmt.split_block(tensor.name) or (-1, "")
        member = rest.removesuffix(".weight")
        if member == rest or len(tensor.shape) < 2:
            continue
        if len(tensor.shape) > 2:
            dense[tensor.name] = "a matrix per expert"
        elif member not in fmt.GROUP_OF:
            dense[tensor.name] = "not a projection that the runtime factors"
        elif member in unserved:
            dense[tensor.name] = f"llama.cpp's {architecture} graph multiplies it directly"
        elif tensor.name not in modules:
            dense[tensor.name] = "no module of the model maps to it"
        else:
            n, m = (int(size) for size in tensor.shape)
            layer = Layer(index, member, modules[tensor.name], m, n)
            groups[index, fmt.GROUP_OF[member]].append(layer)
    return LayerMap(architecture, [tuple(layers) for _, layers in sorted(groups.items())], dense)


@cache
def _tensor_names(tree: Path) -> tuple[Any, Any]:
    """The archive's own (gguf.constants, gguf.tensor_mapping).

    They know architectures that the released gguf does not yet. The package itself is not
    imported, as some of its modules import the released one.
    """
    package = ModuleType("skipcat_pinned_gguf")
    package.__path__ = [str(tree / "vendor" / "llama.cpp" / "gguf-py" / "gguf")]
    sys.modules[package.__name__] = package
    constants, mapping = (
        import_module(f"{package.__name__}.{name}") for name in ("constants", "tensor_mapping")
    )
    return constants, mapping


def _module_of_tensor(
    architecture: str, n_blocks: int, module: torch.nn.Module, tree: Path
) -> dict[str, str]:
    constants, mapping = _tensor_names(tree)
    arch = next((key for key, name in constants.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        return {}
    names = mapping.get_tensor_name_map(arch, n_blocks)
    found: dict[str, str] = {}
    for name, child in module.named_modules():
        weight = getattr(child, "weight", None)
        if not isinstance(weight, torch.nn.Parameter) or weight.dim() != 2:
            continue
        # Some converters strip the model's own prefix, some tables carry another one.
        prefixed = (f"{prefix}.{name}" for prefix in ("model", "bert", "transformer"))
        for candidate in (name, name.partition(".")[2], *prefixed):
            tensor = names.get_name(f"{candidate}.weight", try_suffixes=(".weight",))
            if tensor is not None:
                found.setdefault(tensor, name)
                break
    return found


def keeps_input_order(W: np.ndarray, weight: torch.Tensor) -> bool:
    """Whether the file's W: [m, n] and the module's weight have the same inputs.

    llama.cpp's converter may permute outputs (rotary embeddings), which factors do not mind;
    W^T W does not either, but it changes with the order of inputs. True where the shapes
    cannot be compared (the module is fused, the file is not).
    """
    own = weight.detach().float().cpu()
    if tuple(own.shape) == W.shape[::-1] and own.shape[0] != own.shape[1]:
        own = own.T
    if tuple(own.shape) != W.shape:
        return bool(own.shape[1] == W.shape[1])
    probe = torch.randn(W.shape[1], generator=torch.Generator().manual_seed(0))
    file = torch.from_numpy(np.require(W, requirements="W"))
    expected, found = own.T @ (own @ probe), file.T @ (file @ probe)
    # quantised base files move this by a few percent, another order by about 100
    return bool((found - expected).norm() <= 0.2 * expected.norm())


def stored_transposed(module: torch.nn.Module, layer: Layer) -> bool | None:
    """Whether the module keeps W: [m, n] as [n, m] (GPT-2's Conv1D does); None where the module is not
    the layer alone (fused)."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    linear = isinstance(module, torch.nn.Linear)
    for transposed in (not linear, linear):
        if tuple(weight.shape) == ((layer.n, layer.m) if transposed else (layer.m, layer.n)):
            return transposed
    return None


def linear_weight(module: torch.nn.Module, layer: Layer) -> torch.Tensor | None:
    """The module's weight as W: [m, n], float32; None where the module is not the layer alone."""
    transposed = stored_transposed(module, layer)
    if transposed is None:
        return None
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return (weight.T if transposed else weight).detach().float()
