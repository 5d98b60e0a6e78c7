"""The audit tells clean from not asked. No network."""

from typing import Any

import pytest

from tests.audit import EVIDENCE, SERVICES, reachable, verdict

CLEAN = {"name": "a", "version": "1", "vulns": []}
HIT = {"name": "b", "version": "2", "vulns": [{"id": "GHSA-1", "fix_versions": ["3"], "aliases": []}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "status", "last"),
    [
        ([CLEAN, UNKNOWN], 0, "0 vulnerabilities in 1 packages; 1 not known to it"),
        ([CLEAN, HIT], 1, "1 vulnerabilities in 2 packages; 0 not known to it"),
        ([UNKNOWN, UNKNOWN], 0, "skipped: the service knows none of the 2 installed packages"),
    ],
)
def test_clean_found_and_not_asked_are_told_apart(packages: list[Any], status: int, last: str) -> None:
    assert verdict({"dependencies": packages})[0] == status
    assert verdict({"dependencies": packages})[1][-1] == last


def test_what_is_found_is_named_with_its_mend() -> None:
    assert verdict({"dependencies": [HIT]})[1][0] == "b 2: GHSA-1, mended in 3"


@pytest.mark.parametrize(
    ("answers", "service"),
    [({"osv": f'["{EVIDENCE}"]'}, "osv"), ({"osv": '{"vulnerabilities": []}'}, None), ({}, None)],
)
def test_what_knows_no_vulnerability_is_no_service(answers: dict[str, str], service: str | None) -> None:
    texts = {SERVICES[name]: text for name, text in answers.items()}
    assert reachable(SERVICES, lambda url: texts.get(url, "")) == service
