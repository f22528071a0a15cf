"""What the adapter of deconstructed attention does with settings that no golden file of ours has."""

from dataclasses import replace

import pytest
import torch

from golden.adapters.deconstructing_attention import run
from golden.cases import GOLDEN_DIR, read_case

PATH = GOLDEN_DIR / "deconstructing-attention-text-fixed.safetensors"
pytestmark = pytest.mark.skipif(not PATH.is_file(), reason=f"no {PATH.name} in {GOLDEN_DIR}")


def test_tied_embeddings_need_no_weights_of_the_output():
    case = read_case(PATH)
    embeddings = case.state["model.embed_tokens.weight"]
    expected = run(replace(case, state={**case.state, "lm_head.weight": embeddings}))["logits"]
    assert not torch.allclose(expected, case.outputs["logits"], atol=1e-2)
    without = {name: value for name, value in case.state.items() if name != "lm_head.weight"}
    tied = {**case.config, "tie_word_embeddings": True}
    torch.testing.assert_close(run(replace(case, config=tied, state=without))["logits"], expected)
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head"):
        run(replace(case, state=without))


def test_unknown_settings_are_refused():
    case = read_case(PATH)
    with pytest.raises(ValueError, match=r"unknown settings.*'window'"):
        run(replace(case, config={**case.config, "window": 3}))
    with pytest.raises(ValueError, match="unknown target"):
        run(replace(case, target="encoder"))
