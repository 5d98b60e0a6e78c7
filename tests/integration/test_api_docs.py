"""The examples of docs/api.md, run as they stand: curl, OpenAI's client, raymoe.connect; and raymoe chat."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

import raymoe
from raymoe.chatting import AppTalker, Conversation
from raymoe.errors import RequestError, StartError
from tests.serving import Served, run_application, serving
from tests.waiting import WAIT_S, until

pytestmark = pytest.mark.integration

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
DOCUMENTED_URL = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    """The page's examples in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


CURLS = [block for block in blocks("sh") if block.startswith("curl")]
COMMANDS = [line for block in blocks("sh") if block.startswith("raymoe") for line in block.splitlines()]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as url:
        yield run_application(url, {}, "raymoe")


def running(served: Served) -> int:
    engine = served.get("/v1/stats").json()["engine"]
    return engine["running"] + engine["waiting"]


def test_the_page_has_examples() -> None:
    assert (len(CURLS), len(COMMANDS), len(blocks("python"))) == (6, 3, 3)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("example", CURLS)
def test_curl(served: Served, example: str) -> None:
    command = [
        *shlex.split(example.replace(DOCUMENTED_URL, served.url)),
        "--silent",
        "--show-error",
        "--fail-with-body",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(("{", "data: {"))


@pytest.mark.parametrize("example", blocks("python"))
def test_python(served: Served, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(example.replace(DOCUMENTED_URL, served.url), str(PAGE), "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp() / "commands"  # the same for all: they build on each other
    directory.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "raymoe.cli", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr


# --- raymoe.connect -------------------------------------------------------------------------------------


def test_connect_gives_what_launch_gives(served: Served) -> None:
    moe = raymoe.connect(app="raymoe")
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
    whole = moe.generate("In the beginning", **options)
    assert "".join(chunk.text for chunk in moe.stream("In the beginning", **options)) == whole.text
    assert whole.usage.completion_tokens == len(whole.token_ids) <= 12
    stats = moe.stats()
    assert stats.engine is not None and stats.engine.finished >= 2
    with pytest.raises(RequestError, match="no such option: max_token"):
        moe.generate("x", max_token=3)
    with pytest.raises(RequestError, match="temperature is 9"):
        list(moe.stream("x", temperature=9))
    moe.close()
    assert ray.is_initialized()  # it was not connect's


def test_leaving_a_stream_early_ends_the_request(served: Served) -> None:
    for chunk in raymoe.connect().stream("Once", max_tokens=900, ignore_eos=True):
        assert chunk.token_ids
        break
    until(lambda: running(served) == 0, "the end of the request", 20.0)


def test_an_application_that_is_not_there_is_told_with_those_that_are(served: Served) -> None:
    with pytest.raises(StartError, match='no application "other" is served on this Ray cluster; these run: raymoe'):
        raymoe.connect(app="other")


# --- raymoe chat ----------------------------------------------------------------------------------------


def chat(served: Served, *options: str) -> "subprocess.Popen[str]":
    """The command, driven through pipes."""
    command = [sys.executable, "-m", "raymoe.cli", "chat", "--url", served.url, "--temperature", "0", *options]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # tests that a shell has put into the background ignore Ctrl-C, and so would what they start
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}, preexec_fn=heeding, **pipes
    )


def test_a_chat_remembers_and_forgets(served: Served) -> None:
    out, err = chat(served, "--max-tokens", "8").communicate(
        "In the beginning\nand\n/reset\nand\n/quit\n", timeout=WAIT_S
    )
    assert err == ""
    before, after = out.split("(forgotten)\n")

    def answer(*turns: str) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
        body = {"messages": messages, "max_tokens": 8, "temperature": 0}
        return served.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]

    first = answer("In the beginning")
    assert before == f"{first}\n{answer('In the beginning', first, 'and')}\n"
    assert after == f"{answer('and')}\n"


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(served: Served) -> None:
    process = chat(served, "--max-tokens", "900")
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write("Once upon a time\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        until(lambda: running(served) == 0, "the end of the answer", 20.0)
        out, _ = process.communicate("/quit\n", timeout=WAIT_S)
        assert " (stopped)\n" in out
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_a_chat_without_http(served: Served) -> None:
    shown: list[str] = []
    conversation = Conversation(AppTalker("raymoe", max_tokens=8, temperature=0.0), shown.append)
    assert conversation.say("In the beginning")
    answer = conversation.turns[-1]["content"]
    assert "".join(shown) == answer + "\n"
    body = {"messages": [{"role": "user", "content": "In the beginning"}], "max_tokens": 8, "temperature": 0}
    assert served.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == answer


def test_a_chat_with_no_server_says_so(served: Served) -> None:
    gone = Served(url="http://127.0.0.1:1", handle=served.handle)
    process = chat(gone)
    _, err = process.communicate("hello\n", timeout=WAIT_S)
    assert process.returncode == 1
    assert "is a server running at http://127.0.0.1:1" in err
