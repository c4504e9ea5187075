"""Q-Former parts (Li et al. 2023, arXiv 2301.12597; its causal form: Ge et al. 2023, arXiv 2310.01218).

Shapes: B images, N queries, L words, M positions of the features, C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


class QFormer(Blip2QFormerModel):
    """BLIP-2's, with queries that see only themselves and those before them where it is `causal`."""

    def __init__(self, config: Blip2QFormerConfig, causal: bool = False):
        super().__init__(config)
        self.causal = causal

    def read(self, queries: Tensor, features: Tensor) -> Tensor:
        """[N, C] or [B, N, C] and features [B, M, C'] -> [B, N, C]; every query sees all features."""
        queries = queries.expand(len(features), -1, -1)
        mask = causal_mask(queries.shape[1], queries) if self.causal else None
        return self(query_embeds=queries, attention_mask=mask, encoder_hidden_states=features).last_hidden_state

    def read_words(self, words: Tensor, there: Tensor) -> Tensor:
        """Embedded words [B, L, C], and where there are any, bool [B, L] -> [B, L, C]; both ways, no features."""
        return self(query_embeds=words, query_length=0, attention_mask=there).last_hidden_state


def make_qformer(
    width: int, layers: int, heads: int, features: int, *, cross_every: int = 2, dropout: float = 0.0,
    words: bool = False, causal: bool = False,
) -> QFormer:  # fmt: skip
    """Args: features: their width. cross_every: one layer in so many looks at them, from the first on. words: layers
    have a second feed-forward network, for words."""
    config = Blip2QFormerConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        encoder_hidden_size=features, cross_attention_frequency=cross_every, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, use_qformer_text_input=words,
        initializer_range=0.02 * (768 / width) ** 0.5,  # 0.02 where BERT has it; narrow layers would pass nothing on
    )  # fmt: skip
    return QFormer(config, causal)


def causal_mask(count: int, like: Tensor) -> Tensor:
    """float [1, 1, N, N] to add to the scores: 0 where query i may see query j <= i, else -infinity.

    Not a boolean one, which eager attention of transformers would add as numbers: every query would see all.
    """
    shut = torch.full((count, count), -torch.inf, device=like.device, dtype=like.dtype)
    return shut.triu(1)[None, None]


class ViTBlock(nn.Module):
    """A pre-norm transformer block, by the names of timm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, C / heads]
        x = x + self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
