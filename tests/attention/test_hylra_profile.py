"""What HyLRA measures: on recorded queries and keys, and while a model generates."""

import pytest
import torch

from attention_hosts import decoder, padded
from cenote.attention.hylra_profile import ChunkSets, LayerStatistics, profile_layers
from cenote.ops.chunk_scores import TokenOrder

SETS = ChunkSets(chunk_size=4, keep=5, first=1, last=2)


def statistics(weights, sets=SETS, skipped=()):
    """Of attention rows (steps, layers, batch, heads, keys)."""
    found = LayerStatistics(weights.shape[1], sets, skipped)
    for step in weights:
        for layer, rows in enumerate(step):
            if layer not in skipped:
                found.add(layer, rows, TokenOrder.full(rows.shape[0], rows.shape[-1]))
    return found


def rows(*shape, seed=0):
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).softmax(dim=-1)


def test_statistics_written_out():
    weights = rows(3, 4, 2, 2, 41)
    found = statistics(weights)
    ratio, overlap = (torch.zeros(*shape, dtype=torch.float64) for shape in ((4, 3, 4), (2, 4, 4)))
    for head in range(2):
        for text in range(2):
            for step in range(3):
                sets = []
                for layer in range(4):
                    mass = [float(part.sum()) for part in weights[step, layer, text, head].split(4)]
                    running = torch.tensor(sorted(mass, reverse=True)).cumsum(0)
                    ratio[2 * text + head, step, layer] = int((running <= 0.9).sum()) / 11
                    order = sorted(range(11), key=lambda n: -float("inf") if n in (0, 9, 10) else -mass[n])
                    sets.append(set(order[:5]))
                for i in range(4):
                    for j in range(4):
                        if i < j:
                            overlap[head, i, j] += len(sets[i] & sets[j]) / 5 / 6
        overlap[head].fill_diagonal_(1.0)
    torch.testing.assert_close(found.ratio, ratio)
    torch.testing.assert_close(found.overlap, overlap)


def test_permuting_keys_within_chunks_changes_nothing():
    weights = rows(3, 4, 1, 2, 40)
    order = torch.cat([4 * chunk + torch.randperm(4) for chunk in range(10)])
    one, other = statistics(weights), statistics(weights[..., order])
    assert torch.equal(one.ratio, other.ratio)
    assert torch.equal(one.overlap, other.overlap)
    assert (one.ratio >= 0).all()
    assert (one.ratio < 1).all()


def test_layers_that_are_not_measured_overlap_with_none():
    weights = rows(2, 4, 1, 2, 40)
    found, all_layers = statistics(weights, skipped=(2,)), statistics(weights)
    assert (found.ratio[:, :, 2] == 1).all()
    kept = [0, 1, 3]
    assert torch.equal(found.overlap[:, kept][:, :, kept], all_layers.overlap[:, kept][:, :, kept])
    assert (found.overlap[:, 2, 3] == 0).all()
    assert (found.overlap[:, 0, 2] == 0).all()


def test_profile_of_a_model_is_that_of_its_attention_maps():
    model = decoder()
    ids, mask = padded((60, 53))
    measured = profile_layers(model, [{"input_ids": ids, "attention_mask": mask}], SETS, steps=4)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    model.set_attn_implementation("eager")
    expected = LayerStatistics(4, SETS)
    for step in range(4):
        end = 61 + step
        for row, length in enumerate((60, 53)):
            seen = text[row : row + 1, 60 - length : end]
            maps = model(seen, output_attentions=True).attentions
            for layer, each in enumerate(maps):
                last = each[:, :, -1].unflatten(1, (2, 3)).mean(dim=2)
                expected.add(layer, last, TokenOrder.full(1, seen.shape[1]))
    ratio = expected.ratio.unflatten(1, (4, 2)).permute(2, 0, 1, 3).flatten(0, 1)
    torch.testing.assert_close(measured.ratio, ratio)
    torch.testing.assert_close(measured.overlap[0], expected.overlap)


def test_batches_are_sets_and_their_rows_further_steps():
    model = decoder()
    ids, _ = padded((60, 60))
    one = profile_layers(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}], SETS, steps=3)
    both = profile_layers(model, [{"input_ids": ids}], SETS, steps=3)
    assert one.overlap.shape == (2, 2, 4, 4)
    torch.testing.assert_close(one.overlap.mean(dim=0), both.overlap[0])
    torch.testing.assert_close(one.ratio, both.ratio)
    assert one.full_layers(0.5) == both.full_layers(0.5)
    assert (one.merged((0,))[:, 0, 1:] == 0).all()


@pytest.mark.parametrize("sizes", [(0, 5), (4, 0), (4, 3), (4, 2, 1, 1), (4, 5, -1, 2)])
def test_refuses_sets_without_room(sizes):
    with pytest.raises(ValueError, match="chunk"):
        ChunkSets(*sizes)


def test_refuses_texts_with_no_more_chunks_than_are_chosen():
    with pytest.raises(ValueError, match="has 5 chunks: expected more than the 5"):
        statistics(rows(1, 2, 1, 1, 20))
    with pytest.raises(ValueError, match="nothing was measured"):
        _ = LayerStatistics(3, SETS).ratio
    with pytest.raises(ValueError, match="steps"):
        profile_layers(decoder(), [], SETS, steps=0)
