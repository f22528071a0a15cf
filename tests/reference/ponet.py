"""PoNet token by token: every map formed, every maximum taken by a loop."""

import torch
import torch.nn.functional as F


def ponet_row(x, weights, segment_ids, special, heads, guard):
    """One row of real tokens ``(tokens, dim)``; weights are pairs (weight, bias) by official name."""
    q, k, o, s, local = (F.linear(x, *weights[name]) for name in ("q", "k", "o", "segment", "local"))
    tokens, dim = x.shape
    size = dim // heads
    overall, shares = [], []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        share = ((k[:, part] @ q[:, part].mean(dim=0)) / size**0.5).softmax(dim=0)
        overall.append(share @ k[:, part])
        shares.append(share)
    overall = torch.cat(overall)
    out = []
    for n in range(tokens):
        same = [m for m in range(tokens) if segment_ids[m] == segment_ids[n]]
        segment = torch.stack([s[m] for m in same]).amax(dim=0)
        window = [m for m in (n - 1, n, n + 1) if 0 <= m < tokens and not (guard and special[m])]
        near = torch.stack([local[m] for m in window]).amax(dim=0) if window else torch.zeros(dim)
        if guard and special[n]:
            segment, near = torch.zeros_like(segment), torch.zeros_like(near)
        out.append((overall + segment) * o[n] + near)
    return torch.stack(out), torch.stack(shares)


def ponet(mixer, tokens, mask, segment_ids, special):
    """A batch: each row without its padding, laid back, 0 at padding. Neighbours are those of the row's real tokens,
    so padding may only stand at the ends."""
    weights = {
        name: (getattr(mixer, f"dense_{name}").weight, getattr(mixer, f"dense_{name}").bias)
        for name in ("q", "k", "o", "segment", "local")
    }
    out = torch.zeros_like(tokens)
    for row in range(len(tokens)):
        real = mask[row]
        out[row, real] = ponet_row(
            tokens[row, real], weights, segment_ids[row, real], special[row, real], mixer.num_heads, mixer.leak_guard
        )[0]
    return out
