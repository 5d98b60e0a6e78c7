"""``raymoe chat``: a conversation in the terminal, with a running server or an application of this Ray cluster."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Annotated, Any, Protocol

import typer

from raymoe.errors import ConfigError, RaymoeError, StartError

FIRST_CHAT_TOKENS = 128  # a sign of life, not a conversation
READ_TIMEOUT_S = 600.0  # for the next piece of an answer: an engine under load may take long
HELP = """Type a message and Enter. /reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer."""


class Talker(Protocol):
    """Whoever answers."""

    def answer(self, messages: list[dict[str, Any]]) -> Generator[str]:
        """The next turn, in pieces. Closing it stops the answer. Raises RaymoeError."""
        ...


class ServerTalker:
    """Answers come from a server, over HTTP.

    Args:
        options: further fields of the request.
    """

    def __init__(self, url: str, key: str | None = None, **options: Any) -> None:
        self._url = f"{url.rstrip('/')}/v1/chat/completions"
        self._key = key
        self._options = options

    def answer(self, messages: list[dict[str, Any]]) -> Generator[str]:
        """See ``Talker``."""
        import urllib.error
        import urllib.request

        body = {**self._options, "stream": True, "messages": messages}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=READ_TIMEOUT_S) as response:
                yield from _texts(response)
        except urllib.error.HTTPError as error:
            raise StartError(f"the chat request failed: {_message(error.read().decode(errors='replace'))}") from error
        except OSError as error:
            raise StartError(f"the chat request failed: {error}; is a server running at {self._url}?") from error
        except ValueError as error:
            raise ConfigError(f"--url {self._url} is no address of a server: {error}") from error


class AppTalker:
    """Answers come from an application of this Ray cluster, by its handle."""

    def __init__(self, app: str, **options: Any) -> None:
        import raymoe

        self._connection = raymoe.connect(app=app)
        self._options = options

    def answer(self, messages: list[dict[str, Any]]) -> Generator[str]:
        """See ``Talker``."""
        with contextlib.closing(self._connection.stream(messages, **self._options)) as chunks:
            for chunk in chunks:
                yield chunk.text


class Conversation:
    """Turns so far. What the user says joins them once it was answered, if only in part.

    Args:
        write: shows a piece of text.
        system: what the model is told before anything else.
    """

    def __init__(self, talker: Talker, write: Callable[[str], None], system: str | None = None) -> None:
        self._talker = talker
        self._write = write
        self._beginning = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, Any]] = list(self._beginning)

    def say(self, text: str) -> bool:
        """Answer what the user has typed, or do it, if it is a command. Returns whether to go on.

        Raises RaymoeError where an answer fails; the conversation is as before then.
        """
        command = text.strip().lower()
        if command in ("/quit", "/exit"):
            return False
        if command == "/reset":
            self.turns = list(self._beginning)
            self._write("(forgotten)\n")
        elif command.startswith("/"):
            self._write(HELP + "\n")
        elif command:
            self._answer(text)
        return True

    def _answer(self, text: str) -> None:
        turns = [*self.turns, {"role": "user", "content": text}]
        pieces: list[str] = []
        with contextlib.closing(self._talker.answer(turns)) as answer:
            try:
                for piece in answer:
                    pieces.append(piece)
                    self._write(piece)
                self._write("\n")
            except KeyboardInterrupt:
                self._write(" (stopped)\n")
        self.turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]


def chat(
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    app: Annotated[
        str | None, typer.Option(metavar="NAME", help="Ask this application of the Ray cluster instead, without HTTP.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="RAYMOE_API_KEY", help="API key; better given by the environment.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; omitted: as the model says.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
) -> None:
    """Talk with a model that is being served. The answer appears as it is made.

    /reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer.
    """
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    talker: Talker = ServerTalker(url, key, **given) if app is None else AppTalker(app, **given)
    talk(Conversation(talker, lambda text: typer.echo(text, nl=False), system))


def talk(conversation: Conversation) -> None:
    """Read lines until the user leaves. A failing answer is shown; a lost engine may come back."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - editing and history of what is typed
        typer.secho(HELP, dim=True, err=True)
    while True:
        try:
            line = input("> " if is_terminal else "")
            if not conversation.say(line):
                return
        except EOFError:
            return
        except KeyboardInterrupt:  # while nothing is being answered
            typer.echo("\n/quit leaves", err=True)
        except RaymoeError as error:
            if not is_terminal:
                raise
            typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)


def stream_chat(url: str, model: str, prompt: str) -> None:
    """Send one chat message to a server and print its answer as it comes. Raises RaymoeError where that fails."""
    typer.secho(f"> {prompt}", dim=True)
    talker = ServerTalker(url, os.environ.get("RAYMOE_API_KEY"), model=model, max_tokens=FIRST_CHAT_TOKENS)
    for text in talker.answer([{"role": "user", "content": prompt}]):
        typer.echo(text, nl=False)
    typer.echo()


def _texts(lines: Iterator[bytes]) -> Iterator[str]:
    """The text of each event of a stream. Raises StartError for an error event."""
    for line in lines:
        data = line.decode().removeprefix("data: ").strip()
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise StartError(f"the chat request failed: {event['error'].get('message')}")
        for choice in event.get("choices", ()):
            yield choice.get("delta", {}).get("content") or ""


def _message(body: str) -> str:
    """What an error's JSON says; what is none, as it is."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body
