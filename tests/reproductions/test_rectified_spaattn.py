"""The claims of Rectified SpaAttn that need no data, and that the worlds for the others are what they say."""

import pytest
import torch

from cenote.reproductions import available, rectified_spaattn
from cenote.reproductions.rectified_spaattn_exact import exact_findings
from cenote.reproductions.rectified_spaattn_worlds import errors, noise_tokens, smooth_field


def test_it_is_offered():
    assert "rectified-spaattn" in available()
    assert rectified_spaattn.REPRODUCTION.slug == "rectified-spaattn"


def test_exact_claims_hold():
    found = exact_findings()
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}
    assert len({f.claim for f in found}) == len(found) == 12


def test_claims_on_generated_tokens_hold():
    found = rectified_spaattn.field_findings([0]) + rectified_spaattn.noise_findings([0])
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}


def test_fields_are_smooth_and_noise_is_not():
    def alike(world):
        grid = world.query[0].mT.unflatten(-1, world.shape)
        return float(torch.cosine_similarity(grid[..., :-1], grid[..., 1:], dim=1).mean())

    assert alike(smooth_field(0, 0.1)) > 0.9
    assert alike(smooth_field(0, 0.1)) > alike(smooth_field(0, 1.0)) > 0.2
    assert abs(alike(noise_tokens(0))) < 0.02


def test_errors_compare_the_same_blocks():
    world = smooth_field(1, 0.5, (4, 8, 8))
    whole, half = errors(world, 1.0, 16), errors(world, 0.5, 16)
    assert whole.plain == pytest.approx(0, abs=1e-5)
    assert whole.rectified == pytest.approx(0, abs=1e-5)
    assert half.density == 0.5
    assert 0 < half.rectified < half.plain


def test_a_wan_transformer_is_trained_and_compared():
    pytest.importorskip("diffusers")
    from cenote.reproductions.rectified_spaattn_video import FRAMES, SIDE, moving_digits, video_findings

    video = moving_digits(3, torch.Generator().manual_seed(0))
    assert video.shape == (3, 1, FRAMES, SIDE, SIDE)
    assert (video.flatten(3).amax(-1) > 0).all()
    assert (video[:, :, 0] != video[:, :, -1]).any()
    error, loss = video_findings([0], lambda line: None, steps=2)
    assert len(error.values) == len(loss.values) == 1
    assert loss.values[0] > 0.5
