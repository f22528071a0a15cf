"""Groups trained several at a time: the same numbers as one after the other."""

import pytest
import torch

from cenote.probe.heads import Member
from cenote.probe.parallel import side_by_side
from cenote.probe.plan import Candidate
from cenote.probe.tasks import Objective
from cenote.probe.train import Group, Schedule
from cenote.types import Features


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def trained(workers, set_threads):
    set_threads(workers)
    members = tuple(Member(0.01, 1.0, seed) for seed in range(2))
    groups = [
        Group.create(
            Candidate(name, (1,), "both", (), members), 16, Objective("classification", 3), Schedule(1, 1.0), True
        )
        for name in ("gem", "cae", "dinovit", "efficient_probing(num_queries=4)")
    ]
    generator = torch.Generator().manual_seed(0)
    with side_by_side(len(groups)) as every:
        for _ in range(3):
            hidden, targets = torch.randn(8, 1, 5, 16, generator=generator), torch.randint(3, (8,), generator=generator)
            features = Features(hidden, torch.ones(8, 5, dtype=torch.bool), (1,), None, 0)
            list(every(lambda group, batch=(features, targets): group.step(*batch, 1.0), groups))
    assert torch.get_num_threads() == workers
    return [group.stack.state() for group in groups]


def test_workers_do_not_change_the_numbers(threads):
    for alone, shared in zip(trained(1, threads), trained(4, threads), strict=True):
        assert all(torch.equal(alone[name], shared[name]) for name in alone)


def test_an_error_in_one_group_comes_out(threads):
    threads(2)
    with pytest.raises(ZeroDivisionError), side_by_side(3) as every:
        list(every(lambda number: 1 / number, [1, 0, 2]))
    assert torch.get_num_threads() == 2
