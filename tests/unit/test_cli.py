"""The command line: help that reads well, tables and JSON that agree, errors in one line with an exit code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import raymoe
from raymoe import cli, predicting
from raymoe.config import EMBEDDED_MODEL, ClusterConfig
from raymoe.engine.request import Chunk, Usage
from raymoe.engine.tune import TunePoint, choose
from raymoe.errors import CheckpointError, ExpertUnavailableError, StartError
from raymoe.observe import terminal
from raymoe.observe.stats import ClusterStats, DeviceStats, EngineStats, PredictorStats
from raymoe.types import Routing
from tests.toy_models import save_toy

COMMANDS = (
    "serve",
    "generate",
    "calibrate",
    "tune",
    "predictor",
    "trace",
    "plan",
    "probe",
    "record",
    "simulate",
    "inspect",
    "chat",
    "keys",
    "status",
    "synth",
    "version",
)


def run(*arguments: str, **options: Any) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, arguments, **options)


def error_of(result: Result) -> str:
    """The one line on standard error."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and result.stderr.strip().endswith(lines[0])
    assert "Traceback" not in result.output
    return lines[0].removeprefix("Error: ")


# --- help -----------------------------------------------------------------------------------------------


def test_help_names_every_command_and_says_what_it_does() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "Serve a Mixture-of-Experts language model over a Ray cluster of small, bounded devices" in result.stdout
    for command in COMMANDS:
        assert f" {command} " in result.stdout


def test_no_command_shows_the_help() -> None:
    assert "Usage:" in run().output


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("serve", ["CONFIG", "--host", "127.0.0.1", "--port", "8000", "--name", "raymoe", "--chat", "Ctrl-C"]),
        ("generate", ["PROMPT", "--config", "--max-tokens", "--temperature", "--quality"]),
        ("calibrate", ["MODEL", "--output", "-o", "[required]", "--text", "itself says at temperature", "2048"]),
        ("tune", ["CONFIG", "--tpot-ms", "--text", "--tokens", "512", "--json", "policy importance", "exit code is 1"]),
        ("predictor", ["eval", "Measure a predictor's recall"]),
        ("trace", ["CONFIG", "--output", "-o", "[required]", "--tokens", "--png"]),
        ("plan", ["MODEL", "--cluster", "--tpot-ms", "--prompt-tokens", "--json", "exit code is 1"]),
        ("probe", ["--output", "-o", "--listen", "--peer", "--json", "this machine"]),
        ("record", ["CONFIG", "--output", "-o", "[required]", "--tokens", "256", "--temperature"]),
        ("simulate", ["TRACE", "--cluster", "[required]", "--policy", "--steps", "--like", "--drafts", "--json"]),
        ("inspect", ["PATH", "--json", "Reads headers only"]),
        ("status", ["--name", "--json"]),
        ("synth", ["OUT", "--like", "qwen3_moe", "--size", "1GB", "--seed", "no tokenizer"]),
        ("version", []),
    ],
)
def test_help_of_a_command_shows_its_options_and_defaults(command: str, words: list[str]) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert all(word in result.stdout for word in words)
    assert run(command, "-h").stdout == result.stdout


def test_help_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from raymoe.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "sys.exit(len({'torch', 'ray', 'transformers', 'zmq'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_version_lists_what_it_stands_on() -> None:
    lines = dict(line.split(" ", 1) for line in run("version").stdout.splitlines())
    assert lines["raymoe"] == raymoe.__version__
    assert {"ray", "torch", "transformers", "python"} <= set(lines)


# --- inspect --------------------------------------------------------------------------------------------


def test_inspect_describes_the_embedded_model() -> None:
    facts = json.loads(run("inspect", "--json").stdout)
    expert_bytes = 3 * 256 * 64 * 2
    assert facts["path"] == str(EMBEDDED_MODEL)
    assert (facts["model_type"], facts["architecture"]) == ("qwen2_moe", "Qwen2MoeForCausalLM")
    assert (facts["dtype"], facts["top_k"]) == ("bfloat16", 4)
    assert (facts["moe_layers"], facts["experts_per_layer"], facts["experts"]) == (8, 32, 256)
    assert (facts["expert_bytes"], facts["routed_bytes"]) == (expert_bytes, 256 * expert_bytes)
    assert facts["total_bytes"] == facts["trunk_bytes"] + facts["routed_bytes"]
    assert [(item["bytes"], item["experts"]) for item in facts["budgets"]] == [
        (expert_bytes, 1),
        (4 * expert_bytes, 4),
        (64 * expert_bytes, 64),
        (128 * expert_bytes, 128),
        (256 * expert_bytes, 256),
    ]


