"""Pool tokens of different lengths: padding never changes a vector, and attentive readouts say where they look."""

import torch

from cenote.pooling import create_pooling

torch.manual_seed(0)
lengths = [5, 9, 7]
tokens = torch.randn(3, 9, 24)  # (batch, tokens, dim), padded to the longest
mask = torch.arange(9) < torch.tensor(lengths)[:, None]  # True marks a real token

for spec in ("mean", "ggem(num_groups=4)", "efficient_probing(num_queries=4)"):
    pool = create_pooling(spec, dim=24)
    vectors = pool(tokens, mask)
    alone = torch.cat([pool(tokens[i : i + 1, :n]) for i, n in enumerate(lengths)])
    print(f"{spec:34} {tuple(vectors.shape)}  largest difference to unpadded: {(vectors - alone).abs().max():.1e}")

pool = create_pooling("efficient_probing", dim=24, num_queries=4)
_, weights = pool(tokens, mask, return_weights=True)  # (batch, queries, tokens)
print(f"attention of the first query on the first item: {[round(w, 2) for w in weights[0, 0].tolist()]}")

# A stack of hidden states, (batch, layers, tokens, dim): a layer reduction in front of any token reduction.
hidden = torch.randn(3, 6, 9, 24)
pool = create_pooling("weighted_layers > efficient_probing", dim=24, num_layers=6, num_queries=4)
print(f"from six layers: {tuple(pool(hidden, mask).shape)}")
