"""A server with keys, and its own description: OpenAI's client with good, bad, limited and admin keys; schemathesis."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from ray import serve
from schemathesis import GenerationMode

from raymoe.config import ClusterConfig
from raymoe.serve.app import build_application
from raymoe.serve.key_source import add_key
from raymoe.serve.openapi import ANSWERS
from tests.serving import Served, run_application, serving
from tests.waiting import WAIT_S, until

pytestmark = pytest.mark.integration

MODEL = "tiny-moe"
EXAMPLES = 20  # of each operation
MOST_TOKENS = 16  # of one answer: the server is asked a lot


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyed:
    """A server with keys."""

    served: Served
    file: Path
    user: str
    admin: str
    slow: str
    single: str

    def bearer(self, key: str) -> dict[str, Any]:
        return {"headers": {"Authorization": f"Bearer {key}"}}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys = {
        "user": add_key(file, "user"),
        "admin": add_key(file, "admin", admin=True),
        "slow": add_key(file, "slow", requests_per_minute=2),
        "single": add_key(file, "single", concurrent=1),
    }
    config = {
        "serving": {"keys_file": str(file), "max_output_tokens": MOST_TOKENS},
        "scheduling": {"policy": "importance", "alpha": 0.2},
        "devices": [{"name": "edge-0", "transport": "local", "slot_memory": "24MiB"}],
    }
    with serving() as url:
        yield Keyed(served=run_application(url, config, "keyed"), file=file, **keys)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(**{"model": MODEL, "prompt": "Once", "max_tokens": 2, **options})


# --- keys -----------------------------------------------------------------------------------------------


def test_a_good_key_opens_and_others_raise_openais_error(keyed: Keyed) -> None:
    assert ask(keyed.served.client(keyed.user)).usage.completion_tokens == 2
    for key in ("none", keyed.user[:-1], keyed.user + "x"):
        with pytest.raises(openai.AuthenticationError) as caught:
            ask(keyed.served.client(key))
        assert caught.value.code == "invalid_api_key"
        assert key not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/stats", "/docs", "/openapi.json", "/v1/admin/settings", "/nothing"]
)
def test_every_path_but_health_is_closed(keyed: Keyed, path: str) -> None:
    assert keyed.served.get(path).status_code == 401
    assert keyed.served.get("/health").status_code == 200


def test_a_rate_is_limited_and_says_when_to_come_back(keyed: Keyed) -> None:
    client = keyed.served.client(keyed.slow)
    ask(client), ask(client)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client)
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
    assert ask(keyed.served.client(keyed.user)).choices


def test_requests_at_a_time_are_limited_until_the_stream_ends(keyed: Keyed) -> None:
    client = keyed.served.client(keyed.single)
    stream = ask(client, stream=True, max_tokens=MOST_TOKENS, n=8, extra_body={"ignore_eos": True})
    chunks = iter(stream)
    next(chunks)
    with pytest.raises(openai.RateLimitError):
        ask(client)
    assert sum(1 for _ in chunks) > 0

    def free() -> bool:
        return keyed.served.post(
            "/v1/completions", {"prompt": "x", "max_tokens": 1}, **keyed.bearer(keyed.single)
        ).is_success

    until(free, "the end of the request", 20.0)


def test_a_new_key_works_at_once_and_a_deleted_one_no_more(keyed: Keyed) -> None:
    before = keyed.file.read_text()
    late = add_key(keyed.file, "late")
    assert ask(keyed.served.client(late)).choices
    keyed.file.write_text(before)
    with pytest.raises(openai.AuthenticationError):
        ask(keyed.served.client(late))


def test_a_file_that_is_not_there_fails_the_start_and_says_so(keyed: Keyed, tmp_path: Path) -> None:
    config = ClusterConfig.model_validate({"serving": {"keys_file": str(tmp_path / "none.yaml")}})
    with pytest.raises(RuntimeError):
        serve.run(build_application(config), name="lost", route_prefix="/lost")
    deployments = serve.status().applications["lost"].deployments
    assert "can't read the file of keys" in deployments["ingress"].message
    serve.delete("lost")


# --- settings -------------------------------------------------------------------------------------------


def test_settings_are_for_admins_and_change_at_once(keyed: Keyed) -> None:
    served, admin = keyed.served, keyed.bearer(keyed.admin)
    path = "/v1/admin/settings"
    with pytest.raises(openai.PermissionDeniedError):
        served.client(keyed.user).post("/admin/settings", body={"scheduling": {}}, cast_to=object)
    assert served.get(path, **admin).json()["scheduling"]["alpha"] == 0.2
    changed = served.post(path, {"scheduling": {"alpha": 0.4, "prefetch": "none"}}, **admin).json()
    assert (changed["scheduling"]["alpha"], changed["scheduling"]["prefetch"]) == (0.4, "none")
    assert "policy" in changed["fixed"]
    assert served.get("/v1/stats", **admin).json()["engine"]["alpha"] == 0.4
    for wrong, words in [
        ({"alpha": 7}, "alpha: is 7"),
        ({"policy": "on_demand"}, "can't be changed"),
        ({"beta": 1}, "beta"),
    ]:
        refused = served.post(path, {"scheduling": wrong}, **admin)
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]
    assert served.get(path, **admin).json()["scheduling"]["alpha"] == 0.4


def test_a_page_of_another_site_can_not_post_settings(keyed: Keyed) -> None:
    headers = {**keyed.bearer(keyed.admin)["headers"], "Content-Type": "text/plain"}
    refused = keyed.served.post(
        "/v1/admin/settings", content=json.dumps({"scheduling": {"alpha": 0.1}}), headers=headers
    )
    assert refused.status_code == 400


# --- its own description --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def description(keyed: Keyed) -> Any:
    return schemathesis.openapi.from_url(f"{keyed.served.url}/openapi.json", **keyed.bearer(keyed.admin))


ASKED = [(mode, method, path) for mode in GenerationMode for method, path in ANSWERS]


@pytest.mark.parametrize(("mode", "method", "path"), ASKED)
def test_the_server_does_what_it_says_of_itself(
    keyed: Keyed, description: Any, mode: GenerationMode, method: str, path: str
) -> None:
    if mode is GenerationMode.NEGATIVE and method == "get":
        pytest.skip("nothing to send that could be wrong")

    @given(case=description[path][method.upper()].as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(
            base_url=keyed.served.url,
            timeout=WAIT_S,
            excluded_checks=[schemathesis.checks.positive_data_acceptance],  # the model judges names, token ids
            **keyed.bearer(keyed.admin),
        )

    check()


def test_the_server_is_well_after_all_that(keyed: Keyed) -> None:
    assert ask(keyed.served.client(keyed.user)).usage.completion_tokens == 2
    engine = keyed.served.get("/v1/stats", **keyed.bearer(keyed.admin)).json()["engine"]
    assert (engine["running"], engine["waiting"]) == (0, 0)