def test_inspect_shows_a_table() -> None:
    result = run("inspect")
    assert result.exit_code == 0
    for words in ("qwen2_moe", "32 per layer, top-4, 256 in all", "96.0 KiB", "24.0 MiB", "6.6 MiB", "128 of 256"):
        assert words in result.stdout


def test_inspect_counts_in_the_precision_asked_for() -> None:
    facts = json.loads(run("inspect", "--json", "--dtype", "float32").stdout)
    assert (facts["dtype"], facts["expert_bytes"]) == ("float32", 3 * 256 * 64 * 4)


def test_inspect_takes_a_path(tmp_path: Path) -> None:
    facts = json.loads(run("inspect", str(save_toy("gpt_oss", tmp_path)), "--json").stdout)
    assert (facts["model_type"], facts["moe_layers"], facts["experts_per_layer"]) == ("gpt_oss", 3, 8)


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "/no/such/model"], "no such model directory: /no/such/model"),
        (["inspect", "--dtype", "int8"], '--dtype is "int8", allowed is auto, float32, bfloat16, float16'),
        (["serve", "/no/such.yaml"], "can't read the cluster config /no/such.yaml: No such file"),
        (["generate", "--config", "/no/such.yaml"], "can't read the cluster config /no/such.yaml"),
        (["generate", "--config", "a.yaml", "--model", "b"], "give either --config or --model"),
        (["generate", "--model", "/no/such/model"], "no such model directory: /no/such/model"),
        (
            ["generate", "--quality", "best"],
            """--quality is 'best'; allowed are "exact", "balanced", "fast", or an alpha""",
        ),
        (["generate", "--quality", "0.7"], "--quality is 0.7; allowed are "),
        (["synth", "out", "--size", "huge"], '--size: "huge" is not a size; write bytes as a number or as "4MiB"'),
        (["synth", "out", "--like", "llama"], 'no proportions are known for "llama"'),
        (["synth", "out", "--dtype", "auto"], '--dtype is "auto", allowed is float32, bfloat16, float16'),
        (["calibrate", "/no/such/model", "-o", "p"], "no such model directory: /no/such/model"),
        (["calibrate", "-o", "p", "--text", "/no/such"], "can't read the text /no/such: No such file"),
        (["calibrate", "-o", "p", "--tokens", "63"], "--tokens is 63; at least 64 are needed"),
        (["tune", "/no/such.yaml", "--tpot-ms", "40"], "can't read the cluster config /no/such.yaml: No such file"),
        (["tune", "c.yaml", "--tpot-ms", "0"], "--tpot-ms is 0; it must be more than 0"),
        (["tune", "c.yaml", "--tpot-ms", "nan"], "--tpot-ms is nan; it must be more than 0"),
        (["tune", "c.yaml", "--tpot-ms", "40", "--json", "/no/such/file"], "--json: there is no directory /no/such"),
        (["predictor", "eval", "/no/such/model"], "no such model directory: /no/such/model"),
        (
            ["predictor", "eval", "--kind", "oracle"],
            "--kind: Input should be 'shadow', 'gate', 'resident' or 'history'",
        ),
        (["predictor", "eval", "--bits", "5"], "--bits: Input should be 16, 8, 4, 3 or 2, not 5"),
        (["predictor", "eval", "--preset", "best"], "--preset: Input should be 'exact', 'balanced' or 'light'"),
        (["predictor", "eval", "--top-k", "0"], "--top-k: Input should be greater than or equal to 1, not 0"),
        (["predictor", "eval", "--skip-layers", "last"], "--skip-layers: is 'last'; allowed is how many layers, or"),
        (["predictor", "eval", "--kind", "gate", "--top-k", "2"], 'top_k is of kind "shadow", not "gate"'),
        (
            ["predictor", "eval", "--kv-align-every", "-1"],
            "--kv-align-every: Input should be greater than or equal to 0, not -1",
        ),
        (["predictor", "eval", "--token-align-every", "-2"], "--token-align-every: Input should be greater than or"),
        (["predictor", "eval", "--dtype", "int8"], "--dtype: Input should be 'auto', 'float32', 'bfloat16' or"),
        (["predictor", "eval", "--length", "31"], "--length is 31; at least 32 are needed, for the first tokens are"),
        (["predictor", "eval", "--tokens", "63"], "--tokens is 63; at least 64 are needed"),
        (["predictor", "eval", "--text", "/no/such"], "can't read the text /no/such: No such file"),
        (["predictor", "eval", "--json", "/no/such/file"], "--json: there is no directory /no/such"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in error_of(result)
    assert result.stdout == ""


def test_a_wrong_field_is_named_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("devices:\n- name: a\n  slotmemory: 1MiB\n")
    result = run("serve", str(file))
    assert result.exit_code == 2
    assert f"{file}: devices.0.slotmemory: no such field" in error_of(result)


@pytest.mark.parametrize(("error", "code"), [(StartError("no"), 1), (ExpertUnavailableError("no"), 1)])
def test_other_errors_exit_with_one(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "describe_checkpoint", fail)
    result = run("inspect")
    assert (result.exit_code, error_of(result)) == (code, "no")


def test_messages_of_several_lines_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise CheckpointError("first line\n  second [red]line[/red]")

    monkeypatch.setattr(cli, "describe_checkpoint", fail)
    assert error_of(run("inspect")) == "first line second [red]line[/red]"


def test_debug_shows_the_traceback() -> None:
    result = run("--debug", "inspect", "/no/such/model")
    assert isinstance(result.exception, CheckpointError)


def test_faults_of_ours_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "describe_checkpoint", fail)
    assert isinstance(run("inspect").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["synth"],
        ["inspect", "--jsn"],
        ["serv"],
        ["serve", "x", "--port", "0"],
        ["calibrate"],
        ["tune", "x"],
        ["predictor", "evaluate"],
        ["predictor", "eval", "--ahead", "0"],
        ["predictor", "eval", "--bits", "few"],
    ],
)
def test_wrong_usage_exits_with_two(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


# --- synth ----------------------------------------------------------------------------------------------


def test_synth_writes_a_checkpoint_that_inspect_reads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("synth", str(out), "--like", "mixtral", "--size", "8MB")
    assert result.exit_code == 0
    assert f"{out}: mixtral, " in result.stdout and "4 layers x 8 experts, top-2" in result.stdout
    facts = json.loads(run("inspect", str(out), "--json").stdout)
    assert (facts["model_type"], facts["moe_layers"], facts["top_k"]) == ("mixtral", 4, 2)
    assert 7e6 < facts["total_bytes"] <= 8e6


def test_synth_tells_its_stages_in_a_log(tmp_path: Path) -> None:
    lines = run("synth", str(tmp_path / "out"), "--size", "8MB").stderr.splitlines()
    assert lines == ["loading raymoe", "choosing sizes", "writing model.safetensors", "done"]


# --- predictor eval -------------------------------------------------------------------------------------


def test_help_of_predictor_eval_shows_its_options_and_defaults() -> None:
    result = run("predictor", "eval", "--help")
    assert result.exit_code == 0
    for words in ("MODEL", "--kind", "shadow", "--bits", "--token-align-every", "--text", "4096", "512", "--json"):
        assert words in result.stdout


@pytest.mark.parametrize("kind", ["shadow", "gate", "history"])
def test_predictor_eval_measures_recall(kind: str, tmp_path: Path) -> None:
    model, file = save_toy("mixtral", tmp_path / "toy"), tmp_path / "recall.json"
    arguments = ["--kind", kind, "--tokens", "64", "--length", "32", "--dtype", "float32", "--json", str(file)]
    result = run("predictor", "eval", str(model), *arguments)
    assert result.exit_code == 0
    facts = json.loads(file.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert (facts["kind"], facts["bits"], facts["model"], facts["tokens"]) == (kind, 8, "toy", 8 * 24)
    assert 0 < facts["recall"] <= 1 and facts["interval"] >= 0
    assert f"{kind}: recall {facts['recall']:.2%}" in result.stdout
    assert list(facts["by_output_index"]) == ["1-24"] and len(facts["by_layer"]) == 3
    assert (facts["by_layer"][0] is None) == (kind == "gate")
    assert (facts["agreement"] is None) == (kind != "shadow")
    assert (facts["bytes_per_token"] > 0) == (kind == "shadow")
    assert kind != "shadow" or facts["recall"] > 0.8


def test_predictor_eval_measures_a_cheaper_shadow(tmp_path: Path) -> None:
    model, file = save_toy("mixtral", tmp_path / "toy"), tmp_path / "recall.json"
    arguments = ["--tokens", "64", "--length", "32", "--dtype", "float32", "--json", str(file)]
    cheaper = ["--preset", "light", "--top-k", "1", "--skip-layers", "[0,2]"]
    assert run("predictor", "eval", str(model), *arguments, *cheaper).exit_code == 0
    facts = json.loads(file.read_text())
    assert (facts["preset"], facts["top_k"], facts["skip_layers"]) == ("light", 1, [0, 2])
    assert facts["by_layer"][0] > 0.95, "the first router sees what the model's sees"
    assert 0 < facts["by_layer"][1] < facts["by_layer"][0]


def test_predictor_eval_of_a_text_tells_no_agreement(tmp_path: Path) -> None:
    text, file = tmp_path / "text", tmp_path / "recall.json"
    text.write_text("It is a truth universally acknowledged, that a single man needs a wife. " * 20)
    arguments = ["--kind", "history", "--tokens", "64", "--length", "32", "--text", str(text), "--json", str(file)]
    assert run("predictor", "eval", *arguments).exit_code == 0
    facts = json.loads(file.read_text())
    assert facts["agreement"] is None and facts["tokens"] == 192 and 0 < facts["recall"] < 1


def test_what_is_not_a_number_is_null_in_json() -> None:
    facts = {"recall": 0.5, "interval": float("nan"), "by_output_index": {"1-8": float("nan")}, "by_layer": [None, 1.0]}
    assert predicting.without_nan(facts) == facts | {"interval": None, "by_output_index": {"1-8": None}}


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["--kind", "resident"], None, "--kind resident forecasts from the slots of a device"),
        (["--text", "text"], "Too short.", "fewer than --length 512: give more text, or less length"),
        (["--text", "text"], " ", "is empty"),
        (["--text", "text"], b"\xff\xfe", "is not a text file"),
    ],
)
def test_predictor_eval_refuses_what_can_not_be_measured(
    arguments: list[str], text: str | bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("text").write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run("predictor", "eval", *arguments)
    assert result.exit_code == 2
    assert message in error_of(result)


def test_predictor_eval_needs_a_tokenizer_for_text(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("word " * 200)
    result = run("predictor", "eval", str(save_toy("mixtral", tmp_path / "toy")), "--text", str(text))
    assert result.exit_code == 2
    assert "--text needs a tokenizer, and the model has none" in error_of(result)


# --- calibrate and tune ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("Too short.", "tokens; at least 64 are needed"),
        (b"\xff\xfe", "is not a text file"),
    ],
)
def test_text_that_cannot_be_used_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run("calibrate", "-o", str(tmp_path / "p"), "--text", str(file))
    assert result.exit_code == 2
    assert message in error_of(result)
    assert list(tmp_path.iterdir()) == [file]


