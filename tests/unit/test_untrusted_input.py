"""What strangers may send or bring along reaches no file and runs no code: requests, paths, checkpoints. No Ray."""

import ast
import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import raymoe
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.service import load_tokenizer
from raymoe.errors import CheckpointError
from raymoe.serve.api import Api, create_app
from raymoe.serve.key_source import KeySource
from raymoe.serve.keys import Key, digest_of
from tests.toy_models import save_toy

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
FILES = ("file:///etc/passwd", "/etc/passwd", "../../etc/passwd", "http://169.254.169.254/latest")
SECRET = "root:"  # of /etc/passwd


class Untouched:
    """An engine that must not be asked for anything but its card and tokens."""

    async def stream(self, prompt: Any, params: Any) -> Any:
        raise AssertionError(f"asked for {prompt!r}")
        yield

    async def card(self) -> dict[str, Any]:
        return {"name": "tiny"}

    async def stats(self) -> Any:
        raise AssertionError("asked for stats")


def ask(method: str, path: str, body: Any = None, keys: KeySource | None = None) -> httpx.Response:
    """One request whose path is sent as it is: httpx would resolve ".." itself."""

    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(Api(Untouched(), "tiny", keys=keys)), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            url = client.base_url.copy_with(raw_path=path.encode())
            return await client.send(httpx.Request(method, url, json=body))

    return asyncio.run(request())


# --- requests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_the_name_of_a_model_is_compared_and_never_opened(path: str, name: str) -> None:
    body = CHAT if path.startswith("/v1/chat") else {"prompt": "hi"}
    answer = ask("POST", path, {**body, "model": name})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    "field", ["lora", "lora_path", "adapter", "draft_model", "file", "keys_file", "profile", "path"]
)
def test_fields_that_name_files_elsewhere_do_not_exist_here(field: str) -> None:
    answer = ask("POST", "/v1/chat/completions", {**CHAT, field: "/etc/passwd"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter")


@pytest.mark.parametrize("url", FILES)
@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_content_is_text_and_no_address_is_fetched(kind: str, url: str) -> None:
    content = [{"type": kind, kind: {"url": url, "file_data": url, "file_id": url}}]
    answer = ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400
    assert "this model reads text only" in answer.json()["error"]["message"]


def test_a_template_of_the_request_is_refused() -> None:
    """Chat templates are programs: those of the checkpoint run in Jinja's sandbox, those of clients not at all."""
    for field in ("chat_template", "chat_template_kwargs"):
        assert ask("POST", "/v1/chat/completions", {**CHAT, field: "{{ 1 }}"}).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/page/../../../../../../etc/passwd", "/page/..%2f..%2f..%2f..%2fetc%2fpasswd", "/page//etc/passwd",
        "/page/%2e%2e/keys.py", "/page/..\\..\\keys.py", "/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2fkeys.yaml",
        "/../etc/passwd", "//etc/passwd", "/page/index.html%00.py", "/page/__init__.py",
    ],
)  # fmt: skip
def test_no_path_leads_to_a_file(path: str) -> None:
    answer = ask("GET", path)
    assert answer.status_code == 404
    assert SECRET not in answer.text and "def " not in answer.text


@given(st.text(alphabet="./\\%2ef0:~\0 page", max_size=40))
def test_no_path_below_the_page_leads_to_more_than_the_page(path: str) -> None:
    answer = ask("GET", "/page/" + httpx.URL("http://t/", params={"p": path}).query.decode().removeprefix("p="))
    if answer.status_code == 307:  # to the same without its last slash
        assert answer.headers["location"].startswith("http://test/page/")
    else:
        assert answer.status_code == 404


@pytest.mark.parametrize(
    "path", ["/page/../v1/models", "/page/..%2fv1/models", "/page/%2e%2e/v1/models", "//v1/models"]
)
def test_what_needs_no_key_is_no_way_to_what_does(path: str) -> None:
    keys = KeySource(fixed=(Key(name="alice", digest=digest_of("secret")),))
    answer = ask("GET", path, keys=keys)
    assert answer.status_code in (401, 404)
    assert "owned_by" not in answer.text


# --- checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A checkpoint that brings code for its configuration, model and tokenizer, each of which leaves a file behind."""
    directory = save_toy("qwen3_moe", tmp_path / "model")
    for name in EMBEDDED_MODEL.glob("tokenizer*.json"):
        (directory / name.name).write_bytes(name.read_bytes())
    code = f"from pathlib import Path\nPath({str(tmp_path / 'sprung')!r}).write_text('ran')\n"
    classes = "class Config: ...\nclass Model: ...\nclass Tokenizer: ...\n"
    (directory / "trap.py").write_text(code + classes)
    return directory


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_code_of_a_checkpoint_does_not_run_for_an_unknown_architecture(trap: Path, tmp_path: Path) -> None:
    own = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
    edit(trap / "config.json", model_type="trap", architectures=["Model"], auto_map=own)
    with pytest.raises(CheckpointError):
        open_checkpoint(trap)
    assert not (tmp_path / "sprung").exists()


def test_code_of_a_checkpoint_does_not_run_beside_a_known_architecture(trap: Path, tmp_path: Path) -> None:
    edit(trap / "config.json", auto_map={"AutoModelForCausalLM": "trap.Model", "AutoConfig": "trap.Config"})
    edit(
        trap / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["trap.Tokenizer", None]},
        tokenizer_class="Tokenizer",
    )
    with contextlib.suppress(CheckpointError):  # refused is as good as opened without its code
        load_tokenizer(open_checkpoint(trap))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(trap: Path, name: str) -> None:
    (trap / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match="is not the name of a file beside it"):
        open_checkpoint(trap)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle_is_never_opened(trap: Path, name: str) -> None:
    (trap / "model.safetensors").rename(trap / name)
    with pytest.raises(CheckpointError, match="it could run code on loading and is refused"):
        open_checkpoint(trap)


# --- the code itself ------------------------------------------------------------------------------------

RISKY = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
RISKY_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "np.load", "numpy.load"}


def test_nothing_in_the_package_unpickles_or_runs_text() -> None:
    """Ray unpickles what it carries between its own processes; nothing of ours does. Routing traces are numpy's plain
    arrays, which are read with pickles refused."""
    found = []
    for file in sorted(Path(raymoe.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{file.name} imports {name}" for name in names if name.partition(".")[0] in RISKY]
            if isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in RISKY_CALLS:
                refuses = {"allow_pickle=False", "weights_only=True"} & {ast.unparse(word) for word in node.keywords}
                found += [] if refuses else [f"{file.name}:{node.lineno} calls {called}"]
    assert found == []
