"""For every test."""

from __future__ import annotations

import gc
import sys

import pytest

KNOWN = pytest.StashKey[int]()  # how many modules there were
MANY = 100


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is imported stays for good: whoever looks for what can be freed need not look at it again.

    The studio looks whenever something leaves the device, which took half of the time of some tests.
    """
    if len(sys.modules) > item.config.stash.get(KNOWN, 0) + MANY:
        gc.collect()
        gc.freeze()
        item.config.stash[KNOWN] = len(sys.modules)
