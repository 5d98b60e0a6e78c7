"""The terminal chat over a talker that is a script, and the commands for keys."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raymoe import cli
from raymoe.chatting import Conversation
from raymoe.errors import StartError
from raymoe.serve.key_source import read_keys
from raymoe.serve.keys import find


class Script:
    """Says its pieces; an exception among them is raised. Remembers what it was asked."""

    def __init__(self, *pieces: str | BaseException) -> None:
        self.pieces = pieces
        self.asked: list[list[dict[str, Any]]] = []
        self.closed = 0

    def answer(self, messages: list[dict[str, Any]]) -> Generator[str]:
        self.asked.append(messages)
        try:
            for piece in self.pieces:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.closed += 1


def conversation(script: Script, system: str | None = None) -> tuple[Conversation, list[str]]:
    shown: list[str] = []
    return Conversation(script, shown.append, system), shown


def test_turns_add_up_and_reset_forgets_them_but_the_beginning() -> None:
    script = Script("Hel", "lo")
    chat, shown = conversation(script, "be brief")
    assert chat.say("one") and chat.say("two")
    system, one, hello = (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Hello"},
    )
    assert script.asked == [[system, one], [system, one, hello, {"role": "user", "content": "two"}]]
    assert "".join(shown) == "Hello\nHello\n"
    assert chat.say("/reset")
    assert chat.turns == [system]


def test_quit_leaves_and_nothing_says_nothing() -> None:
    script = Script("x")
    chat, _ = conversation(script)
    assert chat.say("") and chat.say("  ") and chat.say("/what")
    assert script.asked == []
    assert not chat.say("/quit") and not chat.say("/EXIT")


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said() -> None:
    script = Script("Once upon", KeyboardInterrupt(), " a time")
    chat, shown = conversation(script)
    assert chat.say("tell")
    assert chat.turns[-1] == {"role": "assistant", "content": "Once upon"}
    assert shown[-1] == " (stopped)\n"
    assert script.closed == 1


def test_a_failing_answer_leaves_the_conversation_as_it_was() -> None:
    chat, _ = conversation(Script("x", StartError("gone")))
    with pytest.raises(StartError):
        chat.say("tell")
    assert chat.turns == []


def test_keys_are_made_listed_and_not_made_twice(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"

    def run(*arguments: str) -> Any:
        return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["keys", *arguments, "--file", str(file)])

    made = run("new", "alice", "--requests-per-minute", "60", "--concurrent", "2")
    assert made.exit_code == 0
    key = made.stdout.strip()
    assert find(read_keys(file), key) is not None
    assert run("new", "root", "--admin").exit_code == 0
    listed = run("list").stdout
    assert listed.splitlines() == [
        "alice: 60 per minute, 2 at a time",
        "root: any number per minute, any number at a time, admin",
    ]
    assert key not in listed
    again = run("new", "alice")
    assert again.exit_code == 2
    assert 'has a key "alice" already' in again.stderr
    assert run("new", "a b").exit_code == 2
