"""Which tensors of the base GGUF can be low-rank, and which modules feed them.

Names are never our own: gguf's TensorNameMap, which llama.cpp's converter uses, maps the
modules of the Hugging Face model to tensors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

from skipcat_edge import format as fmt

_MEMBER = re.compile(r"blk\.(\d+)\.(\w+)\.weight$")


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


def map_layers(reader: GGUFReader, module: torch.nn.Module) -> LayerMap:
    """Pair the block matrices of a base GGUF with the modules of its Hugging Face model."""
    architecture = str(fmt.field_value(reader, fmt.KEY_ARCHITECTURE))
    n_blocks = int(fmt.field_value(reader, f"{architecture}.block_count"))
    modules = _module_of_tensor(architecture, n_blocks, module)
    unserved = fmt.UNSERVED.get(architecture, frozenset())
    groups: dict[tuple[int, str], list[Layer]] = defaultdict(list)
    dense: dict[str, str] = {}
    for tensor in reader.tensors:
        match = _MEMBER.match(tensor.name)
        if match is None or len(tensor.shape) < 2:
            continue
        index, member = int(match[1]), match[2]
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


def _module_of_tensor(architecture: str, n_blocks: int, module: torch.nn.Module) -> dict[str, str]:
    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        return {}
    assert isinstance(arch, MODEL_ARCH)
    names = get_tensor_name_map(arch, n_blocks)
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
