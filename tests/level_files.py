"""A low-rank file with levels, made from a dense one without the converter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from gguf_edit import GGUF, Tensor

from skipcat_edge import format as fmt

LEVELS = (0.6, 0.8)
LOSSES = (0.25, 0.125)


def write_levels(dense: Path, out: Path) -> Path:
    """`dense`, a F16 model, at the levels 0.6 and 0.8, with truncated SVDs in every form that stages have.

    attn_in: a shared projection of both levels, to which the upper one adds another. attn_output: factors at
    the lower level, dense at the upper one. ffn_in: each layer by itself with Skip, another at each level.
    ffn_down: one at both levels.
    """
    model = GGUF.read(dense)
    names = {place for name in model.tensors if (place := fmt.parse_weight_name(name))}
    for layer in {layer for layer, _ in names}:
        _Block(model, layer).compress()
    architecture, *_ = model.keys[fmt.KEY_ARCHITECTURE]
    model.set(fmt.KEY_ARCHITECTURE, fmt.ARCHITECTURE_PREFIX + architecture)
    model.set(fmt.KEY_FORMAT_VERSION, fmt.LEVELS_FORMAT_VERSION, GGUFValueType.UINT32)
    model.set(fmt.KEY_RUNTIME_MIN, fmt.LEVELS_RUNTIME_MIN)
    model.set(fmt.KEY_RATIO, LEVELS[-1], GGUFValueType.FLOAT32)
    model.set(fmt.KEY_METHOD, "test")
    model.keys[fmt.KEY_LEVELS] = [*LEVELS], GGUFValueType.ARRAY, GGUFValueType.FLOAT32
    model.keys[fmt.KEY_LEVELS_LOSS] = [*LOSSES], GGUFValueType.ARRAY, GGUFValueType.FLOAT32
    return model.write(out)


class _Block:
    def __init__(self, model: GGUF, layer: int) -> None:
        self._tensors, self._layer = model.tensors, layer

    def compress(self) -> None:
        layer, tensors = self._layer, self._tensors
        attention = [self._take(name) for name in ("attn_q", "attn_k", "attn_v")]
        U, s, Vt = np.linalg.svd(np.concatenate(attention), full_matrices=False)
        low, high = self._ranks(len(s))
        rows = np.cumsum([0, *map(len, attention)])
        for levels, part in ((None, slice(low)), ((1, 1), slice(low, high))):
            tensors[fmt.lr_a_name(layer, "attn_in", levels)] = _stored(Vt[part])
            for index, name in enumerate(("attn_q", "attn_k", "attn_v")):
                B = (U * s)[rows[index] : rows[index + 1], part]
                tensors[fmt.lr_b_name(layer, name, levels)] = _stored(B)
        self._factor("attn_output", self._take("attn_output", keep=True), low, (0, 0), skip=False)
        for name in ("ffn_gate", "ffn_up"):
            W = self._take(name)
            self._factor(name, W, low, (0, 0), skip=True)
            self._factor(name, W, high, (1, 1), skip=True)
        self._factor("ffn_down", self._take("ffn_down"), high, None, skip=True)

    @staticmethod
    def _ranks(full: int) -> tuple[int, int]:
        return full // 2 // 8 * 8, full * 3 // 4 // 8 * 8

    def _take(self, name: str, keep: bool = False) -> np.ndarray:
        weight = fmt.weight_name(self._layer, name)
        W = self._tensors[weight].array().astype(np.float32)
        if not keep:
            del self._tensors[weight]
        return W

    def _factor(self, name: str, W: np.ndarray, rank: int, levels: fmt.Levels | None, skip: bool) -> None:
        from scipy.linalg import qr

        U, s, Vt = np.linalg.svd(W, full_matrices=False)
        A, B = Vt[:rank], U[:, :rank] * s[:rank]
        if skip:
            S = np.zeros(W.shape[1], bool)
            S[qr(A, mode="r", pivoting=True)[1][:rank]] = True
            A, B = np.linalg.solve(A[:, S], A[:, ~S]), B @ A[:, S]
            mask = fmt.skip_mask_name(self._layer, name, levels)
            self._tensors[mask] = Tensor.of(fmt.pack_skip_mask(S))
        self._tensors[fmt.lr_a_name(self._layer, name, levels)] = _stored(A)
        self._tensors[fmt.lr_b_name(self._layer, name, levels)] = _stored(B)


def _stored(array: np.ndarray) -> Tensor:
    return Tensor.of(np.ascontiguousarray(array, np.float16))
