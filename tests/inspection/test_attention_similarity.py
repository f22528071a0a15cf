"""How alike the layers of a decoder attend, and which of them should share."""

import itertools
import json

import pytest
import torch

from attention_hosts import decoder, padded
from cenote.attention.echo_att_similarity import layer_similarity
from cenote.inspection.attention_similarity import attention_similarity_of_layers, removed_by_sharing
from cenote.ops.layer_sharing import (
    choose_by_gap,
    choose_by_similarity,
    inner_layers,
    removed_parameters,
    saved_flops,
)


def by_whole_maps(model, ids, mask):
    """The plain form: every map whole, one sample at a time without its padding."""
    total = 0
    for row, real in zip(ids, mask.bool(), strict=True):
        model.set_attn_implementation("eager")
        maps = model(row[real][None], output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        flat = torch.stack([each.flatten() for each in maps])
        total = total + torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    return total / len(ids)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_is_the_mean_cosine_of_whole_maps_without_padding(family):
    model = decoder(family)
    ids, mask = padded((9, 70, 1), left=False)
    found = layer_similarity(model, [{"input_ids": ids, "attention_mask": mask}])
    torch.testing.assert_close(found, by_whole_maps(model, ids, mask), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found.diagonal(), torch.ones(4))
    parts = [{"input_ids": ids[:1], "attention_mask": mask[:1]}, {"input_ids": ids[1:], "attention_mask": mask[1:]}]
    torch.testing.assert_close(layer_similarity(model, parts), found)


def test_baselines_and_tables(tmp_path):
    model = decoder("llama", seed=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids, mask = padded((20, 30))
    found = attention_similarity_of_layers(model, [{"input_ids": ids, "attention_mask": mask}])
    assert (found.samples, found.tokens) == (2, 50)
    assert found.shuffled.diagonal().allclose(torch.ones(4))
    assert not torch.allclose(found.shuffled, found.similarity, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    flat = decoder("llama", initializer_range=1e-6)
    level = attention_similarity_of_layers(flat, [{"input_ids": ids, "attention_mask": mask}])
    torch.testing.assert_close(level.uniform, torch.ones(4))
    assert list(found.frame().layer) == [0, 1, 2, 3]
    found.save(tmp_path / "similarity.json")
    assert json.loads((tmp_path / "similarity.json").read_text())["tokens"] == 50
    assert found.plot().axes
    assert found.choose(0.5) == choose_by_similarity(found.similarity, 0.5)


def matrix(*rows):
    upper = torch.tensor(rows, dtype=torch.float32)
    return upper.triu(1) + upper.triu(1).T + torch.eye(len(rows))


def test_the_largest_gap_leaves_the_ends_alone():
    alike = torch.full((8, 8), 0.9)
    for low in (0, 1, 4, 7):
        alike[low] = alike[:, low] = 0.2
    alike.fill_diagonal_(1.0)
    assert inner_layers(alike) == range(2, 7)  # layer 4 is low, but neither first nor last
    assert choose_by_gap(alike, 2) == (3, 5)
    assert choose_by_gap(alike, 5) == (3, 4, 5, 6)


def test_the_greedy_choice_takes_what_loses_least():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        random = torch.rand(6, 6, generator=generator)
        alike = ((random + random.T) / 2).fill_diagonal_(1.0)
        best = max(range(1, 6), key=lambda layer: alike[layer, layer - 1].item())
        assert choose_by_similarity(alike, 1 / 6) == (best,)

        def lost(shared, alike=alike):
            sources = [max(s for s in range(layer) if s not in shared) for layer in shared]
            return sum(1 - alike[layer, source].item() for layer, source in zip(shared, sources, strict=True))

        worst = max(lost(shared) for shared in itertools.combinations(range(1, 6), 3))
        assert lost(choose_by_similarity(alike, 0.5)) < worst
        assert choose_by_similarity(alike, 5 / 6) == (1, 2, 3, 4, 5)


def test_the_published_counts():
    sizes = {"hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 64}
    assert [round(removed_parameters(n, **sizes) / 1e6, 1) for n in (5, 9, 17)] == [23.6, 42.5, 80.2]
    assert saved_flops(1, **sizes, keys=0) == 2 * 4_718_592
    assert [round(ratio * 22) for ratio in (0.23, 0.41, 0.77)] == [5, 9, 17]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_formula_counts_a_models_own_parameters(family):
    attention = decoder(family).model.layers[0].self_attn
    parts = [
        p for name, p in attention.named_parameters() if name.split(".")[0] in ("q_proj", "k_proj", "q_norm", "k_norm")
    ]
    assert removed_by_sharing(decoder(family), 2) == 2 * sum(p.numel() for p in parts)


def test_bad_input_is_refused():
    model = decoder("llama")
    ids, mask = padded((5, 9))
    for batch, words in (
        ({"input_ids": ids}, "attention_mask"),
        ({"input_ids": [[1, 2], [3]]}, "pad samples"),
        ({"input_ids": ids, "attention_mask": mask[:, 1:]}, "shape"),
        ({"input_ids": ids, "attention_mask": mask * 0}, "no real token"),
    ):
        with pytest.raises(ValueError, match=words):
            layer_similarity(model, [batch])
    with pytest.raises(ValueError, match="a sample at least"):
        layer_similarity(model, [])
    with pytest.raises(ValueError, match="sliding window"):
        layer_similarity(decoder("mistral", sliding_window=4), [{"input_ids": ids, "attention_mask": mask}])
    for choose in (choose_by_gap, lambda alike: choose_by_similarity(alike, 0.5)):
        with pytest.raises(ValueError, match="3 at least"):
            choose(torch.eye(2))
    for ratio, words in ((0.1, "shares 0 of 3"), (1.0, "shares 3 of 3")):
        with pytest.raises(ValueError, match=words):
            choose_by_similarity(torch.eye(3), ratio)
    with pytest.raises(ValueError, match="symmetric"):
        choose_by_gap(torch.arange(9.0).view(3, 3))
