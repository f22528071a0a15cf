"""The claims of L-TDNN that need no training, and the clips planted for those that do."""

import pytest
import torch
import torch.nn.functional as F

from cenote.reproductions import available, l_tdnn
from cenote.reproductions.l_tdnn_exact import exact_findings
from cenote.reproductions.l_tdnn_switching import (
    DIM,
    FRAMES,
    LAYERS,
    VECTOR,
    StaticSum,
    layer_aware,
    speakers,
    switching_clips,
    train_speakers,
    verification_error,
)


def test_exact_claims_hold():
    found = exact_findings()
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}
    assert len({f.claim for f in found}) == len(found) >= 13
    assert "l-tdnn" in available()


def test_one_random_layer_a_frame_carries_the_voice():
    generator = torch.Generator().manual_seed(0)
    voices = 10 * speakers(200, generator)
    clips = switching_clips(voices, generator)
    assert clips.shape == (200, LAYERS, FRAMES, DIM)
    distance = (clips[..., :-1] - voices[:, None, None]).abs().amax(dim=-1)
    telling = distance < 2.5  # noise of deviation 0.3 against differences of tens
    assert bool((telling.sum(dim=1) == 1).all())
    assert telling.float().mean(dim=(0, 2)).sub(1 / LAYERS).abs().max() < 0.03
    flag = clips[..., -1]
    assert flag[telling].mean().item() == pytest.approx(1, abs=0.03)
    assert flag[~telling].mean().item() == pytest.approx(0, abs=0.03)
    rest = torch.where(telling[..., None], torch.nan, clips[..., :-1])
    spread = (rest.flatten(1, 2).nanmean(dim=1, keepdim=True) - rest.flatten(1, 2)).abs().nan_to_num().amax()
    assert spread < 2.5  # one distractor a clip
    assert rest.flatten(1, 2).nanmean(dim=1).std().item() == pytest.approx(1, abs=0.05)
    again = switching_clips(voices[:1].expand(2, -1), generator)[..., :-1]
    assert (again[0] - again[1]).abs().amax() > 3  # and another in the next clip of that voice
    bare = switching_clips(voices, generator, distractor=False)
    assert bare[..., :-1][bare[..., :-1].abs().amax(dim=-1) < 2].std().item() == pytest.approx(0.3, abs=0.01)


def test_back_ends_give_a_vector_and_train_reproducibly():
    clips = switching_clips(torch.randn(3, DIM - 1), torch.Generator().manual_seed(0))
    for build in (StaticSum, layer_aware):
        assert build().eval()(clips).shape == (3, VECTOR)
    state = torch.get_rng_state()
    models = [train_speakers(StaticSum, seed, steps=2).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(models[0]["tdnn.1.weight"], models[1]["tdnn.1.weight"])
    assert not torch.equal(models[0]["tdnn.1.weight"], models[2]["tdnn.1.weight"])


def test_error_is_small_for_a_reader_that_knows_the_flag_and_chance_for_one_that_sums():
    def knows(clips):
        chosen = F.one_hot(clips[..., -1].argmax(dim=1), LAYERS).mT.unsqueeze(-1)
        return (clips * chosen)[..., :-1].sum(dim=1).mean(dim=1)

    assert verification_error(knows, 0) < 0.15
    assert verification_error(lambda clips: clips.mean(dim=(1, 2)), 0) > 0.4


@pytest.mark.parametrize(("layered", "verdict"), [((0.2, 0.25), "holds"), ((0.2, 0.45), "inconclusive")])
def test_central_claim_compares_seed_by_seed(layered, verdict):
    central = l_tdnn.switching_findings(layered, (0.48, 0.49))[0]
    assert central.verdict == verdict
    assert central.values == pytest.approx((0.48 - layered[0], 0.49 - layered[1]))
