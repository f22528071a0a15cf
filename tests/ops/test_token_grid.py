import pytest
import torch

from cenote.ops.token_grid import from_map, locate, sincos_positions, to_map


def real(*rows):
    return torch.tensor([[c == "x" for c in row] for row in rows])


def test_without_a_grid_each_item_is_a_square_of_its_own():
    mask = real("xxxx.....", "..x......", "xxxxxxxxx", "x.x.x.x..")
    cells = locate(9, mask, None)
    assert cells[:2] == (3, 3)
    assert cells.cell[0].tolist() == [0, 1, 3, 4, 9, 9, 9, 9, 9]
    assert cells.cell[1].tolist() == [9, 9, 0, 9, 9, 9, 9, 9, 9]
    assert cells.cell[2].tolist() == list(range(9))
    assert cells.cell[3].tolist() == [0, 9, 1, 9, 3, 9, 4, 9, 9]


def test_with_a_grid_tokens_keep_their_cells():
    assert locate(6, real("xx.xxx"), (2, 3)) == (2, 3, None)
    assert locate(8, real(".xxxxxx.", "xx..xxxx"), (2, 3)).cell.tolist() == [
        [6, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 6, 6, 2, 3, 4, 5],
    ]


@pytest.mark.parametrize(("mask", "grid"), [("xxxx.....", None), (".xxxxxx.", (2, 3)), ("x.xxxx", (3, 2))])
def test_map_and_back(mask, grid):
    mask = real(mask)
    cells = locate(mask.shape[1], mask, grid)
    x = torch.randn(1, mask.shape[1], 5)
    there = to_map(x.masked_fill(~mask[..., None], float("nan")), cells, mask)
    assert there.shape == (1, 5, cells.height, cells.width)
    torch.testing.assert_close(there.sum((2, 3)), x[mask].sum(0)[None])
    back = from_map(there, cells)
    torch.testing.assert_close(back[mask], x[mask])
    assert back[~mask].abs().max() == 0


def test_tokens_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must be a square .*got 8"):
        locate(8, None, None)
    with pytest.raises(ValueError, match="needs 6 tokens, got 5"):
        locate(5, real("xxxxx"), (2, 3))
    with pytest.raises(ValueError, match="needs 6 tokens, got 7"):
        locate(7, None, (2, 3))
    with pytest.raises(ValueError, match=r"fill a grid of 2 x 3; row\(s\) \[0\] have \[7\]"):
        locate(7, real("xxxxxxx"), (2, 3))
    with pytest.raises(ValueError, match=r"form a square .*row\(s\) \[1\] have \[3\]"):
        locate(5, real("xxxx.", "xxx.."), None)


def test_sincos_positions_encode_the_column_first():
    table = sincos_positions((2, 3), 8)
    rates = torch.tensor([1.0, 0.01])
    for row in range(2):
        for column in range(3):
            expected = torch.cat([f(p * rates) for p in (column, row) for f in (torch.sin, torch.cos)])
            torch.testing.assert_close(table[row * 3 + column], expected)
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_positions((2, 2), 6)
