"""What the batteries of mixer properties run over, and what they cannot know from a name."""

import torch

from cenote.mixing import MixerContext, create_mixer, list_mixers
from cenote.types import Grid

# Heads of 4, 6 and 8 divide the width; the grid holds blocks of 2 and of 4 cells.
DIM, GRID = 48, (4, 4)

# Constructor options by name, where the defaults do not fit DIM and GRID.
OPTIONS: dict[str, dict] = {
    "halo_attention": {"num_heads": 4, "block_size": 2, "halo_size": 1},
    "random_matrix": {"grid": GRID},
    "spatial_fc": {"grid": GRID},
}

# Settings beside the defaults that take another path through a mixer.
VARIANTS = [
    "halo_attention(mask_padding=True, qkv_bias=True)",
    "halo_attention(block_size=3, auto_pad=True)",
    "ponet(leak_guard=False, poolings=('segment', 'local'), output_map=True)",
    "ponet_lra(segment_num=3)",
    "pool(pool_size=5)",
    "softmax_attention(causal=True, rope_theta=10000.0, num_heads=6)",
    "softmax_attention(causal=True, qkv_bias=True)",
    "taylor_attention(causal=True, form='diagonal', rope_theta=10000.0, num_heads=6)",
    "taylor_attention(causal=True)",
    "key_softmax(bidirectional=True, qkv_bias=True)",
    "key_softmax(qk_norm=True, num_heads=6)",
    "static_attention(causal=True, static_norm=True, rope_theta=10000.0, num_heads=6)",
    "fixed_attention(causal=True, rope_theta=10000.0, num_heads=6)",
    "tap(num_scales=3, count_include_pad=False, num_heads=6)",
    "linear_attention(feature_map='elu', normalise=True, num_heads=6)",
    "gated_delta_product(num_updates=3, max_step=2.0, expand_v=2.0)",
    "gated_delta(num_heads=6, num_kv_heads=3, conv_on='k', conv_size=3, decay='sigmoid', qk_norm='rms')",
    "delta_rule(conv_on='', output_gate=False, output_norm=False, chunk_size=4)",
    "mini_batch(batch_tokens=3)",
]

SPECS = [*list_mixers(), *VARIANTS]


def base_name(spec: str) -> str:
    return spec.strip().partition("(")[0]


def make(spec: str, **options):
    return create_mixer(spec, dim=DIM, defaults=OPTIONS.get(base_name(spec), {}), **options)


def context_for(mixer, tokens, mask) -> MixerContext:
    """What a mixer needs, the same for a token wherever padding stands."""
    batch, count = tokens.shape[:2]
    mask = torch.ones(batch, count, dtype=torch.bool) if mask is None else mask
    rank = (mask.cumsum(dim=1) - 1).clamp(min=0)
    given: dict = {}
    if "grid" in mixer.needs:
        given["grid"] = Grid(*GRID)
    if "segment_ids" in mixer.needs:
        given["segment_ids"] = rank // 4
    if "special_mask" in mixer.needs:
        given["special_mask"] = (rank == 0) & mask
    if "embeddings" in mixer.needs:
        given["embeddings"] = tokens.flip(-1).nan_to_num().masked_fill(~mask[..., None], 0.0)
    if "stream" in mixer.needs:
        given["stream"] = torch.randn(1, 32, tokens.shape[2], generator=torch.Generator().manual_seed(5))
    return MixerContext(**given)
