"""Known vulnerabilities of the installed packages, by pip-audit: ``make audit``.

Asks OSV. Where it can't be reached, that is no failure: it says so and leaves with 0. Leaves with 1 where something is
found. What answers may know nothing of vulnerabilities, which must not be taken for a clean result: so a service counts
only if it knows one that is known to be there.
"""

import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

SERVICES = {
    "osv": "https://api.osv.dev/v1/vulns/GHSA-h5c8-rqwp-cp95",
}
"""By pip-audit's name, where it tells of one of Jinja2's old vulnerabilities."""
EVIDENCE = "GHSA-h5c8-rqwp-cp95"
REACH_TIMEOUT_S = 10.0
AUDIT_TIMEOUT_S = 600.0


def tells(url: str) -> str:
    """What is at an address; nothing where it can't be reached."""
    try:
        with urllib.request.urlopen(url, timeout=REACH_TIMEOUT_S) as answer:
            return answer.read().decode(errors="replace")
    except (urllib.error.URLError, OSError):
        return ""


def reachable(services: Mapping[str, str], tells: Callable[[str], str] = tells) -> str | None:
    """The first service that knows its vulnerability, by name; None where none does."""
    return next((name for name, url in services.items() if EVIDENCE in tells(url)), None)


def verdict(report: Mapping[str, Any]) -> tuple[int, list[str]]:
    """The exit status, and what to say, of pip-audit's report."""
    asked = [package for package in report["dependencies"] if "skip_reason" not in package]
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'none'}"
        for package in asked
        for found in package["vulns"]
    ]
    unknown = len(report["dependencies"]) - len(asked)
    if not asked:
        return 0, [f"skipped: the service knows none of the {unknown} installed packages"]
    return int(bool(lines)), [
        *lines,
        f"{len(lines)} vulnerabilities in {len(asked)} packages; {unknown} not known to it",
    ]


def audit(service: str) -> int:
    """Ask about what is installed here. Returns the exit status."""
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", service, "--format", "json"]
    done = subprocess.run(command, timeout=AUDIT_TIMEOUT_S, check=False, capture_output=True, text=True)
    if not done.stdout.strip():
        print(f"pip-audit failed:\n{done.stderr}")
        return 2
    status, lines = verdict(json.loads(done.stdout))
    print("\n".join(lines))
    return status


def main() -> int:
    """Audit, or say why not."""
    if importlib.util.find_spec("pip_audit") is None:
        print("skipped: pip-audit is not installed (pip install -e '.[audit]')")
        return 0
    service = reachable(SERVICES)
    if service is None:
        print(f"skipped: no vulnerability service can be reached from here (tried {' and '.join(SERVICES)})")
        return 0
    print(f"asking {service}")
    return audit(service)


if __name__ == "__main__":
    sys.exit(main())
