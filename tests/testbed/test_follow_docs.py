"""docs/edge.md, followed word for word."""

from pathlib import Path

import pytest

from tests.testbed.follow_docs import BOXES, PAGE, build_wheel, follow, steps_of
from tests.testbed.network import Link, testbed

pytestmark = pytest.mark.integration


def test_the_page_works_word_for_word_for_two_boxes(tmp_path: Path) -> None:
    shown: list[str] = []
    with testbed(BOXES, Link()) as network:
        follow(network, steps_of(PAGE.read_text()), build_wheel(tmp_path), shown.append)
    assert "2 hosts are down" in shown[-1]
