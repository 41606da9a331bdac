"""DHN-NCE: decoupled contrastive loss with hard negatives, for fine-tuning CLIP-like models (MedCLIP-SAM, arXiv 2403.20253, equations 1 to 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dhn_nce(
    similarity: Tensor, *, temperature: float = 0.6, beta_image: float = 0.15, beta_text: float = 0.15, same: Tensor | None = None, reference_bug: bool = False
) -> Tensor:
    """The loss of a batch of pairs.

    With S = similarity / temperature, over images i and texts j:
    image → text: mean_i [ -S_ii + log sum_{j != i} W_ij exp(S_ij) ], W_ij = (B - 1) exp(beta_image S_ij) / sum_{k != i} exp(beta_image S_ik);
    text → image the same with S transposed and beta_text; the loss is their sum. The positive is in no denominator (decoupled), and near negatives weigh
    more than far ones (hard). With beta 0 all weights are 1.

    Args:
        similarity: Cosines of images (rows) and texts (columns) of the batch. float [B, B], B ≥ 2
        temperature: Divides the cosines, > 0; the authors ship 0.6.
        beta_image: Hardness, image → text, ≥ 0.
        beta_text: Hardness, text → image, ≥ 0.
        same: Pairs off the diagonal that belong together too (equal captions) and are no negatives. bool [B, B]
        reference_bug: The function that the authors' code computes instead: it averages over all B² entries, the positives enter the normaliser as exp(0), and the
            normaliser lacks beta. For reproduction only; takes no `same`.

    Returns:
        Scalar. Rows without any negative count their positive alone.

    Raises:
        ValueError: shapes or numbers do not fit.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or len(similarity) < 2:
        raise ValueError(f"dhn_nce: similarity must be [B, B] with B of at least 2, got {list(similarity.shape)}. A batch of one pair has no negatives.")
    if not temperature > 0 or beta_image < 0 or beta_text < 0:
        raise ValueError(f"dhn_nce: temperature must be above 0 and betas at least 0, got {temperature}, {beta_image} and {beta_text}.")
    scaled = similarity.float() / temperature
    own = torch.eye(len(scaled), dtype=torch.bool, device=scaled.device)
    if reference_bug:
        return _as_released(scaled, own, beta_image, beta_text)
    left_out = own if same is None else own | same
    return _one_way(scaled, left_out, beta_image) + _one_way(scaled.T, left_out.T, beta_text)


def _one_way(scaled: Tensor, left_out: Tensor, beta: float) -> Tensor:
    """Rows are the queries. [B, B], bool [B, B] → []"""
    negatives = (~left_out).sum(1)

    def summed(values: Tensor) -> Tensor:
        return values.masked_fill(left_out, torch.finfo(values.dtype).min).logsumexp(1)

    # log of sum W exp(S), with W = (B - 1) exp(beta S) / sum exp(beta S): both sums as log-sum-exp
    pushed = torch.log(negatives.clamp(min=1).to(scaled.dtype)) + summed((1 + beta) * scaled) - summed(beta * scaled)
    return (torch.where(negatives > 0, pushed, torch.zeros_like(pushed)) - scaled.diagonal()).mean()


def _as_released(scaled: Tensor, own: Tensor, beta_image: float, beta_text: float) -> Tensor:
    """What the released code computes, simplified; found by reading it, not copied."""
    rest = scaled.masked_fill(own, 0.0)
    away = 2 * math.log(len(scaled) - 1) + (2 + beta_image + beta_text) * rest.mean() - rest.logsumexp(1).mean() - rest.T.logsumexp(1).mean()
    return away - 2 * scaled.diagonal().sum() / len(scaled) ** 2
