"""Efficient probing, forward and backward: pool-first against the official order and against multi-head attention
pooling."""

from __future__ import annotations

import torch
from common import finish, interleaved, ratio
from torch import nn

from cenote.allocator import keep_freed_memory
from cenote.pooling import create_pooling

BATCH, TOKENS, DIM, QUERIES = 16, 196, 768, 32


class OfficialOrder(nn.Module):
    """The same function in the published order: every token is projected, then each query pools its slice."""

    def __init__(self, queries: torch.Tensor, weight: torch.Tensor) -> None:
        super().__init__()
        self.queries, self.weight = nn.Parameter(queries.clone()), nn.Parameter(weight.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        count = len(self.queries)
        attention = (self.queries.expand(batch, -1, -1) * dim**-0.5 @ x.transpose(1, 2)).softmax(dim=-1)
        values = (x @ self.weight.T).view(batch, tokens, count, -1).permute(0, 2, 1, 3)
        return (attention[:, :, None] @ values).flatten(1)


class MultiHead(nn.Module):
    """One learned query through ``torch.nn.MultiheadAttention``, the usual attentive probe."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0][:, 0]


def main() -> None:
    keep_freed_memory()  # as cenote probe does; the peers run in the same process
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pool = create_pooling("efficient_probing", dim=DIM, num_queries=QUERIES).to(device)
    official = OfficialOrder(pool.queries.data, pool.value.weight.data).to(device)
    multi_head = MultiHead(DIM, 12).to(device)
    x = torch.randn(BATCH, TOKENS, DIM, device=device)
    torch.testing.assert_close(pool(x), official(x), rtol=1e-4, atol=1e-5)
    rows = []
    for threads in (1, 2) if device == "cpu" else (0,):
        if threads:
            torch.set_num_threads(threads)

        def step(module: nn.Module) -> None:
            module.zero_grad(set_to_none=True)
            module(x).square().sum().backward()

        row = {"device": device, "threads": threads}
        for name, peer, goal in (("official order", official, 8), ("MultiheadAttention", multi_head, 15)):
            # Each peer in turn with ours alone: a third one's intermediates would push the tokens out of the cache.
            calls = {"pool first": lambda: step(pool), name: lambda peer=peer: step(peer)}
            times = interleaved(calls, repeats=30, before=x.sum)
            row |= {f"pool first ms/image beside {name}": min(times["pool first"]) * 1e3 / BATCH}
            row |= {f"{name} ms/image": min(times[name]) * 1e3 / BATCH}
            row |= {f"vs {name}": ratio(times, name, "pool first"), f"goal vs {name}": goal}
        rows.append(row)
    finish("efficient_probing", "official order of operations", 8, rows, rows[-1]["vs official order"], __doc__)


if __name__ == "__main__":
    main()
