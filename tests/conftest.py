"""Run-time checks of every jaxtyping annotation in the library.

torch.compile and torch.export cannot trace those checks, so `make test` runs the tests marked ``compiled`` in a second
process with ``CENOTE_TYPECHECK=0``.
"""

import os

import pytest

TYPECHECK = os.environ.get("CENOTE_TYPECHECK", "1") == "1"

if TYPECHECK:
    from jaxtyping import install_import_hook

    install_import_hook("cenote", "typecheck.checker")

import torch  # noqa: E402 (after the hook)

torch.set_num_threads(1)


def pytest_runtest_setup(item):
    """Every test draws the same numbers wherever and behind whichever other test it runs."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    for item in items:
        compiled = item.get_closest_marker("compiled") is not None
        if compiled and TYPECHECK:
            item.add_marker(pytest.mark.skip(reason="runs with CENOTE_TYPECHECK=0, without run-time shape checks"))
