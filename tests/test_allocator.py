"""Freed memory that stays: large blocks used again and again cost no page faults."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from cenote.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import numpy
numpy.ones(2**24, numpy.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    numpy.ones(2**24, numpy.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_large_blocks_are_used_again():
    kept, plain = (
        int(subprocess.run([sys.executable, "-c", FAULTS, mode], check=True, capture_output=True, text=True).stdout)
        for mode in ("keep", "plain")
    )
    assert kept < 0.1 * plain
