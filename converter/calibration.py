"""Calibration text to batches of tokens."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from skipcat_edge.errors import UserError

from .factorize import Method
from .source_model import SourceModel

DEFAULT_TOKENS = 65_536
DEFAULT_SEQ_LEN = 256

BATCH_TOKENS = 4096
"""Tokens of one forward pass."""

# Rarely more on average, in any language and tokenizer.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Batch:
    """Token ids [n_sequences, n_tokens] with a mask of the same shape (1: a real token)."""

    ids: torch.Tensor
    mask: torch.Tensor


def half_of_rows(batch: Batch, first: int) -> torch.Tensor:
    """0 or 1 for each real token of `batch`, row by row: whole sequences take turns.

    `first`: sequences before this batch.
    """
    sequences = torch.arange(first, first + len(batch.ids))[:, None].expand_as(batch.ids)
    halves: torch.Tensor = (sequences % 2)[batch.mask.bool()]
    return halves


@dataclass(frozen=True)
class CalibrationSet:
    """What the model reads while statistics are collected."""

    batches: list[Batch]
    tokens: int
    sha256: str
    """Of the calibration file's bytes."""


def require_calibration(method: Method, path: Path | None) -> None:
    """Raise UserError if `method` reads a calibration text and there is none."""
    if method.whiten and path is None:
        raise UserError(f"Method {method.name} needs a calibration text; pass --calibration FILE.")


def load_calibration(
    path: Path, model: SourceModel, tokens: int | None = None, seq_len: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> CalibrationSet:
    """Tokenise the first `tokens` tokens of `path` (None: up to 65,536) in windows of `seq_len`.

    A window of a causal model starts with BOS where the model has one; BOS is not counted. An
    encoder reads sentences, each with its special tokens, cut at `seq_len`. Raises UserError if
    the file is missing, empty, or shorter than asked.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise UserError(f"Calibration text {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"Calibration text {path} is not UTF-8 text; give a plain text file.") from None
    if not text.strip():
        raise UserError(f"Calibration text {path} is empty; give a text like the ones the model will see.")
    if seq_len is not None and seq_len > model.max_length:
        raise UserError(f"--seq-len is {seq_len}, but the model takes at most {model.max_length} tokens.")
    length = min(seq_len or DEFAULT_SEQ_LEN, model.max_length)
    wanted = DEFAULT_TOKENS if tokens is None else tokens
    make = _sentence_batches if model.is_encoder else _window_batches
    windows, found = make(text, model, wanted, length)
    batches = _pad(windows, _padding(model), batch_tokens)
    if not batches:
        raise UserError(f"Calibration text {path} has no sentence of three words; give running text.")
    if tokens is not None and found < tokens:
        raise UserError(
            f"Calibration text {path} has {found:,} tokens, but --calib-tokens asks for {tokens:,}; "
            "give a longer text or ask for fewer."
        )
    return CalibrationSet(batches, found, hashlib.sha256(data).hexdigest())


def _window_batches(text: str, model: SourceModel, wanted: int, length: int) -> tuple[list[list[int]], int]:
    def tokenize(part: str) -> list[int]:
        tokens: list[int] = model.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    # A long text is tokenised in full only if its beginning has too few tokens.
    head = text[: _CHARACTERS_PER_TOKEN * wanted]
    ids = tokenize(head)
    if len(ids) <= wanted and len(head) < len(text):
        ids = tokenize(text)
    ids = ids[:wanted]
    bos = model.tokenizer.bos_token_id
    prefix = [] if bos is None else [bos]
    step = length - len(prefix)
    windows = [prefix + ids[i : i + step] for i in range(0, len(ids), step)]
    return windows, len(ids)


def _sentence_batches(text: str, model: SourceModel, wanted: int, length: int) -> tuple[list[list[int]], int]:
    windows: list[list[int]] = []
    found = 0
    for sentence in split_sentences(text):
        if found >= wanted:
            break
        ids = model.tokenizer(sentence, truncation=True, max_length=length, verbose=False)["input_ids"]
        windows.append(ids)
        found += len(ids)
    return windows, found


def _padding(model: SourceModel) -> int:
    pad = model.tokenizer.pad_token_id if model.is_encoder else None
    return 0 if pad is None else int(pad)


def split_sentences(text: str) -> list[str]:
    """Sentences of at least three words; headings and fragments say little about usage."""
    pieces = re.split(r"(?<=[.!?])\s+|\n+", text)
    return [piece.strip() for piece in pieces if len(piece.split()) >= 3]


def _pad(windows: list[list[int]], pad: int, batch_tokens: int) -> list[Batch]:
    """Batches of at most `batch_tokens` tokens, or one window; windows of similar length share one."""
    windows = sorted(windows, key=len, reverse=True)
    batches = []
    start = 0
    while start < len(windows):
        width = len(windows[start])
        chunk = windows[start : start + max(1, batch_tokens // width)]
        ids = torch.full((len(chunk), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, window in enumerate(chunk):
            ids[row, : len(window)] = torch.tensor(window)
            mask[row, : len(window)] = 1
        batches.append(Batch(ids, mask))
        start += len(chunk)
    return batches
