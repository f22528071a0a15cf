"""The battery that every open-set score passes, and the arithmetic of the baselines."""

from pathlib import Path

import pytest
import scipy.stats
import torch
from torch import nn

from cenote.inspection import OPEN_SET_SCORES, create_open_set_score, load_open_set_score
from cenote.inspection.open_set_ghost import GHOST
from cenote.inspection.open_set_neighbours import KNN, NNGuide
from cenote.inspection.open_set_pareto import fit_pareto, pareto_cdf
from cenote.inspection.open_set_postmax import PostMax
from cenote.inspection.open_set_vim import ViM
from golden.cases import read_case

OPTIONS = {"knn": {"k": 5}, "nnguide": {"k": 5, "fraction": 0.5}}
NAMES = list(OPEN_SET_SCORES)


@pytest.fixture(scope="module")
def world():
    g = torch.Generator().manual_seed(7)
    head = nn.Linear(8, 3)
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 8, generator=g))
        head.bias.copy_(torch.randn(3, generator=g))
        labels = torch.arange(3).repeat(40)
        features = torch.randn(120, 8, generator=g) + head.weight[labels]
    return head, features, labels, torch.randn(30, 8, generator=g) + head.weight[:1].detach()


def make(name, head):
    return create_open_set_score(name, head, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", NAMES)
def test_batches_change_nothing(world, name):
    head, features, labels, test = world
    whole = make(name, head).fit(features, labels)
    pieces = make(name, head).fit(list(zip(features.split(11), labels.split(11), strict=True)))
    torch.testing.assert_close(pieces.score(test), whole.score(test), rtol=1e-5, atol=1e-5)
    alone = torch.cat([whole.score(item[None]) for item in test])
    torch.testing.assert_close(alone, whole.score(test), rtol=1e-5, atol=1e-5)
    assert whole.score(test).dtype == torch.float32
    assert whole.score(test.half()).isfinite().all()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "nnguide"])  # its bank is chosen by place