def test_calibrate_writes_a_profile_and_shows_its_layers(tmp_path: Path) -> None:
    output = tmp_path / "p.safetensors"
    result = run("calibrate", str(save_toy("qwen3_moe", tmp_path / "toy")), "-o", str(output), "--tokens", "300")
    assert result.exit_code == 0
    assert "qwen3_moe, 300 tokens" in result.stdout and f"wrote {output}" in result.stdout
    assert [line.split()[:2] for line in result.stdout.splitlines() if line.strip()[:1].isdigit()] == [
        ["0", "8"],
        ["1", "8"],
    ]
    assert result.stderr.splitlines()[-3:] == [f"calibrating: {done} of 300 tokens" for done in (0, 150, 300)]
    assert output.exists()


def cluster_file(directory: Path, **scheduling: Any) -> Path:
    """A toy on one local device with slots for some of its experts."""
    model = directory / "toy"
    if not model.exists():
        save_toy("qwen3_moe", model)
    file = directory / "cluster.yaml"
    device = {"name": "cpu-0", "transport": "local", "slot_memory": 8 * 3 * 32 * 16 * 4}
    file.write_text(json.dumps({"model": {"path": str(model)}, "devices": [device], "scheduling": scheduling}))
    return file


def test_tune_names_an_alpha_within_the_budget(tmp_path: Path) -> None:
    config, figures = cluster_file(tmp_path, policy="importance", alpha_max=0.25), tmp_path / "t.json"
    result = run("tune", str(config), "--tpot-ms", "10000", "--tokens", "64", "--json", str(figures))
    assert result.exit_code == 0
    assert "63 tokens for each alpha" in result.stdout
    assert "The smallest alpha within 10000 ms per token is 0 (predicted: " in result.stdout
    assert result.stdout.endswith("scheduling:\n  policy: importance\n  alpha: 0\n")
    facts = json.loads(figures.read_text())
    assert [point["alpha"] for point in facts["points"]] == [0, 0.1, 0.2, 0.25]
    assert (facts["model"], facts["tokens"], facts["budget_s"], facts["alpha"]) == ("toy", 63, 10.0, 0.0)


