"""Rotary position embedding (Su et al. 2021): one table, by transformers' own code, and the rotation in plain torch."""

from typing import Any

import torch

Tensor = torch.Tensor


def rope_cache(qwen: Any, length: int) -> Tensor:
    """Cosines and sines of positions 0 to length - 1 for a Qwen2ForCausalLM: (2, length, D/2) in fp32, heads D wide."""
    positions = torch.arange(length, device=qwen.device)[None]
    both = qwen.model.rotary_emb(torch.zeros(1, device=qwen.device), positions)
    return torch.stack([part[0].chunk(2, dim=-1)[0] for part in both])  # its second half repeats the first


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads (N, H, D) rotated by cos and sin (N, D/2), in fp32. With -sin it is the backward pass."""
    (one, two), cos, sin = heads.float().chunk(2, -1), cos[:, None], sin[:, None]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)
