"""The claims of TAP and ADL that need no training, and that what is trained is what is said."""

import torch

from cenote.inspection.robustness import Robustness
from cenote.reproductions import available, tap_adl
from cenote.reproductions.tap_adl_exact import exact_findings
from cenote.reproductions.tap_adl_worlds import (
    ADL,
    BASELINE,
    BOTH,
    Classifier,
    Measures,
    World,
    digits_world,
    run_variant,
)
from cenote.tuning.diversity import Diversity


def test_it_is_offered():
    assert "tap-adl" in available()
    assert tap_adl.REPRODUCTION.slug == "tap-adl"


def test_exact_claims_hold():
    found = exact_findings()
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}
    assert len({f.claim for f in found}) == len(found) == 17


def test_the_digits_are_pixels_in_patches():
    world = digits_world()
    assert (len(world.train), len(world.test)) == (1080, 597)
    assert world.train.min() == 0
    assert world.train.max() == 1
    model = Classifier(8, world.patch)
    assert model.grid == (4, 4)
    assert model(world.test[:3]).shape == (3, 10)


def test_networks_of_one_seed_start_alike_and_are_trained_as_said():
    whole = digits_world()
    world = World(whole.train[:64], whole.train_labels[:64], whole.test[:64], whole.test_labels[:64], 2, 1, 32)
    runs = {variant: run_variant(world, variant, 0, (3,)) for variant in (BASELINE, ADL, BOTH)}
    again = run_variant(world, BASELINE, 0, (3,))
    assert again == runs[BASELINE]
    # After four steps attention is still all but uniform, where the loss is 0 and moves nothing.
    assert runs[BASELINE].diversity.adl == 0
    assert runs[ADL] == runs[BASELINE]
    assert runs[BOTH].diversity != runs[BASELINE].diversity
    assert set(runs[BOTH].robustness.errors) > {"gaussian_noise", "jpeg"}


def test_findings_say_what_the_numbers_say():
    def measures(accuracy: float, adl: float, error: float) -> Measures:
        errors = {"gaussian_noise": (error,), "gaussian_blur": (error / 2,)}
        return Measures(accuracy, Diversity(adl, adl), Robustness(1 - accuracy / 100, errors, (3,)))

    runs = [{BASELINE: measures(90, 0.5, 0.4), ADL: measures(88, 0.3, 0.3), BOTH: measures(91, 0.6, 0.5)}] * 2
    found = tap_adl.world_findings(runs, "data", (3,))
    values = [f.measured for f in found]
    torch.testing.assert_close(values, [40.0, 40.0, -2.0, 7.5, -7.5, 75.0, 125.0])
    assert [f.verdict for f in found] == ["holds"] * 4 + ["does not hold", "holds", "does not hold"]
    assert len({f.claim for f in found}) == len(found)
