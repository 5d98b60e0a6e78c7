"""``raymoe plan``: what to expect of a model on devices that need not exist. torch comes in only when it runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from raymoe.errors import CheckpointError, ConfigError
from raymoe.observe import terminal

if TYPE_CHECKING:
    import torch

    from raymoe.planning.cluster import DevicesFile
    from raymoe.planning.facts import ModelFacts
    from raymoe.planning.plan import Plan, PolicyPlan
    from raymoe.types import LayerSize

CONFIG_FILE = "config.json"
SHOWN_DEVICES = 16  # rows of the table; a cluster of a thousand is summed up


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory with config.json, with or without weights, or a hub id.")
    ],
    cluster: Annotated[Path, typer.Option("--cluster", metavar="FILE", help="The devices, in YAML.")],
    tpot_ms: Annotated[float | None, typer.Option("--tpot-ms", help="Milliseconds per output token to meet.")] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=100_000, help="Length of the prompt for the time to first token.")
    ] = 128,
    dtype: Annotated[str, typer.Option(help="Precision: auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    k8s: Annotated[
        bool, typer.Option("--k8s", help="Print what its pods ask for, as a kustomize patch of the RayService in k8s/.")
    ] = False,
) -> None:
    """Predict whether a model fits devices, how fast each policy is, what holds it up, and what to add.

    Reads headers of the weights, or config.json alone where there are none yet; of a hub id nothing else is fetched.
    Devices are named from a table of known hardware or measured by `raymoe probe`. The exit code is 1 where the model
    does not fit, or no policy meets --tpot-ms.
    """
    if k8s and (as_json or tpot_ms is not None):
        raise ConfigError("--k8s prints a patch and nothing else; leave out --json and --tpot-ms")
    if tpot_ms is not None and not tpot_ms > 0:
        raise ConfigError(f"--tpot-ms is {tpot_ms:g}; it must be more than 0")
    from raymoe.config import ModelConfig
    from raymoe.planning.cluster import DevicesFile
    from raymoe.planning.layout import cluster_of
    from raymoe.planning.plan import as_dict, make_plan
    from raymoe.strict import parse_options

    parse_options(ModelConfig, {"dtype": dtype})
    devices = DevicesFile.load(cluster)
    with terminal.Progress() as progress:
        progress.stage("reading the model")
        facts = facts_of(model, dtype)
        progress.stage("planning")
        if k8s:
            progress.stop()
            typer.echo(patch(model, cluster, dtype, facts, devices), nl=False)
            return
        made = make_plan(facts, cluster_of(devices), prompt_tokens=prompt_tokens)
    budget_s = None if tpot_ms is None else tpot_ms / 1e3
    if as_json:
        met = None if budget_s is None else [one.policy for one in made.within(budget_s)]
        typer.echo(json.dumps(as_dict(made) | {"tpot_budget_s": budget_s, "within_budget": met}, indent=2))
    else:
        show(made)
        typer.echo(conclusion(made, budget_s))
    if made.problems or (budget_s is not None and not made.within(budget_s)):
        raise typer.Exit(1)


# --- the model ------------------------------------------------------------------------------------------


def facts_of(source: str, dtype: str) -> "ModelFacts":
    """A model's sizes, from the headers of its weights where they all are there, else from its configuration.

    Raises CheckpointError that says what was found, what was expected and what to do.
    """
    from raymoe.checkpoint.opening import (
        build_skeleton,
        find_class,
        open_checkpoint,
        read_config,
        served_dtype,
        text_part,
        top_k_of,
    )
    from raymoe.planning.facts import ModelFacts

    path = configuration_directory(source)
    if has_weights(path):
        checkpoint = open_checkpoint(path, dtype)
        config, skeleton, served = checkpoint.config, checkpoint.skeleton, checkpoint.dtype
        sizes, trunk_bytes, known_from = checkpoint.sizes(), checkpoint.trunk_bytes, "headers"
        checkpoint.close()
    else:
        config = read_config(path, trust_remote_code=False)
        model_class = find_class(path, config, trust_remote_code=False)
        config = text_part(config, model_class)
        served = served_dtype(dtype, config, {})
        skeleton = build_skeleton(model_class, config, served)
        sizes, trunk_bytes = sizes_of(path, skeleton, served, top_k_of(config))
        known_from = "configuration"
    text = config.get_text_config(decoder=True)
    table_module: Any = skeleton.get_input_embeddings()
    table = table_module.weight.numel() * served.itemsize
    head: Any = skeleton.get_output_embeddings()
    head_bytes = table if head is None else head.weight.numel() * served.itemsize
    tied = bool(getattr(text, "tie_word_embeddings", False)) or head is None
    return ModelFacts(
        name=(path if Path(source).expanduser().exists() else Path(source)).resolve().name,
        model_type=config.model_type,
        dtype=str(served).removeprefix("torch."),
        known_from=known_from,
        element_bytes=served.itemsize,
        sizes=sizes,
        hidden=int(text.hidden_size),
        trunk_bytes=trunk_bytes,
        head_bytes=head_bytes,
        table_bytes=0 if tied else table,
        kv_bytes=kv_bytes(text, served.itemsize),
    )


def configuration_directory(source: str) -> Path:
    """The local directory of a model's config.json; of a hub id only that file is fetched."""
    from raymoe.checkpoint.opening import resolve

    path = Path(source).expanduser()
    if path.name == CONFIG_FILE and path.is_file():
        return path.parent
    if path.exists() or source.count("/") != 1:
        return resolve(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG_FILE]))
    except Exception as error:  # the hub client raises many kinds; all mean "not to be had"
        raise CheckpointError(
            f'"{source}" is neither a local directory nor could its {CONFIG_FILE} be fetched from the hub '
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
        ) from error