def test_tune_says_that_no_alpha_meets_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        TunePoint(
            alpha=alpha,
            tpot_s=tpot_s,
            perplexity=4.0,
            perplexity_ratio=ratio,
            top1_agreement=0.9,
            routing=Routing(substituted=1),
        )
        for alpha, tpot_s, ratio in ((0.0, 0.06, 1.0), (0.25, 0.05, 1.001))
    ]
    monkeypatch.setattr("raymoe.engine.tune.tune", lambda *_arguments: choose(points, 0.04, 0.25))
    config = cluster_file(tmp_path, policy="importance", alpha_max=0.25)
    result = run("tune", str(config), "--tpot-ms", "40", "--tokens", "64")
    assert result.exit_code == 1
    assert "No alpha up to 0.25 meets 40 ms per token" in result.stdout
    assert "The fastest measured is alpha 0.25: 50.00 ms, perplexity +0.10%" in result.stdout


@pytest.mark.parametrize(
    ("scheduling", "message"),
    [
        ({}, 'scheduling.policy is "on_demand", which never substitutes an expert'),
        (
            {"policy": "importance", "similarity": "output", "profile": "/no/such"},
            "scheduling.profile: can't read the profile /no/such: no such file",
        ),
    ],
)
def test_tune_refuses_what_can_not_be_tuned(scheduling: dict[str, Any], message: str, tmp_path: Path) -> None:
    result = run("tune", str(cluster_file(tmp_path, **scheduling)), "--tpot-ms", "40", "--tokens", "64")
    assert result.exit_code == 2
    assert message in error_of(result)