def test_order_of_training_items_changes_nothing(world, name):
    head, features, labels, test = world
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))
    one, other = make(name, head).fit(features, labels), make(name, head).fit(features[order], labels[order])
    torch.testing.assert_close(other.score(test), one.score(test), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_training_items_score_above_noise_far_away(world, name):
    """The direction: what the head knows scores higher than what points nowhere."""
    head, features, labels, _ = world
    right = head(features).argmax(dim=1) == labels
    score = make(name, head).fit(features, labels)
    noise = 0.05 * torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    if name in ("ghost", "postmax", "vim"):  # measured by lengths, so noise must be large to be unlikely
        noise = 400 * noise
    assert score.score(features[right]).mean() > score.score(noise).mean()


@pytest.mark.parametrize("name", NAMES)
def test_decision_follows_the_score(world, name):
    head, features, labels, test = world
    score = make(name, head).fit(features, labels)
    values = score.score(test)
    decided = score.predict(test, float(values[3]))
    assert decided[3] == head(test[3:4]).argmax()
    assert torch.equal(decided >= 0, values >= values[3])


@pytest.mark.parametrize("name", NAMES)
def test_files_bring_it_back(world, name, tmp_path):
    head, features, labels, test = world
    score = make(name, head).fit(features, labels)
    score.save_pretrained(tmp_path)
    back = load_open_set_score(tmp_path)
    assert type(back) is type(score)
    assert torch.equal(back.score(test), score.score(test))
    other = OPEN_SET_SCORES["msp" if name != "msp" else "energy"]
    with pytest.raises(ValueError, match=f"holds the method '{name}'"):
        other.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused(world, name):
    head, features, labels, test = world
    score = make(name, head)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
        score.fit(features, labels + 1)
    with pytest.raises(TypeError, match="labels must be integers"):
        score.fit([(features, labels.float())])
    with pytest.raises(ValueError, match="not finite"):
        score.fit(features / 0, labels)
    score.fit(features, labels)
    with pytest.raises(ValueError, match=r"\(items, 8\)"):
        score.score(test[:, :4])
    if score.passes > 1:
        with pytest.raises(ValueError, match="give a list, not a generator"):
            score.fit(batch for batch in [(features, labels)])


def test_what_each_method_refuses(world):
    head, features, labels, _ = world
    weight, bias = head.weight, head.bias
    for dim in (8, 20, -1):
        with pytest.raises(ValueError, match=r"dim must lie in 0\.\.7"):
            ViM(weight, bias, dim=dim)
    flat = torch.zeros(20, 8)
    flat[:, :2] = torch.randn(20, 2)
    with pytest.raises(ValueError, match="choose a smaller dim"):
        ViM(torch.eye(8)[:3], torch.zeros(3), dim=2).fit(flat, torch.arange(20) % 3)
    with pytest.raises(ValueError, match="holds 120 training items"):
        KNN(weight, bias, k=121).fit(features, labels)
    with pytest.raises(ValueError, match="fraction"):
        NNGuide(weight, bias, fraction=0)
    with pytest.raises(ValueError, match=r"pareto must be \(3, 3\)"):
        GHOST(weight, bias, pareto=torch.zeros(2, 3))
    right = (head(features).argmax(dim=1) == labels) & (labels == 1)
    few = torch.cat([(labels != 1).nonzero()[:, 0], right.nonzero()[:1, 0]])
    with pytest.raises(ValueError, match=r"class\(es\) \[1\] have fewer than 2"):
        GHOST(weight, bias).fit(features[few], labels[few])
    with pytest.raises(ValueError, match="two different values"):
        PostMax(weight, bias).fit(features[few[-1:]], labels[few[-1:]])
    with pytest.raises(ValueError, match="did you mean 'energy'"):
        create_open_set_score("enrgy", head)


def test_zero_features_give_numbers(world):
    head, features, labels, _ = world
    features = torch.cat([features, torch.zeros(1, 8)])
    labels = torch.cat([labels, head.bias.argmax()[None]])
    for name in NAMES:
        assert make(name, head).fit(features, labels).score(torch.zeros(2, 8)).isfinite().all(), name


def test_constant_features_count_for_nothing_in_ghost(world):
    head, features, labels, test = world
    # 0.1 has no exact binary form: a sum of squares would leave a deviation of rounding errors.
    wide = nn.Linear(9, 3)
    with torch.no_grad():
        wide.weight.copy_(torch.cat([head.weight, torch.zeros(3, 1)], dim=1))
        wide.bias.copy_(head.bias)
    one = GHOST.from_head(head).fit(features, labels)
    other = GHOST.from_head(wide).fit(torch.cat([features, torch.full((120, 1), 0.1)], dim=1), labels)
    assert (other.state["std"][:, 8] == 0).all()
    moved = torch.cat([test, torch.full((30, 1), 7.0)], dim=1)
    torch.testing.assert_close(other.normalised_logit(moved), one.normalised_logit(test), rtol=1e-6, atol=0)
    kept = (head(features).argmax(dim=1) == labels) & (labels == 2)
    torch.testing.assert_close(one.state["std"][2].float(), features[kept].std(dim=0), rtol=1e-5, atol=0)


def test_nnguide_takes_its_share_evenly(world):
    head, features, labels, _ = world
    score = NNGuide.from_head(head, k=3, fraction=0.25).fit(features, labels)
    assert len(score.state["bank"]) == 30
    z = features[3] / features[3].norm() * head(features[3]).logsumexp(0)
    torch.testing.assert_close(score.state["bank"][0], z.detach())


@pytest.mark.parametrize("shape", [-1.2, -0.3, 0.0, 0.4])
def test_generalised_pareto(shape):
    x = torch.linspace(-1, 5, 60, dtype=torch.float64)
    wanted = scipy.stats.genpareto.cdf(x.numpy(), shape, loc=0.2, scale=1.5)
    got = pareto_cdf(x, torch.tensor([[shape, 0.2, 1.5]], dtype=torch.float64).expand(60, 3))
    torch.testing.assert_close(got, torch.from_numpy(wanted), rtol=1e-12, atol=1e-12)


def test_fits_are_those_of_the_official_code():
    """The reference file holds the distributions that GHOST's own code fitted to the same training items."""
    case = read_case(Path(__file__).parents[1] / "golden" / "data" / "costarr-baselines.safetensors")
    ghost = GHOST(case.state["weight"], case.state["bias"])
    ghost.fit(case.inputs["train_features"], case.inputs["train_labels"])
    # The simplex search that fits them stops at about three digits.
    torch.testing.assert_close(ghost.state["pareto"], case.inputs["ghost_gpd"], rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="two different values"):
        fit_pareto(torch.ones(5))
