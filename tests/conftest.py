"""For every test."""

from __future__ import annotations

import gc
import sys

import pytest

SETTLED = pytest.StashKey[tuple[object, int]]()  # a file of tests, and of how many modules it could make use
MANY = 100


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is imported, and what other files of tests have left, stays for good: it is not looked at again by
    whoever looks for what can be freed, as the studio does whenever something leaves the device.

    With all that these tests import, looking took half of the time of some.
    """
    now = (item.path, len(sys.modules) // MANY)
    if item.config.stash.get(SETTLED, None) != now:
        gc.collect()
        gc.freeze()
        item.config.stash[SETTLED] = now