def test_tune_refuses_a_profile_of_another_model(tmp_path: Path) -> None:
    profile = tmp_path / "p.safetensors"
    other = save_toy("qwen3_moe", tmp_path / "other", seed=1)
    assert run("calibrate", str(other), "-o", str(profile), "--tokens", "64").exit_code == 0
    config = cluster_file(tmp_path, policy="importance", similarity="output", profile=str(profile))
    result = run("tune", str(config), "--tpot-ms", "40", "--tokens", "64")
    assert result.exit_code == 2
    assert f"scheduling.profile: the profile {profile} was made for other weights" in error_of(result)


# --- generate -------------------------------------------------------------------------------------------


class FakeMoe:
    """Stands in for a running model; notes what it was asked."""

    asked: tuple[Any, dict[str, Any]]
    cluster: ClusterConfig
    routing = Routing(hits=3, misses=1, bytes_loaded=2048)

    def __enter__(self) -> "FakeMoe":
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def stream(self, prompt: Any, **options: Any) -> list[Chunk]:
        self.asked = (prompt, options)
        usage = Usage(prompt_tokens=3, completion_tokens=2)
        last = Chunk(text=" time", token_ids=(2,), finish_reason="length", usage=usage, routing=self.routing)
        return [Chunk(text="upon a", token_ids=(1,)), last]


@pytest.fixture
def moe(monkeypatch: pytest.MonkeyPatch) -> FakeMoe:
    fake = FakeMoe()

    def launch(cluster: ClusterConfig, **_options: Any) -> FakeMoe:
        fake.cluster = cluster
        return fake

    monkeypatch.setattr(raymoe, "launch", launch, raising=False)
    return fake


def test_generate_streams_text_and_tells_the_cost_apart(moe: FakeMoe) -> None:
    result = run("generate", "Once", "--max-tokens", "2", "--temperature", "0", "--seed", "5")
    assert result.exit_code == 0
    assert result.stdout == "upon a time\n"
    assert "2 tokens in " in result.stderr and "75.0% of experts were resident, 2.0 KiB loaded" in result.stderr
    assert moe.asked == ("Once", {"max_tokens": 2, "temperature": 0.0, "seed": 5, "quality": None})


