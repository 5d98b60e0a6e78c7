"""The file of hosts, what a host is asked, and what is said of hosts that fail: with commands of this machine."""

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from raymoe.errors import ConfigError, StartError
from raymoe.hosts.file import HostsConfig
from raymoe.hosts.node import (
    Record,
    ray_command,
    reach_head,
    read_record,
    shell_lines,
    stop_node,
    token_file,
    write_record,
)
from raymoe.hosts.remote import answer_in, down, make_token, up
from raymoe.hosts.spec import Farewell, NodeSpec, spec_of
from raymoe.whole_file import write_whole

TWO = [{"name": "box-0", "address": "10.0.0.10"}, {"name": "box-1", "address": "10.0.0.11"}]
TOKEN = "t" * 64


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def hosts(**more: Any) -> HostsConfig:
    return HostsConfig.model_validate({"hosts": TWO, **more})


def refusal(**more: Any) -> str:
    with pytest.raises(ValueError) as caught:
        hosts(**more)
    return str(caught.value)


def spec(index: int = 0, **more: Any) -> NodeSpec:
    config = hosts(hosts=[{**TWO[0]}, {**TWO[1], **more}])
    return spec_of(config, config.hosts[index], TOKEN)


# --- the file -----------------------------------------------------------------------------------------------


def test_a_command_goes_through_ssh_unless_told_otherwise() -> None:
    words = hosts().command_on("box-1", ["raymoe", "node", "start"])
    assert words == ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "box-1", "raymoe", "node", "start"]


def test_a_command_goes_wherever_run_on_says() -> None:
    words = hosts(run_on="docker exec -i c-{host} {command}").command_on("box-1", ["raymoe", "node", "stop"])
    assert words == ["docker", "exec", "-i", "c-box-1", "raymoe", "node", "stop"]


@pytest.mark.parametrize("run_on", ["ssh {command}", "ssh {host}", "ssh {host} sh -c '{command}; true'"])
def test_run_on_needs_host_and_command(run_on: str) -> None:
    assert "must have {host} and, as a word of its own, {command}" in refusal(run_on=run_on)


def test_hosts_must_differ() -> None:
    assert "differ in name; twice there: box-0" in refusal(hosts=[TWO[0], {**TWO[1], "name": "box-0"}])
    assert "differ in address; twice there: 10.0.0.10" in refusal(hosts=[TWO[0], {**TWO[1], "address": "10.0.0.10"}])


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1"])
def test_an_address_that_others_can_not_reach_is_refused(address: str) -> None:
    assert "can't be reached by other machines" in refusal(hosts=[{"name": "a", "address": address}])


def test_names_are_no_paths_and_no_options() -> None:
    for name in ("../x", "-oProxyCommand=x", "a b", "a;b", ""):
        assert "name" in refusal(hosts=[{"name": name, "address": "10.0.0.1"}]), name
        assert "name" in refusal(name=name), name


def test_a_path_with_spaces_is_refused() -> None:
    assert "must be one word" in refusal(raymoe="/my programs/raymoe")


def test_a_file_that_is_wrong_is_named_with_its_fields(tmp_path: Path) -> None:
    file = tmp_path / "hosts.yaml"
    file.write_text("hosts:\n  - {name: a, address: 10.0.0.1, gpus: 1}\n")
    with pytest.raises(ConfigError, match=r"hosts\.yaml: hosts\.0\.gpus: no such field"):
        HostsConfig.load(file)


# --- the node -----------------------------------------------------------------------------------------------


def options(command: list[str]) -> dict[str, str]:
    return dict(word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word)


def test_the_head_listens_at_its_address_and_opens_no_dashboard() -> None:
    command = ray_command(spec(0))
    assert {"--head", "--block", "--disable-usage-stats"} <= set(command)
    found = options(command)
    assert (found["node-ip-address"], found["port"], found["labels"]) == ("10.0.0.10", "6379", "host=box-0")
    assert found["include-dashboard"] == "false" and "num-cpus" not in found and "address" not in found


def test_other_hosts_join_it_and_offer_no_cpu_to_serve() -> None:
    command = ray_command(spec(1, labels={"gpu": "big"}, resources={"orin": 1}, num_gpus=1))
    found = options(command)
    assert "--head" not in command and found["address"] == "10.0.0.10:6379"
    assert (found["num-cpus"], found["num-gpus"]) == ("0", "1")
    assert found["labels"] == "gpu=big,host=box-1" and json.loads(found["resources"]) == {"orin": 1.0}


def test_an_ipv6_head_is_bracketed() -> None:
    config = hosts(hosts=[{"name": "a", "address": "fd00::1"}, {"name": "b", "address": "fd00::2"}])
    assert spec_of(config, config.hosts[1], TOKEN).head == "[fd00::1]:6379"


def test_the_token_is_in_no_command_no_record_and_no_repr() -> None:
    told = spec(1)
    assert TOKEN not in " ".join(ray_command(told)) + repr(told) + str(told.without_token()) + shell_lines(told)


def test_a_record_is_of_one_process_and_not_of_its_number(home: Path) -> None:
    own = psutil.Process()
    folder = token_file("raymoe").parent
    folder.mkdir(parents=True)
    write_record(spec(1), Record(pid=own.pid, created_s=own.create_time(), spec={}))
    record = read_record("raymoe", "box-1")
    assert record is not None and record.process() == own
    assert Record(pid=own.pid, created_s=own.create_time() - 5, spec={}).process() is None
    assert stat.S_IMODE((folder / "box-1.json").stat().st_mode) == 0o600