def has_weights(path: Path) -> bool:
    """Whether all files of the weights are there."""
    from raymoe.checkpoint.opening import INDEX_FILE

    index = path / INDEX_FILE
    if not index.exists():
        return any(path.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return True  # opening it says what is wrong
    return all((path / str(name)).exists() for name in names)


def sizes_of(path: Path, skeleton: Any, served: "torch.dtype", top_k: int) -> tuple[tuple["LayerSize", ...], int]:
    """The MoE layers of a model without weights, and the bytes of all the rest."""
    from torch import Size

    from raymoe.checkpoint.architectures import experts_modules, supported_model_types
    from raymoe.checkpoint.layout import expert_parameters
    from raymoe.types import LayerSize

    modules = experts_modules(skeleton)
    if not modules:
        raise CheckpointError(
            f"{path} ({skeleton.config.model_type}) has no routed experts behind transformers' experts interface; "
            f"supported: {', '.join(supported_model_types())}"
        )
    sizes, routed = [], set()
    for module_path, module in modules:
        shapes = expert_parameters(module_path, module)
        routed |= set(shapes)
        expert_bytes = sum(Size(shape).numel() for shape in shapes.values()) * served.itemsize
        experts = module.num_experts
        sizes.append(LayerSize(experts=experts, expert_bytes=expert_bytes, top_k=min(top_k, experts)))
    head = skeleton.get_output_embeddings()
    tied = getattr(skeleton.config.get_text_config(decoder=True), "tie_word_embeddings", False) and head is not None
    elements = sum(value.numel() for name, value in skeleton.state_dict().items() if name not in routed)
    return tuple(sizes), (elements - (head.weight.numel() if tied else 0)) * served.itemsize


def kv_bytes(text: Any, element_bytes: int) -> int:
    """Keys and values of one token in all layers of attention, as transformers' caches hold them."""
    count = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * count
    own = getattr(text, "per_layer_config", None)  # of architectures whose layers differ
    layers = [text if own is None else own[index] for index in range(count)]
    attending = ["linear" not in kind and "attention" in kind for kind in kinds]
    return sum(kv_width(layer) for layer, attends in zip(layers, attending, strict=False) if attends) * element_bytes


def kv_width(layer: Any) -> int:
    """Values that one layer of attention keeps of a token."""
    heads = layer.num_attention_heads
    if getattr(layer, "kv_lora_rank", None):
        return heads * (layer.qk_nope_head_dim + layer.qk_rope_head_dim + layer.v_head_dim)
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    return 2 * (getattr(layer, "num_key_value_heads", None) or heads) * head_dim


# --- output ---------------------------------------------------------------------------------------------


def patch(model: str, cluster: Path, dtype: str, facts: "ModelFacts", devices: "DevicesFile") -> str:
    """What ``--k8s`` prints. Raises ConfigError where the model does not fit."""
    from raymoe.planning.layout import cluster_of, problems
    from raymoe.planning.pods import kustomize_patch, pod_groups

    found = problems(facts, cluster_of(devices))
    if found:
        raise ConfigError(f"{cluster}: it does not fit: {'; '.join(found)}")
    precision = "" if dtype == "auto" else f" --dtype {dtype}"
    head = f"# Made by: raymoe plan {model} --cluster {cluster}{precision} --k8s\n"
    return head + yaml.safe_dump(kustomize_patch(pod_groups(facts, devices)), sort_keys=False)


def show(made: "Plan") -> None:
    """Tables of a plan."""
    from rich.console import Console

    facts, console = made.facts, Console()
    emulated = " (emulated figures among them)" if any(room.device.emulated for room in made.rooms) else ""
    console.print(
        f"{facts.name}: {facts.model_type}, {facts.dtype}, {facts.layers} MoE layers of {facts.experts:g} experts, "
        f"top-{facts.top_k}, {terminal.format_bytes(facts.expert_bytes)} each; trunk "
        f"{terminal.format_bytes(facts.trunk_bytes)}, experts {terminal.format_bytes(facts.routed_bytes)} "
        f"(from its {facts.known_from})",
        markup=False,
        soft_wrap=True,
    )
    console.print(devices_table(made, emulated))
    if made.policies:
        console.print(policies_table(made))
    if made.changes:
        table = terminal.plain_table("What to add, each alone", ("Change", "Fastest policy", "TPOT", "Saves"))
        for change in made.changes:
            table.add_row(change.what, change.policy, milliseconds(change.tpot_s), f"{change.gain:.0%}")
        console.print(table)


def devices_table(made: "Plan", emulated: str) -> Any:
    """Who has which part."""
    columns = ("Device", "Hardware", "Holds", "Trunk and shadow", "Slots", "Kept by joint", "Experts owned")
    table = terminal.plain_table(f"Devices{emulated}", columns)
    cluster = made.cluster
    for room in made.rooms[:SHOWN_DEVICES]:
        device = room.device
        holds = [
            name
            for name, is_there in (
                ("trunk", device.name == cluster.trunk_name),
                ("shadow", device.name == cluster.shadow_name),
                ("experts", device.serves_experts),
            )
            if is_there
        ]
        slots = room.slot_bytes // made.facts.expert_bytes
        keeps = None if made.keeps is None or device.is_unified else made.keeps.get(device.name)
        owned = "" if made.owned is None or not device.serves_experts else f"{made.owned.get(device.name, 0):,}"
        table.add_row(
            device.name,
            device.hardware or "",
            ", ".join(holds),
            terminal.format_bytes(room.fixed_bytes) if room.fixed_bytes else "",
            "resident" if device.is_unified and slots else f"{slots:,}" if slots else "",
            "" if keeps is None else f"{keeps:,}",
            owned,
        )
    if len(made.rooms) > SHOWN_DEVICES:
        table.add_row(f"and {len(made.rooms) - SHOWN_DEVICES:,} more", *[""] * (len(columns) - 1))
    return table


def policies_table(made: "Plan") -> Any:
    """What to expect of each policy."""
    columns = ("Policy", "TPOT", "Tokens/s", "TTFT", "Roofline", "Held up by")
    title = f"Expected, {made.prompt_tokens} prompt tokens; {made.resident:.0%} of the experts fit into slots"
    table = terminal.plain_table(title, columns)
    for one in made.policies:
        if one.tpot_s is None or one.ttft_s is None or one.of_floor is None:
            table.add_row(one.policy, "no room", *[""] * (len(columns) - 2))
            continue
        times = milliseconds(one.tpot_s), f"{1 / one.tpot_s:.2f}", milliseconds(one.ttft_s)
        table.add_row(one.policy, *times, f"{one.of_floor:.0%}", one.bottleneck or "nothing")
    return table


def how(one: "PolicyPlan") -> str:
    """What a policy is run with, in words; nothing where there is nothing to choose."""
    chosen = [f"group_size {one.choice.group_size}"] * bool(one.choice.group_size)
    chosen += [f"up to {one.choice.drafts} drafts"] * bool(one.choice.drafts)
    return f" ({', '.join(chosen)})" if chosen else ""


def conclusion(made: "Plan", budget_s: float | None) -> str:
    """What follows, in words."""
    if made.problems:
        lines = ["It does not fit:", *(f"- {problem}" for problem in made.problems)]
        if made.devices_lacking is not None:
            last = made.cluster.workers[-1]
            lines.append(f'{made.devices_lacking} more like "{last.name}" would do.')
        return "\n".join(lines)
    best = made.best
    assert best is not None and best.tpot_s is not None, "a model that fits can be run by some policy"
    text = f"Fastest: {best.policy}{how(best)}, {milliseconds(best.tpot_s)} per token."
    if budget_s is None:
        return text
    met = made.within(budget_s)
    if met:
        return f"{text} Within {milliseconds(budget_s)}: {', '.join(one.policy for one in met)}."
    enough = [change.what for change in made.changes if change.tpot_s <= budget_s]
    way = f"this alone would do: {'; or '.join(enough)}" if enough else "no single change of those above is enough"
    return f"{text} No policy meets {milliseconds(budget_s)}; {way}."


def milliseconds(seconds: float) -> str:
    """For people."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.2f} s"
