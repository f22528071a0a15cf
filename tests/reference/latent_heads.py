"""Latent attention and the multi-layer trainable head in the published order of operations.

Weights come as a state dict in the official key names; nothing is computed once that the published code computes per
sequence, nothing is folded, and means come last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def random_state(dim: int, latents: int, heads: int, head_dim: int, ff_mult: int = 4, seed: int = 0) -> State:
    """Weights of a head in the official key names, norms and biases not at their trivial initial values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + shift

    attend, mlp = "cross_attend_blocks.0.", "cross_attend_blocks.1."
    state = {"latents": draw(latents, dim)}
    for norm in (f"{attend}norm", f"{attend}norm_context", f"{mlp}norm"):
        state |= {f"{norm}.weight": draw(dim, scale=0.3, shift=1.0), f"{norm}.bias": draw(dim, scale=0.3)}
    inner, hidden = heads * head_dim, ff_mult * dim
    shapes = {
        f"{attend}fn.to_q": (inner, dim),
        f"{attend}fn.to_kv": (2 * inner, dim),
        f"{attend}fn.to_out": (dim, inner),
        f"{mlp}fn.net.0": (2 * hidden, dim),
        f"{mlp}fn.net.2": (dim, hidden),
    }
    for name, (rows, columns) in shapes.items():
        state[f"{name}.weight"] = draw(rows, columns, scale=columns**-0.5)
        if name.startswith(mlp):
            state[f"{name}.bias"] = draw(rows, scale=0.1)
    return state


def cross_attention(state: State, asking: Tensor, read: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Both arguments normed already, ``(batch, n, dim)`` each; ``mask`` over the side that is read."""
    q = asking @ state["cross_attend_blocks.0.fn.to_q.weight"].T
    k, v = (read @ state["cross_attend_blocks.0.fn.to_kv.weight"].T).chunk(2, dim=-1)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ state["cross_attend_blocks.0.fn.to_out.weight"].T


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def gated_mlp(state: State, x: Tensor) -> Tensor:
    name = "cross_attend_blocks.1.fn.net"
    a, g = F.linear(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"]).chunk(2, dim=-1)
    return F.linear(a * F.gelu(g), state[f"{name}.2.weight"], state[f"{name}.2.bias"])


def latent_attention_tokens(state: State, tokens: Tensor, heads: int) -> Tensor:
    """NV-Embed's layer before pooling, ``(batch, tokens, dim)``."""
    latents = state["latents"].expand(tokens.shape[0], -1, -1)
    asking = norm(state, "cross_attend_blocks.0.norm", tokens)
    read = norm(state, "cross_attend_blocks.0.norm_context", latents)
    y = cross_attention(state, asking, read, heads) + tokens
    return gated_mlp(state, norm(state, "cross_attend_blocks.1.norm", y)) + y


def latent_attention(state: State, tokens: Tensor, mask: Tensor, heads: int, normalize: bool = True) -> Tensor:
    """NV-Embed's pooled embedding, ``(batch, dim)``."""
    out = latent_attention_tokens(state, tokens, heads)
    keep = mask[..., None].to(out.dtype)
    pooled = (out * keep).sum(1) / keep.sum(1)
    return F.normalize(pooled, dim=-1) if normalize else pooled


def latent_pooling(
    state: State, inputs: Tensor, heads: int, mask: Tensor | None = None, normalize: bool = True
) -> Tensor:
    """The trainable head over inputs ``(batch, n, dim)`` (tokens, or layer vectors with their learned vector added)."""
    latents = state["latents"].expand(inputs.shape[0], -1, -1)
    asking = norm(state, "cross_attend_blocks.0.norm_context", latents)
    read = norm(state, "cross_attend_blocks.0.norm", inputs)
    x = cross_attention(state, asking, read, heads, mask) + latents
    x = gated_mlp(state, norm(state, "cross_attend_blocks.1.norm", x)) + x
    return F.normalize(x.mean(1), dim=-1) if normalize else x.mean(1)
