"""The scalar whose gradient says how much an output of a layer matters."""

from __future__ import annotations

from typing import Any

import torch

from .calibration import Batch
from .source_model import SourceModel


def loss_of(model: SourceModel, batch: Batch, output: Any, generator: torch.Generator) -> torch.Tensor:
    """The loss of one forward pass, summed over tokens (over sentences for an encoder).

    A causal model's is the cross-entropy of tokens drawn from its own predictions: the second
    moments of its gradient are the Fisher information, and so the curvature of the KL divergence
    from the dense model. An encoder's is a random projection of each sentence's embedding, whose
    gradient has the second moments of the embedding's Jacobian.
    """
    if model.is_encoder:
        return _projected_embedding(model, batch, output.last_hidden_state, generator)
    return _sampled_cross_entropy(batch, output.logits, generator)


def _sampled_cross_entropy(batch: Batch, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    real = batch.mask.bool().to(logits.device)
    rows = logits[real].float()
    with torch.no_grad():
        probabilities = torch.softmax(rows, dim=-1).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(rows.device)
    return torch.nn.functional.cross_entropy(rows, drawn, reduction="sum")


def _projected_embedding(
    model: SourceModel, batch: Batch, hidden: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    mask = batch.mask.to(hidden.device)[:, :, None].float()
    pooled = hidden[:, 0] if model.pools_first_token else (hidden * mask).sum(1) / mask.sum(1)
    embedding = torch.nn.functional.normalize(pooled.float(), dim=-1)
    direction = torch.randn(embedding.shape, generator=generator).to(embedding.device)
    return (direction * embedding).sum()
