"""Keys: hashed, compared, limited; who may do what. No Ray, no network, a clock of the test's own."""

import asyncio
import base64
import logging
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from raymoe.config import ClusterConfig
from raymoe.errors import ConfigError
from raymoe.serve.guard import Guard, is_local, is_loopback, is_open, presented_key
from raymoe.serve.key_source import ENVIRONMENT, KeySource, add_key, environment_keys, needs_keys, read_keys
from raymoe.serve.keys import Key, digest_of, find, new_key, parse_keys
from raymoe.serve.limits import Limits

ALICE = Key(name="alice", digest=digest_of("secret-a"))
ADMIN = Key(name="root", digest=digest_of("secret-r"), admin=True)
SLOW = Key(name="slow", digest=digest_of("secret-s"), requests_per_minute=2, concurrent=1)
KEYS = (ALICE, ADMIN, SLOW)


class Clock:
    """Stands still."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers everything."""
    await PlainTextResponse("in")(scope, receive, send)


def ask(
    path: str = "/v1/models",
    key: str | None = None,
    *,
    keys: tuple[Key, ...] = KEYS,
    method: str = "GET",
    guard: Guard | None = None,
    client: tuple[str, int] = ("127.0.0.1", 5),
    **headers: str,
) -> httpx.Response:
    """One request through a guard."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        sent["authorization"] = f"Bearer {key}"
    whole = guard or Guard(answers, KeySource(fixed=keys), Clock())

    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(whole, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as sender:
            return await sender.request(method, path, headers=sent)

    return asyncio.run(request())


# --- who may ask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/stats", "/metrics", "/docs", "/openapi.json", "/no/such"])
def test_everything_is_closed_without_a_key(path: str) -> None:
    answer = ask(path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/", True), ("/page/a.js", True), ("/health", True), ("/page", False), ("/v1/stats", False), ("/pages/x", False),
     ("/healthy", False), ("/health/", False), ("//health", False), ("", False)],
)  # fmt: skip
def test_what_is_open(path: str, expected: bool) -> None:
    assert is_open(path, ("/health", "/", "/page/")) == expected


def test_health_is_open() -> None:
    assert ask("/health").text == "in"


@pytest.mark.parametrize("key", ["secret", "secret-A", "secret-a ", "", "x" * 10_000])
def test_a_wrong_key_is_401_and_is_not_repeated(key: str) -> None:
    answer = ask(key=key) if key.strip() == key else ask(key=key + "x")
    assert answer.status_code == 401
    assert not key or key not in answer.text


@pytest.mark.parametrize("key", ["secret-a", "secret-r", "secret-s"])
def test_each_key_opens(key: str) -> None:
    assert ask(key=key).text == "in"


def test_a_browser_is_asked_for_a_password_which_is_the_key() -> None:
    asked = ask("/", accept="text/html,application/xhtml+xml")
    assert asked.headers["www-authenticate"].startswith("Basic ")
    told = base64.b64encode(b"me:secret-a").decode()
    assert ask("/", authorization=f"Basic {told}").text == "in"
    assert presented_key("Basic !!!") is None
    assert presented_key("Digest secret-a") is None


def test_no_key_is_left_means_nobody_and_no_configuration_means_everybody(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("{}")
    assert ask(guard=Guard(answers, KeySource(file))).status_code == 401
    assert ask(keys=()).text == "in"


def test_every_key_is_compared_also_after_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(a) or a == b)
    assert find(KEYS, "secret-a") is ALICE
    assert compared == [key.digest for key in KEYS]


# --- settings -------------------------------------------------------------------------------------------


def test_settings_need_an_admins_key() -> None:
    refused = ask("/v1/admin/settings", "secret-a", method="POST")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")
    assert ask("/v1/admin/settings", "secret-r", method="POST").text == "in"
    assert ask("/v1/admin/settings").status_code == 401


@pytest.mark.parametrize(
    ("client", "headers", "allowed"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {}, True),
        ("192.168.0.9", {}, False),
        ("127.0.0.1", {"x_forwarded_for": "192.168.0.9"}, False),
        ("127.0.0.1", {"host": "evil.example"}, False),
        ("127.0.0.1", {"host": "localhost:8000"}, True),
        ("127.0.0.1", {"host": "[::1]:8000"}, True),
        ("127.0.0.1", {"host": "127.0.0.1.evil.example"}, False),
    ],
)
def test_without_keys_settings_are_for_this_machine_only(client: str, headers: dict[str, str], allowed: bool) -> None:
    answer = ask("/v1/admin/settings", keys=(), client=(client, 5), **headers)
    assert answer.status_code == (200 if allowed else 403)


def test_an_unknown_client_is_not_local() -> None:
    assert not is_local({"type": "http", "client": None}, {"host": "localhost"})


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("::ffff:127.0.0.1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_what_is_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_the_first_stranger_without_keys_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(answers, KeySource())
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        logging.getLogger("ray.serve").addHandler(caplog.handler)
        for client in ("127.0.0.1", "10.0.0.7", "10.0.0.8"):
            ask(guard=guard, client=(client, 5))
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert len({record.message for record in caplog.records if "NO API KEYS" in record.message}) == 1


# --- limits ---------------------------------------------------------------------------------------------


def test_requests_per_minute_refill_steadily() -> None:
    clock = Clock()
    limits = Limits(clock)
    key = Key(name="k", digest=b"", requests_per_minute=3)
    assert [limits.enter(key) for _ in range(3)] == [None] * 3
    assert limits.enter(key) == 'key "k" may send 3 requests per minute, and has'
    assert limits.wait_s(key) == 20.0
    clock.now = 19.0
    assert limits.enter(key) is not None
    assert limits.wait_s(key) == pytest.approx(1.0)
    clock.now = 20.0
    assert limits.enter(key) is None
    clock.now = 1000.0
    assert [limits.enter(key) is None for _ in range(4)] == [True, True, True, False]


def test_requests_at_a_time() -> None:
    limits = Limits(Clock())
    key = Key(name="k", digest=b"", concurrent=2)
    assert [limits.enter(key), limits.enter(key)] == [None, None]
    assert limits.enter(key) == 'key "k" may have 2 requests under way at a time, and has them'
    assert limits.wait_s(key) == 0.0
    limits.leave(key)
    assert limits.enter(key) is None


def test_too_many_requests_are_429_and_say_when_to_come_back() -> None:
    guard = Guard(answers, KeySource(fixed=KEYS), Clock())
    path = "/v1/completions"
    assert [ask(path, "secret-s", method="POST", guard=guard).status_code for _ in range(3)] == [200, 200, 429]
    refused = ask(path, "secret-s", method="POST", guard=guard)
    assert refused.headers["retry-after"] == "30"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert ask(path, "secret-a", method="POST", guard=guard).status_code == 200
    assert ask("/v1/stats", "secret-s", guard=guard).status_code == 200  # looking is free


def test_a_request_is_under_way_until_its_answer_ends_however_it_ends() -> None:
    inside: list[int] = []

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        inside.append(guard._limits._accounts["slow"].under_way)
        raise OSError("the client has gone")

    guard = Guard(fails, KeySource(fixed=KEYS), Clock())
    with pytest.raises(OSError):
        ask("/v1/completions", "secret-s", method="POST", guard=guard)
    assert inside == [1]
    assert guard._limits._accounts["slow"].under_way == 0


# --- where keys come from -------------------------------------------------------------------------------


def test_a_new_key_is_in_the_file_as_a_hash_only(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    first = add_key(file, "alice", requests_per_minute=60, concurrent=4)
    second = add_key(file, "root", admin=True)
    assert first != second and first.startswith("raymoe-") and len(first) > 40
    assert first not in file.read_text() and second not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = read_keys(file)
    assert keys[0] == Key(name="alice", digest=digest_of(first), requests_per_minute=60, concurrent=4)
    assert keys[1] == Key(name="root", digest=digest_of(second), admin=True)
    assert find(keys, second) == keys[1]
    with pytest.raises(ConfigError, match='has a key "alice" already'):
        add_key(file, "alice")


def test_keys_are_not_alike() -> None:
    assert len({new_key() for _ in range(100)}) == 100


def test_a_changed_file_counts_at_once_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    first = add_key(file, "alice")
    source = KeySource(file)
    second = add_key(file, "bob")
    assert find(source.keys(), second) is not None
    whole = file.read_text()
    file.write_text("alice: {sha256: nothing}")
    assert find(source.keys(), first) is not None
    file.write_text(whole[: whole.index("bob")])
    assert find(source.keys(), second) is None
    file.unlink()
    assert find(source.keys(), first) is not None
    assert source.required


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "must hold a mapping"),
        ("alice: {sha256: abc}", "alice: sha256"),
        ("alice: {sha256: %s, request_per_minute: 5}" % ("0" * 64), "request_per_minute: no such field"),
        ("alice: {sha256: %s, concurrent: 0}" % ("0" * 64), "concurrent"),
        ("'a b': {sha256: %s}" % ("0" * 64), "no name of a key"),
        ("1: {sha256: %s}" % ("0" * 64), "no name of a key"),
        ("alice: 5", "alice"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        KeySource(file)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read the file of keys"):
        KeySource(tmp_path / "none.yaml")


def test_keys_of_the_environment() -> None:
    data: dict[str, Any] = {"alice": {"sha256": digest_of("k").hex(), "admin": True}}
    assert environment_keys({ENVIRONMENT: str(data)}) == parse_keys(data, "here")
    assert environment_keys({}) == ()
    for wrong in ("raymoe-abc", "{", "[1]"):
        with pytest.raises(ConfigError, match=ENVIRONMENT):
            environment_keys({ENVIRONMENT: wrong})


def test_whether_a_server_will_need_keys() -> None:
    config = ClusterConfig()
    assert not needs_keys(config, {})
    assert needs_keys(config, {ENVIRONMENT: "{}x"})
    assert needs_keys(ClusterConfig.model_validate({"serving": {"keys_file": "keys.yaml"}}), {})
