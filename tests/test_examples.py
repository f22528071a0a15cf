"""Every example runs as it stands and prints what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
PRINTS = {  # script: words of its output
    "pool_tokens.py": ("efficient_probing(num_queries=4)", "from six layers: (3, 24)"),
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
