import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.data.splits import holdout


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_every_group_gives_its_share(groups, data):
    count = data.draw(st.integers(0, len(groups)))
    kept, held = holdout(groups, count, seed=data.draw(st.integers(0, 5)))
    assert len(held) == count
    assert sorted([*kept, *held]) == list(range(len(groups)))
    groups = np.array(groups)
    if count <= len(groups) - len(set(groups)):
        assert set(groups[kept]) == set(groups), "a group that can spare its last item is never emptied"
        for group in set(groups):
            size = (groups == group).sum()
            if size * count / len(groups) <= size - 1:
                assert abs((groups[held] == group).sum() - size * count / len(groups)) <= len(set(groups))


def test_balanced_groups_give_equal_shares():
    groups = np.repeat(np.arange(10), 30)
    _, held = holdout(groups, 50, seed=3)
    assert np.bincount(groups[held]).tolist() == [5] * 10


def test_seeded():
    groups = [0, 1] * 50
    first, again, other = (holdout(groups, 20, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other
    with pytest.raises(ValueError, match="cannot hold out 5 of 3"):
        holdout([0, 0, 0], 5, seed=0)
