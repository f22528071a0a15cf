"""Rectified block-sparse attention written out block by block, for one item and one head."""

import torch


def rectified(q, k, v, block_size, selected, text_len=0, valid=0, compensate="gain"):
    """``(tokens, dim)`` each; ``selected`` (blocks, blocks) is what every visual block attends."""
    visual = len(q) - text_len
    scale = q.shape[-1] ** -0.5
    blocks = [slice(s, min(s + block_size, visual)) for s in range(0, visual, block_size)]
    text = slice(visual, visual + valid)
    out = torch.empty_like(q)
    probs = []
    for i, rows in enumerate(blocks):
        q_mean = q[rows].mean(0)
        q_away = (q[rows] - q_mean).abs().mean(0)
        masses, good = [], []
        for cols in blocks:
            k_mean = k[cols].mean(0)
            k_away = (k[cols] - k_mean).abs().mean(0)
            logit = q_mean @ k_mean
            masses.append((scale * logit).exp() * len(k[cols]))
            good.append(bool(logit.abs() > (q_away @ k_mean).abs() + (q_mean @ k_away).abs()))
        if text_len:
            masses.append((scale * (k[text] @ q_mean)).exp().sum())
        mass = torch.stack(masses) / torch.stack(masses).sum()
        probs.append(mass)
        kept = [j for cols, j in zip(blocks, range(len(blocks)), strict=True) if selected[i, j]]
        keys = torch.cat([k[blocks[j]] for j in kept] + [k[text]])
        values = torch.cat([v[blocks[j]] for j in kept] + [v[text]])
        sparse = (scale * q[rows] @ keys.T).softmax(-1) @ values
        back = [
            j
            for j in range(len(blocks))
            if not selected[i, j] and (compensate == "all" or (compensate == "gain" and good[j]))
        ]
        added = sum((mass[j] * v[blocks[j]].mean(0) for j in back), torch.zeros_like(v[0]))
        out[rows] = (1 - sum(mass[j] for j in back)) * sparse + added
    if text_len:
        keys, values = torch.cat([k[:visual], k[text]]), torch.cat([v[:visual], v[text]])
        out[visual:] = (scale * q[visual:] @ keys.T).softmax(-1) @ values
    return out, torch.stack(probs)


def selection(probs, p, top_k, blocks):
    """Rows of ``probs`` (blocks, columns) one by one."""
    kept = torch.zeros(len(probs), blocks, dtype=torch.bool)
    for i, row in enumerate(probs):
        running, count = 0.0, 0
        order = sorted(range(len(row)), key=lambda j: -float(row[j]))
        for j in order:
            running += float(row[j])
            if running > p:
                break
            count += 1
        for j in order[: max(count + 1, top_k)]:
            if j < blocks:
                kept[i, j] = True
    return kept
