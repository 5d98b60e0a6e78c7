"""Tests that need hosts are skipped, with the reason, where there can be none."""

import pytest

from tests.testbed.network import why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is here; the hook sees the tests of all folders."""
    here = [item for item in items if item.path.parent.name == "testbed"]
    reason = why_not() if here else None
    if reason is not None:
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))