@pytest.mark.parametrize(("text", "quality"), [("exact", "exact"), ("fast", "fast"), ("0.3", 0.3), ("0", 0.0)])
def test_generate_asks_for_a_quality(moe: FakeMoe, text: str, quality: Any) -> None:
    run("generate", "Once", "--quality", text)
    assert moe.asked[1]["quality"] == quality


def test_generate_tells_what_was_substituted(moe: FakeMoe) -> None:
    moe.routing = Routing(hits=3, misses=1, decisions=2, substituted=1, replaced_mass=0.5)
    assert "0 B loaded, 25.0% substituted (25.0% of gate mass)" in run("generate", "Once").stderr


def test_generate_uses_one_local_cpu_and_the_embedded_model_by_default(moe: FakeMoe) -> None:
    run("generate")
    assert [(device.kind, device.transport) for device in moe.cluster.devices] == [("cpu", "local")]
    assert moe.cluster.model.path is None


def test_generate_takes_a_model_a_chat_message_or_standard_input(moe: FakeMoe) -> None:
    run("generate", "Hello", "--chat", "--model", "/models/x")
    assert moe.asked[0] == [{"role": "user", "content": "Hello"}]
    assert moe.cluster.model.path == "/models/x"
    run("generate", "-", input="from a pipe")
    assert moe.asked[0] == "from a pipe"


# --- output ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (98_304, "96.0 KiB"),
        (1 << 20, "1.0 MiB"),
        (3 << 40, "3.0 TiB"),
    ],
)
def test_bytes_read_well(count: int, text: str) -> None:
    assert terminal.format_bytes(count) == text


def device_stats(name: str, **changes: Any) -> DeviceStats:
    values: dict[str, Any] = {
        "name": name, "kind": "cpu", "transport": "zmq", "state": "healthy", "node": "n", "pid": 4242,
        "emulated_link": False,
        "slot_budget_bytes": 1 << 20, "peak_slot_bytes": 1 << 20, "host_bytes": 0, "owned": 128, "resident": 10,
        "resident_experts": (), "calls": 1, "hits": 3, "misses": 1, "loads": 1, "bytes_loaded": 98_304, "evictions": 0,
        "prefetches": 0, "prefetches_refused": 0, "hosted": 0, "prefetches_late": 0,
    }  # fmt: skip
    return DeviceStats(**values | changes)


def test_status_shows_every_device_and_marks_emulation(capsys: pytest.CaptureFixture[str]) -> None:
    devices = {
        "a": device_stats("a", emulated_link=True),
        "b": device_stats("b", slot_budget_bytes=None, state="down"),
    }
    terminal.show_status(ClusterStats(app="demo", devices=devices, replication=2))
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("demo", "2 owner(s) per expert", "emulated", "down", "10/128", "75.0%", "96.0 KiB", "4242"):
        assert words in shown


def engine_stats(**changes: Any) -> EngineStats:
    values: dict[str, Any] = {
        "model": "m", "architecture": "a", "dtype": "float32", "running": 0, "waiting": 0, "finished": 2, "failed": 0,
        "prompt_tokens": 9, "completion_tokens": 1234, "kv_bytes": 0, "kv_budget_bytes": None, "hits": 800,
        "misses": 200, "hosted": 0, "substituted": 125, "substituted_gate_mass": 0.034, "loads": 9, "bytes_loaded": 1,
        "alpha": 0.2625, "decode_s": 1.0, "steps": 9,
    }  # fmt: skip
    return EngineStats(**values | changes)


def test_status_shows_alpha_and_what_the_answers_cost(capsys: pytest.CaptureFixture[str]) -> None:
    stats = ClusterStats(app="demo", devices={"a": device_stats("a")}, engine=engine_stats(), policy="importance")
    terminal.show_status(stats)
    shown = " ".join(capsys.readouterr().out.split())
    assert "policy importance (alpha 0.263)" in shown
    assert "2 answers, 1,234 tokens; 80.0% of experts were resident, 12.5% substituted (3.4% of gate mass)" in shown
    assert "refused" not in shown


