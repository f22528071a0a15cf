"""PoNet's adapter where the files have no case: other heads, masks of every kind, left padding, segments left out.

The reference forms every map and holds -10000 at padding, as the published code does.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from golden.adapters.ponet import run
from golden.cases import Case

LOW = -10000.0
MAPS = ("q", "k", "o", "segment", "local")


def case(target, config, inputs, state):
    return Case(Path("drawn"), "ponet", "drawn", target, config, 1e-4, 1e-5, inputs, state, {})


def masks(kind, rows=3, tokens=11):
    lengths = torch.tensor([tokens, 5, 1])[:rows, None]
    mask = torch.arange(tokens) < lengths
    if kind == "left":
        mask = mask.flip(1)
    if kind == "holes":
        mask = torch.rand(rows, tokens) < 0.6
        mask[:, 0] = True
    return mask


def mixed(x, mask, segments, special, state, heads, guard):
    """Context and global weights of the published layer."""
    q, k, o, s, l = (F.linear(x, state[f"dense_{n}.weight"], state[f"dense_{n}.bias"]) for n in MAPS)
    q, k = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k))
    real = mask.float()[:, None, :, None]
    mean = (q * real).sum(dim=2, keepdim=True) / real.sum(dim=2, keepdim=True)
    scores = mean @ k.mT * k.shape[-1] ** -0.5 + LOW * (1 - mask.float())[:, None, None]
    weights = scores.softmax(dim=-1)
    overall = (weights @ k).transpose(1, 2).flatten(2)
    s, l = (y.masked_fill(~mask[..., None], LOW) for y in (s, l))
    index = segments[..., None].expand_as(s)
    bins = s.new_zeros(len(s), int(segments.max()) + 1, s.shape[2])
    s = bins.scatter_reduce(1, index, s, "amax", include_self=False).gather(1, index)
    if guard:
        l = l.masked_fill(special[..., None], LOW)
    l = F.max_pool1d(l.mT, 3, stride=1, padding=1).mT
    if guard:
        s, l = (y.masked_fill(special[..., None], 0.0) for y in (s, l))
    return ((overall + s) * o + l).masked_fill(~mask[..., None], 0.0), weights[:, :, 0]


def linear(name, out, into):
    return {f"{name}.weight": 0.4 * torch.randn(out, into), f"{name}.bias": 0.4 * torch.randn(out)}


def norm(name, dim):
    return {f"{name}.weight": 1 + 0.4 * torch.randn(dim), f"{name}.bias": 0.4 * torch.randn(dim)}


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize(
    ("heads", "guard", "dtype"), [(1, True, torch.float), (3, False, torch.int), (5, True, torch.bool)]
)
def test_the_layer(kind, heads, guard, dtype):
    dim, mask = 2 * heads, masks(kind)
    state = {key: value for name in MAPS for key, value in linear(f"dense_{name}", dim, dim).items()}
    x, special = torch.randn(3, 11, dim), torch.rand(3, 11) < 0.3
    segments = torch.randint(11, (3, 11)).sort(dim=1).values
    inputs = {"hidden_states": x, "attention_mask": mask.to(dtype), "segment_ids": segments,
              "special_mask": special.to(dtype), "input_ids": special.long()}  # fmt: skip
    config = {"hidden_size": dim, "num_attention_heads": heads, "clsgsepg": guard}
    got = run(case("PoNetSelfAttention(config)", config, inputs, state))
    context, weights = mixed(x, mask, segments, special, state, heads, guard)
    torch.testing.assert_close(got["context"], context, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["global_probs"], weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_the_model_counts_padding_into_positions(kind, guard, given):
    dim, inner, heads, tokens = 8, 20, 2, 11
    mask = masks(kind)
    config = {"vocab_size": 110, "hidden_size": dim, "num_hidden_layers": 1, "num_attention_heads": heads,
              "intermediate_size": inner, "max_position_embeddings": 14, "type_vocab_size": 3,
              "layer_norm_eps": 1e-5, "hidden_act": "relu", "clsgsepg": guard}  # fmt: skip
    place, layer = "ponet.embeddings", "ponet.encoder.layer.0"
    sizes = (("word", 110), ("position", 14), ("token_type", 3))
    tables = {f"{place}.{name}_embeddings.weight": 0.4 * torch.randn(size, dim) for name, size in sizes}
    maps = {key: value for name in MAPS for key, value in linear(f"dense_{name}", dim, dim).items()}
    state = tables | {f"{layer}.attention.self.{key}": value for key, value in maps.items()}
    state |= linear(f"{layer}.attention.output.dense", dim, dim) | linear(f"{layer}.intermediate.dense", inner, dim)
    state |= linear(f"{layer}.output.dense", dim, inner) | linear("ponet.pooler.dense", dim, dim)
    state |= linear("cls.predictions.transform.dense", dim, dim) | linear("cls.seq_relationship", 3, dim)
    for name in (f"{place}.LayerNorm", f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm",
                 "cls.predictions.transform.LayerNorm"):  # fmt: skip
        state |= norm(name, dim)
    state["cls.predictions.bias"] = torch.randn(110)
    ids, types = torch.randint(100, (3, tokens)), torch.randint(3, (3, tokens))
    ids[torch.rand(3, tokens) < 0.3] = 102
    ids[:, 0] = 101
    ids[~mask] = 0
    special = (ids == 101) | (ids == 102)
    cuts = special.long()
    # The published ids are less by one, which parts the row alike.
    segments = (cuts + F.pad(cuts, (1, 0))[:, :-1]).cumsum(dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask.float(), "token_type_ids": types}
    if given:
        segments = torch.randint(tokens, (3, tokens)).sort(dim=1).values
        inputs["segment_ids"] = segments
    got = run(case("PoNetForPreTraining(config)", config, inputs, state))

    def apply(y, name):
        return F.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])

    def normed(y, name):
        return F.layer_norm(y, (dim,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    word, position, kinds = tables.values()
    x = normed(word[ids] + position[:tokens] + kinds[types], f"{place}.LayerNorm")
    torch.testing.assert_close(got["embeddings"], x, rtol=1e-4, atol=1e-5)
    pooled, _ = mixed(x, mask, segments, special, maps, heads, guard)
    x = normed(x + apply(pooled, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
    inside = apply(apply(x, f"{layer}.intermediate.dense").relu(), f"{layer}.output.dense")
    x = normed(x + inside, f"{layer}.output.LayerNorm")
    pooler = apply(x[:, 0], "ponet.pooler.dense").tanh()
    words = normed(apply(x, "cls.predictions.transform.dense").relu(), "cls.predictions.transform.LayerNorm") @ word.T
    wanted = {"last_hidden_state": x, "pooler_output": pooler, "mlm_logits": words + state["cls.predictions.bias"],
              "sso_logits": apply(pooler, "cls.seq_relationship")}  # fmt: skip
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
