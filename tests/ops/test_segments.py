"""Segments against loops, sorted reduction and hand-written examples."""

import pytest
import torch

from cenote.ops.segments import check_segment_ids, equal_segments, segment_max, segments_between


def by_loop(values, ids, mask):
    out = torch.zeros_like(values)
    for b in range(values.shape[0]):
        for n in range(values.shape[1]):
            same = (ids[b] == ids[b, n]) & mask[b]
            if mask[b, n]:
                out[b, n] = values[b, same].amax(dim=0)
    return out


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("ordered", [True, False])
def test_maximum_over_any_segments(tokens, ordered):
    ids = torch.randint(tokens, (3, tokens))
    ids[2] = 0
    ids = ids.sort(dim=1).values if ordered else ids
    values = torch.randn(3, tokens, 5) - 4  # mostly negative: an empty start of 0 would show
    mask = torch.rand(3, tokens) < 0.7
    mask[:, 0] = True
    out = segment_max(values, ids, mask)
    torch.testing.assert_close(out * mask[..., None], by_loop(values, ids, mask))
    torch.testing.assert_close(segment_max(values, ids), by_loop(values, ids, torch.ones_like(mask)))


def test_sorting_segment_reduce_and_scatter_agree():
    ids = torch.randint(9, (2, 30))
    values = torch.randn(2, 30, 4)
    out = segment_max(values, ids)
    for row in range(2):
        order = ids[row].argsort(stable=True)
        lengths = torch.bincount(ids[row], minlength=9)
        reduced = torch.segment_reduce(values[row, order], "max", lengths=lengths, initial=-torch.inf)
        torch.testing.assert_close(out[row], reduced[ids[row]])


def test_padding_is_read_by_no_one_and_its_ids_do_not_count():
    ids, mask = torch.tensor([[0, 0, 1, -5, 99]]), torch.tensor([[True, True, True, False, False]])
    values = torch.randn(1, 5, 3)
    values[:, 3:] = torch.nan
    short = segment_max(values[:, :3], ids[:, :3])
    assert torch.equal(segment_max(values, ids, mask)[:, :3], short)


def test_gradient_flows_to_the_maxima_alone():
    values = torch.tensor([[[1.0], [3.0], [2.0], [-1.0], [-1.0]]], requires_grad=True)
    segment_max(values, torch.tensor([[0, 0, 0, 1, 1]])).sum().backward()
    assert values.grad.flatten().tolist() == [0, 3, 0, 1, 1]  # three tokens read the 3; two equal ones share


def test_special_tokens_cut():
    special = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert segments_between(special).tolist() == [[0, 1, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4], [0] * 6]


def test_equal_stretches_follow_the_official_length():
    assert equal_segments(13, 4)[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3]
    assert equal_segments(8, 1)[0].tolist() == [0] * 8
    assert equal_segments(8, 4096, batch=2).tolist() == [list(range(8))] * 2


@pytest.mark.parametrize("left", [0, 3])
def test_equal_stretches_of_real_tokens(left):
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[:, left : left + 13] = True
    assert torch.equal(equal_segments(20, 4, mask)[mask], equal_segments(13, 4)[0])


def test_bad_segments():
    mask = torch.tensor([[True, True, False]])
    with pytest.raises(TypeError, match=r"integer segment_ids, got torch.float32"):
        check_segment_ids("X", torch.zeros(1, 3), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"shape \(1, 3\), got \(1, 2\)"):
        check_segment_ids("X", torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 3, 4))
    for wrong in ([0, 3, 0], [-1, 0, 0]):
        with pytest.raises(ValueError, match=r"from 0 to 2 \(tokens - 1\), got"):
            check_segment_ids("X", torch.tensor([wrong]), torch.zeros(1, 3, 4), mask)
    check_segment_ids("X", torch.tensor([[0, 1, 77]]), torch.zeros(1, 3, 4), mask)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        equal_segments(5, 0)
