"""Asking hosts to start or end their nodes, all at once, and telling what each of them said."""

import json
import secrets
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import ValidationError

from raymoe.errors import ConfigError, StartError
from raymoe.hosts.file import HostConfig, HostsConfig
from raymoe.hosts.node import PRIVATE, token_file
from raymoe.hosts.spec import Answer, Farewell, folder_of, spec_of
from raymoe.strict import StrictModel
from raymoe.whole_file import write_whole

GRACE_S = 60.0  # beyond what a host itself allows: to connect, to start Python, to end what failed
MOST_AT_ONCE = 16
TELL_CHARACTERS = 300  # of what a command said on its standard error

OnHost = Callable[[str, str], None]
"""Told of each host what was done."""


def up(config: HostsConfig, on_host: OnHost) -> None:
    """Start a Ray node on every host: the head first, then the others together. What runs already is left alone.

    Raises StartError that names every host that failed, and why; the others stay up, and a second call goes on.
    """
    token = make_token(config.name)
    start = lambda host: ask(config, host, "start", spec_of(config, host, token))  # noqa: E731 - two arguments are fixed
    together(config, [config.head], start, on_host)
    together(config, config.hosts[1:], start, on_host)


def down(config: HostsConfig, on_host: OnHost) -> None:
    """End the nodes that ``up`` started, the head last. Raises StartError that names every host that failed."""
    stop = lambda host: ask(  # noqa: E731 - one argument is fixed
        config, host, "stop", Farewell(cluster=config.name, host=host.name, timeout_s=config.timeout_s)
    )
    together(config, config.hosts[1:], stop, on_host)
    together(config, [config.head], stop, on_host)


def together(
    config: HostsConfig, hosts: Sequence[HostConfig], act: Callable[[HostConfig], str], on_host: OnHost
) -> None:
    """Act on all ``hosts`` at once. Raises StartError with the failures, after the last has ended."""

    def tried(host: HostConfig) -> str | None:
        try:
            on_host(host.name, act(host))
            return None
        except (StartError, ConfigError) as error:
            return f"{host.name}: {error}"

    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        failures = [failure for failure in pool.map(tried, hosts) if failure is not None]
    if failures:
        raise StartError("; ".join(failures))


def ask(config: HostsConfig, host: HostConfig, verb: str, request: StrictModel) -> str:
    """Run ``raymoe node VERB`` on a host; returns what it did. Raises StartError that says why it did not."""
    command = config.command_on(host.name, [config.raymoe, "node", verb])
    shown, timeout_s = " ".join(command), config.timeout_s + GRACE_S
    try:
        done = subprocess.run(
            command, input=request.model_dump_json() + "\n", text=True, capture_output=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise StartError(f"no answer within {timeout_s:g} s to `{shown}`; is the machine up?") from error
    except OSError as error:
        raise StartError(f"can't run `{shown}`: {error.strerror}; see run_on") from error
    answer = answer_in(done.stdout)
    if answer is None:
        said = " ".join(done.stderr.split())[-TELL_CHARACTERS:] or "it said nothing"
        raise StartError(
            f"`{shown}` ended with status {done.returncode}: {said}; the host must be reached by run_on without a "
            "password, and have raymoe (the setting raymoe says where)"
        )
    if answer.error:
        raise StartError(answer.error)
    return answer.did


def answer_in(output: str) -> Answer | None:
    """The answer in a host's output, of which a shell's greeting may be a part."""
    for line in reversed(output.splitlines()):
        try:
            return Answer.model_validate(json.loads(line))
        except (ValueError, ValidationError):
            continue
    return None


def make_token(cluster: str) -> str:
    """The cluster's secret, made once and kept on the machine that ``up`` is called on."""
    file = token_file(cluster)
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        token = secrets.token_hex(32)
        folder_of(cluster).mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(file, token, PRIVATE)
        return token
    except OSError as error:
        raise ConfigError(f"can't read the cluster's token {file}: {error.strerror}") from error
