"""The gated delta rule in chunks against transformers' torch form (Qwen3-Next) and a chunk form with a loop over rows.

One sequence of 2048 tokens, 4 heads of 64, float32. The second peer is what flash-linear-attention gives as its plain
chunk form: the inverse of each chunk's triangular matrix is made row after row. All three compute the same outputs,
which is checked before anything is timed. The ratio is transformers' forward time over ours; the rows hold both peers
with and without the backward pass, and the recurrence token by token.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import finish, interleaved, ratio
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from cenote.ops.delta_rule import chunk_delta_rule, step_delta_rule

CHUNK, GOAL = 64, 1.5  # the peers' chunk; ours has its own default
GOALS = {"transformers": 1.5, "row by row": 2.0}


def transformers_chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """Takes (batch, tokens, heads, ...)."""
    return torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, chunk_size=CHUNK, output_final_state=True)[0]


def row_by_row(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """The same chunks with forward substitution written as a loop; the tokens are a multiple of the chunk."""
    q, k, v, beta, g = (x.transpose(1, 2).float().unflatten(2, (-1, CHUNK)) for x in (q, k, v, beta, g))
    q, c, beta = q * q.shape[-1] ** -0.5, g.cumsum(-1), beta.unsqueeze(-1)
    upper = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (c.unsqueeze(-1) - c.unsqueeze(-2)).masked_fill(upper, -math.inf).exp()
    system = -(beta * k @ k.mT * between).tril(-1)
    for i in range(1, CHUNK):
        row, above = system[..., i, :i].clone(), system[..., :i, :i].clone()
        system[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    inverse = system + torch.eye(CHUNK, device=q.device)
    fresh, seen = inverse @ (beta * v), inverse @ (beta * k * c.exp().unsqueeze(-1))
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for n in range(q.shape[2]):
        corrected = fresh[:, :, n] - seen[:, :, n] @ state
        within = (q[:, :, n] @ k[:, :, n].mT * between[:, :, n]) @ corrected
        out.append(within + (q[:, :, n] * c[:, :, n].exp().unsqueeze(-1)) @ state)
        left = (c[:, :, n, -1:] - c[:, :, n]).exp().unsqueeze(-1)
        state = state * c[:, :, n, -1, None, None].exp() + (k[:, :, n] * left).mT @ corrected
    return torch.cat(out, 2).transpose(1, 2)


def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """Takes (batch, heads, tokens, ...)."""
    return chunk_delta_rule(q, k, v, beta, g, scale=q.shape[-1] ** -0.5)[0]


def token_by_token(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """Takes (batch, heads, tokens, ...)."""
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        at = (x[:, :, t : t + 1] for x in (q, k, v, beta, g))
        one, state = step_delta_rule(*at, state, scale=q.shape[-1] ** -0.5)
        out.append(one)
    return torch.cat(out, 2)


def forward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            function(*inputs)

    return call


def forward_backward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*leaves).sum(), leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    options, _ = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shape = (1, options.heads, options.tokens)
    q, k, v = torch.randn(3, *shape, options.head_dim, device=device)
    beta, g = torch.rand(shape, device=device), F.logsigmoid(torch.randn(shape, device=device) + 2)
    heads_first = [q, F.normalize(k, dim=-1), v, beta, g]
    tokens_first = [x.transpose(1, 2).contiguous() for x in heads_first]
    peers = {"transformers": transformers_chunks, "row by row": row_by_row}
    for function in peers.values():
        torch.testing.assert_close(function(*tokens_first).transpose(1, 2), ours(*heads_first), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(token_by_token(*heads_first), ours(*heads_first), rtol=1e-3, atol=1e-4)
    rows: list[dict[str, Any]] = []
    value = 0.0
    for name, prepare in (("forward", forward), ("forward and backward", forward_backward)):
        calls = {peer: prepare(function, tokens_first) for peer, function in peers.items()}
        times = interleaved({**calls, "cenote": prepare(ours, heads_first)}, options.repeats)
        for peer in peers:
            row = {"device": device, "threads": torch.get_num_threads(), "pass": name, "tokens": options.tokens}
            row |= {"peer": peer, "peer ms": min(times[peer]) * 1e3, "cenote ms": min(times["cenote"]) * 1e3}
            rows.append(row | {"ratio": ratio(times, peer, "cenote"), "goal": GOALS[peer]})
        value = value or rows[0]["ratio"]
    times = interleaved({"loop": forward(token_by_token, heads_first), "cenote": forward(ours, heads_first)}, 3, 1)
    row = {"device": device, "threads": torch.get_num_threads(), "pass": "forward", "tokens": options.tokens}
    row |= {"peer": "token by token", "peer ms": min(times["loop"]) * 1e3, "cenote ms": min(times["cenote"]) * 1e3}
    rows.append(row | {"ratio": ratio(times, "loop", "cenote")})
    finish("gated_delta", "transformers' torch chunk form", GOAL, rows, value, __doc__)


if __name__ == "__main__":
    main()