def test_a_damaged_record_is_none(home: Path) -> None:
    token_file("raymoe").parent.mkdir(parents=True)
    (token_file("raymoe").parent / "box-1.json").write_text('{"pid": 1')
    assert read_record("raymoe", "box-1") is None


def test_ending_ends_the_recorded_process_with_its_children_and_no_other(home: Path) -> None:
    nested = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    ours = psutil.Popen([sys.executable, "-c", f"{nested}; time.sleep(60)"])
    other = psutil.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        while not (children := ours.children()):
            assert ours.poll() is None
        token_file("raymoe").parent.mkdir(parents=True)
        write_record(spec(1), Record(pid=ours.pid, created_s=ours.create_time(), spec={}))
        farewell = Farewell(cluster="raymoe", host="box-1", timeout_s=0.2)
        assert stop_node(farewell) == "ended"
        assert not ours.is_running() and not children[0].is_running() and other.is_running()
        assert stop_node(farewell) == "did not run"
    finally:
        other.kill()
        other.wait()


def test_a_head_that_nobody_is_at_is_named() -> None:
    config = hosts(hosts=[{"name": "a", "address": "10.0.0.1"}, {"name": "b", "address": "10.0.0.2"}], port=1025)
    told = spec_of(config, config.hosts[1], TOKEN).model_copy(update={"head": "127.0.0.1:1025"})
    with pytest.raises(StartError, match=r"does not reach the head at 127\.0\.0\.1:1025 within 5 s .*firewall"):
        reach_head(told)


# --- asking -------------------------------------------------------------------------------------------------


def test_the_token_is_made_once_and_only_its_owner_reads_it(home: Path) -> None:
    token = make_token("lab")
    assert len(token) == 64 and make_token("lab") == token
    assert stat.S_IMODE(token_file("lab").stat().st_mode) == 0o600
    write_whole(token_file("lab"), "another\n")
    assert make_token("lab") == "another"


def test_an_answer_is_found_among_a_shells_greetings() -> None:
    answer = answer_in('Welcome to box-1!\n{"did": "started", "error": ""}\nlast login: {today}\n')
    assert answer is not None and answer.did == "started"
    assert answer_in("command not found\n") is None


def fake_host(home: Path, script: str) -> str:
    """A run_on whose hosts do as a script of Python says; ``host`` and ``verb`` are set."""
    file = home / "host.py"
    file.write_text(f"import sys, json\nhost, verb = sys.argv[1], sys.argv[4]\nline = sys.stdin.readline()\n{script}\n")
    return f"{sys.executable} {file} {{host}} {{command}}"


def test_the_head_is_started_first_and_ended_last(home: Path) -> None:
    script = 'print(json.dumps({"did": verb})); open(host + verb, "w").write(line)'
    config = hosts(run_on=fake_host(home, f"import os; os.chdir({str(home)!r}); {script}"))
    said: list[tuple[str, str]] = []
    up(config, lambda host, did: said.append((host, did)))
    down(config, lambda host, did: said.append((host, did)))
    assert said == [("box-0", "start"), ("box-1", "start"), ("box-1", "stop"), ("box-0", "stop")]
    told = NodeSpec.model_validate_json((home / "box-1start").read_text())
    assert told.token == make_token("raymoe") and told.host == config.hosts[1] and not told.is_head


def test_every_host_that_fails_is_named_with_what_it_said_and_the_others_start(home: Path) -> None:
    script = (
        'if host == "box-1": print("kex_exchange: connection refused", file=sys.stderr); sys.exit(255)\n'
        'print(json.dumps({"error": "Ray ended with status 1"} if host == "box-2" else {"did": "started"}))'
    )
    more = [{"name": f"box-{i}", "address": f"10.0.0.1{i}"} for i in range(4)]
    config = hosts(hosts=more, run_on=fake_host(home, script))
    said: list[str] = []
    with pytest.raises(StartError) as caught:
        up(config, lambda host, did: said.append(host))
    assert said == ["box-0", "box-3"]
    assert "box-1: `" in str(caught.value) and "ended with status 255: kex_exchange: connection refused" in str(
        caught.value
    )
    assert "box-2: Ray ended with status 1" in str(caught.value)
    assert make_token("raymoe") not in str(caught.value)


def test_without_a_head_nothing_else_is_started(home: Path) -> None:
    script = 'print(json.dumps({"error": "no"} if host == "box-0" else {"did": "started"}))'
    said: list[str] = []
    with pytest.raises(StartError, match="box-0: no"):
        up(hosts(run_on=fake_host(home, script)), lambda host, did: said.append(host))
    assert said == []


def test_a_command_that_is_not_there_is_named() -> None:
    with pytest.raises(StartError, match=r"box-0: can't run `no-such-shell box-0 raymoe node start`.*see run_on"):
        up(hosts(run_on="no-such-shell {host} {command}"), lambda host, did: None)


def test_a_host_that_never_answers_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymoe.hosts.remote.GRACE_S", 0.2)
    config = hosts(run_on=fake_host(home, "import time; time.sleep(60)"), timeout_s=0.2)
    with pytest.raises(StartError, match=r"box-0: no answer within 0\.4 s .*is the machine up\?"):
        up(config, lambda host, did: None)


def test_the_environment_is_what_a_shell_reads(home: Path) -> None:
    told = spec(1)
    assert f"export RAY_ADDRESS='{told.head}'\n" in shell_lines(told)
    assert f"export RAY_AUTH_TOKEN_PATH='{home}/.raymoe/raymoe/token'\n" in shell_lines(told)
    assert os.environ.get("RAY_AUTH_MODE") != "token"
