"""Findings in words, scales and the gallery's numbers."""

import base64
import dataclasses

import numpy as np
import pytest

from cenote.report import words
from cenote.report.gallery import gallery_data
from cenote.report.svg import Axis, Plot, linear_ticks, log_ticks
from report import synthetic


def test_headline_names_winner_lead_and_ties():
    found = words.headline(synthetic.rows())
    assert found.title == "efficient_probing @ 4 reads this backbone best: 96.3 % accuracy"
    text = " ".join(found.sentences)
    assert "efficient_probing @ 3 (94.9 %), by 1.4 points" in text
    assert "weighted_layers > efficient_probing and siglip do not differ significantly from it" in text
    assert "cheapest" not in text  # the winner itself is the cheapest of its group


def test_headline_names_a_cheaper_tie():
    rows = synthetic.rows()
    rows = (dataclasses.replace(rows[0], params=90_000), *rows[1:])
    assert (
        "The cheapest of the tie is weighted_layers > efficient_probing: 7k parameters against 90k."
        in words.headline(rows).sentences
    )


def test_headline_of_a_clear_winner_of_a_full_tie_and_of_one_row():
    rows = synthetic.rows()
    clear = " ".join(words.headline((rows[0], rows[8])).sentences)
    assert "runner-up, mean (86.2 %), by 10.1 points" in clear
    assert "No other readout ties" in clear
    assert "No readout of this run differs significantly" in " ".join(words.headline(rows[:3]).sentences)
    assert "only readout" in " ".join(words.headline(rows[:1]).sentences)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (words.quantity(5770), "5.77k"),
        (words.quantity(0), "0"),
        (words.quantity(1.2e9), "1.2G"),
        (words.number(None), "–"),
        (words.number(0.01214), "0.0121"),
        (words.number(12345.6), "12,346"),
        (words.number(float("nan")), "–"),
        (words.duration(133), "2 min 13 s"),
        (words.duration(0.44), "0.4 s"),
        (words.score(0.9634, True), "96.3 %"),
        (words.score(0.9634, False), "0.963"),
    ],
)
def test_numbers_in_words(text, expected):
    assert text == expected


def test_ticks():
    assert linear_ticks(0.78, 0.98) == [0.8, 0.85, 0.9, 0.95]
    assert linear_ticks(-2.2, 2.2) == [-2, -1, 0, 1, 2]
    assert log_ticks(300, 2e6) == [1e3, 1e4, 1e5, 1e6]
    assert log_ticks(0.002, 0.05) == pytest.approx([0.003, 0.01, 0.03])


def test_axes_put_values_where_they_belong():
    plot = Plot(Axis(1, 100, "", str, log=True), Axis(0, 1, "", str), "t")
    assert plot.px(10) == pytest.approx((plot.px(1) + plot.px(100)) / 2)
    assert plot.py(0) == plot.height - plot.bottom
    assert plot.py(1) == plot.top


def test_labels_never_overlap_points_or_each_other():
    plot = Plot(Axis(0, 1, "", str), Axis(0, 1, "", str), "t")
    crowd = [(0.5 + 0.001 * i, 0.5, f"readout number {i}") for i in range(12)]
    plot.labels(crowd, [(x, y) for x, y, _ in crowd])
    assert 1 <= len(plot.shapes) < 12


def test_gallery_quantises_by_largest_patch_and_orders_queries():
    result = synthetic.image_result()
    contents, notes = gallery_data(result)
    assert notes == []
    many, _, single = contents["readouts"]
    entropy = result.galleries[0].entropy
    assert many["queries"] == np.argsort(entropy).tolist()
    decoded = np.frombuffer(base64.b64decode(many["weights"]), np.uint8).reshape(8, 17, 16)
    assert (decoded.max(-1) == 255).all()
    first = result.galleries[0].weights[0, many["queries"][0]]
    np.testing.assert_allclose(decoded[0, 1] / 255, first / first.max(), atol=0.5 / 255 + 1e-9)
    mean = result.galleries[0].weights[3].mean(0)
    np.testing.assert_allclose(decoded[3, 0] / 255, mean / mean.max(), atol=0.5 / 255 + 1e-9)
    # One class token in front: its share is told apart and does not take part in the scale.
    assert single["prefix"] == 1
    np.testing.assert_allclose(np.array(single["on_prefix"])[:, 1], result.galleries[2].weights[:, 0, 0], atol=6e-4)
    shown = np.frombuffer(base64.b64decode(single["weights"]), np.uint8).reshape(8, 2, 17)
    assert (shown[..., 1:].max(-1) == 255).all()


def test_gallery_leaves_out_what_has_no_place_on_the_grid():
    result = synthetic.image_result()
    odd = dataclasses.replace(result.galleries[0], weights=result.galleries[0].weights[..., :9])
    contents, notes = gallery_data(dataclasses.replace(result, galleries=(odd, result.galleries[1])))
    assert len(contents["readouts"]) == 1
    assert "9 tokens" in notes[0]
    assert gallery_data(dataclasses.replace(result, galleries=(odd,)))[0] is None


def test_gallery_of_text_reads_word_pieces():
    contents, _ = gallery_data(synthetic.text_result())
    assert contents["kind"] == "text"
    assert contents["items"][0][2:5] == [["won", True], ["der", False], ["ful", False]]
    assert contents["readouts"][0]["entropy"][-1] is None
    marked = dataclasses.replace(synthetic.text_result(), gallery_items=(["▁a", "bc", "▁d"],))
    assert gallery_data(marked)[0]["items"] == [[["a", True], ["bc", False], ["d", True]]]