def test_status_tells_settings_that_were_refused(capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_stats(refused_settings="user_config: scheduling: alpha: is [2]; allowed is 0 to 1")
    terminal.show_status(ClusterStats(app="demo", devices={}, engine=engine))
    shown = " ".join(capsys.readouterr().out.split())
    assert "New settings were refused: user_config: scheduling: alpha: is [2]; allowed is 0 to 1" in shown


def test_status_shows_how_the_shadow_is(capsys: pytest.CaptureFixture[str]) -> None:
    shadow = PredictorStats(
        kind="shadow", state="healthy", pid=77, nbytes=3 << 20, steps=1200, wasted=31, guesses=9, right=8
    )
    terminal.show_status(ClusterStats(app="demo", devices={}, engine=engine_stats(recall=0.987), predictor=shadow))
    shown = " ".join(capsys.readouterr().out.split())
    assert "Predictor: shadow, healthy, recall 98.7%, 1,200 steps (31 wasted), 3.0 MiB, PID 77" in shown


def test_status_says_why_the_shadow_is_down(capsys: pytest.CaptureFixture[str]) -> None:
    shadow = PredictorStats(kind="shadow", state="down", reason='predictor: no "cuda:7"\n on this [node]')
    terminal.show_status(ClusterStats(app="demo", devices={}, predictor=shadow))
    assert 'Predictor: shadow, down, predictor: no "cuda:7" on this [node]' in capsys.readouterr().out


def test_status_without_a_predictor_says_nothing_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_status(ClusterStats(app="demo", devices={}, engine=engine_stats()))
    assert "Predictor" not in capsys.readouterr().out


def test_status_in_json_has_the_rates() -> None:
    stats = ClusterStats(app="demo", devices={"a": device_stats("a")}, engine=engine_stats()).as_dict()
    assert (stats["devices"]["a"]["hit_rate"], stats["engine"]["hit_rate"]) == (0.75, 0.8)
    assert stats["engine"]["substituted_share"] == 0.125


class Answer:
    """An HTTP response of server-sent events."""

    def __init__(self, *lines: str) -> None:
        self.lines = [line.encode() for line in lines]

    def __enter__(self) -> list[bytes]:
        return self.lines

    def __exit__(self, *_error: object) -> None:
        pass


def test_the_first_chat_streams_its_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[Any] = []

    def urlopen(request: Any, timeout: float) -> Answer:
        sent.append((request.full_url, json.loads(request.data)))
        piece = 'data: {"choices": [{"delta": {"content": "%s"}}]}\n'
        return Answer(piece % "Hel", "\n", piece % "lo", 'data: {"choices": []}\n', "data: [DONE]\n")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    cli.stream_chat("http://127.0.0.1:1", "tiny", "Hi")
    assert capsys.readouterr().out == "> Hi\nHello\n"
    url, body = sent[0]
    assert url == "http://127.0.0.1:1/v1/chat/completions"
    assert (body["model"], body["stream"], body["messages"]) == ("tiny", True, [{"role": "user", "content": "Hi"}])


def test_a_failing_first_chat_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    event = 'data: {"error": {"message": "worker edge-0 is gone"}}\n'
    monkeypatch.setattr("urllib.request.urlopen", lambda _request, timeout: Answer(event, "data: [DONE]\n"))
    with pytest.raises(StartError, match="the chat request failed: worker edge-0 is gone"):
        cli.stream_chat("http://127.0.0.1:1", "tiny", "Hi")


def test_a_server_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_request: Any, timeout: float) -> Answer:
        raise ConnectionRefusedError("connection refused")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(StartError, match="the chat request failed: connection refused"):
        cli.stream_chat("http://127.0.0.1:1", "tiny", "Hi")


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [("0.0.0.0", None, True), ("::", None, True), ("127.0.0.1", None, False), ("0.0.0.0", "keys.yaml", False)],
)
def test_an_open_door_is_warned_of(
    host: str, keys: str | None, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAYMOE_API_KEYS", raising=False)
    cli.warn_of_open_door(ClusterConfig.parse({"serving": {"keys_file": keys}}), host)
    assert ("WITHOUT API KEYS" in capsys.readouterr().err) == warned
    monkeypatch.setenv("RAYMOE_API_KEYS", "{a: {sha256: x}}")
    cli.warn_of_open_door(ClusterConfig.parse({}), host)
    assert capsys.readouterr().err == ""
