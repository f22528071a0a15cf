"""HyLRA's decoding step written out: loops over rows and heads, explicit softmax, no cache tricks."""

import torch


def plain_step(query, key, value, real, sources, size, keep, first, last, threshold, layer, memory):
    """One layer of one step: (heads, dim), (kv_heads, keys, dim), (keys,) for a row; ``memory[layer]`` holds chunks.

    ``sources[layer]`` is ``None`` for a full layer.
    """
    kv_heads, _, dim = key.shape
    group = len(query) // kv_heads
    places = real.nonzero().flatten()
    chunks = [places[start : start + size] for start in range(0, len(places), size)]
    out = torch.zeros(len(query), value.shape[-1])
    for head in range(kv_heads):
        queries = query[head * group : (head + 1) * group]
        weights = (queries @ key[head, places].T * dim**-0.5).softmax(dim=-1)
        if sources[layer] is None or len(places) <= threshold:
            seen = places
        else:
            if sources[layer] == layer:
                mean, start, scores = weights.mean(dim=0), 0, []
                for number, chunk in enumerate(chunks):
                    scores.append(float(mean[start : start + len(chunk)].sum()))
                    if number < first or number >= len(chunks) - last:
                        scores[-1] = float("inf")
                    start += len(chunk)
                order = sorted(range(len(chunks)), key=lambda n: -scores[n])
                memory[layer, head] = sorted(order[:keep])
            seen = torch.cat([chunks[n] for n in memory[sources[layer], head]])
        alone = (queries @ key[head, seen].T * dim**-0.5).softmax(dim=-1)
        out[head * group : (head + 1) * group] = alone @ value[head, seen]
    return out
