"""Every example runs as it stands and prints what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
PRINTS = {  # script: words of its output
    "rectified_wan.py": (
        "dense_layers=(0, 1)",
        "compensate='none': density 0.11",
        "compensate='gain': density 0.11",
        "as it was: True",
    ),
    "halonet_swap.py": ("the same logits: True", "(1, 10)", "(256, 4, 4)"),
    "poolformer_hybrid.py": ("logits (2, 10)", "Pool, Pool, SoftmaxAttention, Pool", "stride 32: (2, 512, 3, 4)"),
    "pool_tokens.py": ("efficient_probing(num_queries=4)", "from six layers: (3, 24)"),
    "deconstructed_qwen2.py": (
        "all standard, logits of the host: True",
        "non_approximate: 640 bytes",
        "generated 8 tokens",
    ),
    "hub_pooling.py": ("same vectors: True",),
    "sklearn_readout.py": ("tokens (240, 16, 64)", "efficient_probing(num_queries=8): accuracy"),
    "timm_readout.py": ("test_vit: vector (2, 64), logits (2, 10)", "each query looks at: (2, 1, 100)"),
    "ponet_long_text.py": ("5 sentences, 32 tokens: 3", "20 sentences, 122 tokens: ", "of 32 right"),
    "open_set.py": ("closed-set accuracy 0.99", "costarr", "AUOSCR"),
    "tap_vit.py": (
        "6 blocks pool on a grid of Grid(height=10, width=10)",
        "mCE against itself: 100.0",
        "as it was: True",
    ),
    "sentence_transformers_readout.py": ("hidden states [1, 2, 3, 4, 5, 6]", "the same vectors: True"),
    "nv_embed_small.py": ("8 of 8 after forty steps", "the same vectors: True"),
    "pyg_readout.py": ("gem inside SAGEConv", "sum to [1.0, 1.0, 1.0]"),
    "in_context_regression.py": ("effective step 0.", "theory 0.92", "debiased step"),
    "probe_digits.py": ("tie_group", "an image of a 0: read as 0"),
}


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_example(script, tmp_path):
    environment = {**os.environ, "CENOTE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, FOLDER / script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in PRINTS[script]), done.stdout
