"""One simulation: a trace, a setting, a policy. Deterministic, and of nothing but simulated time."""

from dataclasses import replace
from typing import Literal

import numpy as np

from raymoe.config import SchedulingConfig
from raymoe.errors import ConfigError
from raymoe.simulation.joint import Joint
from raymoe.simulation.loop import EventLoop
from raymoe.simulation.main_node import SimMain
from raymoe.simulation.policies import Cacheless, Caching, Policy
from raymoe.simulation.prompt import first_token_s
from raymoe.simulation.result import DeviceUse, SimResult
from raymoe.simulation.setting import Setting
from raymoe.simulation.shadow import Routes, SimShadow
from raymoe.simulation.synthetic import foretold
from raymoe.simulation.trace import RoutingTrace

SimPolicy = Literal["all_resident", "on_demand", "importance", "on_demand_shadow", "joint"]
POLICIES: tuple[SimPolicy, ...] = ("all_resident", "on_demand", "importance", "on_demand_shadow", "joint")
SCORED = ("importance", "joint")  # policies that decide by gate scores
FORETOLD = ("on_demand_shadow", "joint")  # policies that a shadow tells what comes
MOST_SPARE = 1 << 20  # slots of a worker; more than experts of any model
WARM_STEPS = 8  # left out of all figures: slots begin empty, the shadow gets into its stride


def simulate(
    trace: RoutingTrace,
    setting: Setting,
    policy: SimPolicy,
    *,
    steps: int | None = None,
    alpha: float = 0.25,
    spare_slots: int | None = None,
    drafts: int = 0,
    prompt_tokens: int = 16,
    scheduling: SchedulingConfig | None = None,
    resident: bool = False,
) -> SimResult:
    """Decode ``steps`` positions; a shorter trace is repeated.

    Args:
        steps: as many as the trace has, where omitted.
        alpha: of policies importance and joint.
        spare_slots: of each worker, beyond those that experts pass through; None: slots are those of the setting.
        drafts: most tokens of the shadow that one pass verifies beside the one that is known.
        scheduling: further settings of the policies that cache or keep.
        resident: under on_demand_shadow: everything is ready at the workers that would load it.

    Raises:
        ConfigError: a policy that the trace or the setting has nothing for.
        CapacityError: experts that don't fit into the workers' memory.
    """
    wanted = trace.steps if steps is None else steps
    check(trace, setting, policy, wanted, drafts, spare_slots)
    if spare_slots is not None:
        setting = setting.with_spare_slots(spare_slots)
    loop, routes = EventLoop(), Routes(trace)
    rules = (scheduling or SchedulingConfig()).changed({"alpha": alpha, "alpha_max": max(alpha, 0.5)})
    rules = rules.model_copy(update={"policy": policy})
    chosen = _at_work(policy, loop, setting, rules, resident=resident)
    shadow = None
    if policy in FORETOLD and setting.shadow is not None and not resident:
        scored = policy == "joint"
        shadow = SimShadow(loop, setting.shadow, routes, chosen.foretell, drafts, tells_scores=scored)
    total = wanted + WARM_STEPS
    main = SimMain(loop, setting, chosen, routes, shadow, steps=total, drafts=drafts)
    main.begin_pass()
    loop.run(lambda: bool(main.ends) and main.ends[-1][1] >= WARM_STEPS)
    before = _Mark(loop, main, chosen, shadow)
    finished = loop.run(lambda: main.is_over)
    assert finished, "the main node waits for nothing that would come"
    after = _Mark(loop, main, chosen, shadow)
    ttft_s = first_token_s(
        trace,
        setting,
        prompt_tokens,
        fleet=None if isinstance(chosen, Caching) else chosen.fleet,
        primary=chosen.primary if isinstance(chosen, Caching) else None,
        resident=resident or policy == "all_resident",
    )
    found = _result(before, after, setting, policy, ttft_s, has_shadow=shadow is not None)
    return replace(found, fits=chosen.fits) if isinstance(chosen, Caching) else found


def _at_work(
    policy: SimPolicy, loop: EventLoop, setting: Setting, rules: SchedulingConfig, *, resident: bool
) -> Cacheless | Caching | Joint:
    if policy == "joint":
        return Joint(loop, setting, rules)
    if policy == "on_demand_shadow":
        return Cacheless(loop, setting, resident=resident)
    return Caching(loop, setting, rules)


def check(
    trace: RoutingTrace, setting: Setting, policy: str, steps: int, drafts: int, spare_slots: int | None = None
) -> None:
    """Raise ConfigError for what can't be simulated."""
    if policy not in POLICIES:
        raise ConfigError(f'--policy is "{policy}"; allowed are {", ".join(POLICIES)}')
    if steps < 1:
        raise ConfigError(f"--steps is {steps}; at least 1 is needed")
    if not 0 <= drafts <= 8:
        raise ConfigError(f"--drafts is {drafts}; allowed is 0 to 8")
    if spare_slots is not None and not 0 <= spare_slots <= MOST_SPARE:
        raise ConfigError(f"--spare-slots is {spare_slots}; allowed is 0 to {MOST_SPARE:,}")
    if drafts and (policy not in FORETOLD or setting.shadow is None):
        raise ConfigError(
            "--drafts come from a shadow: name its device in the devices file, with on_demand_shadow or joint"
        )
    if policy in SCORED and trace.scores_NLE is None:
        raise ConfigError(
            f"policy {policy} needs gate scores, and the trace has none: its model routes by no rule that is known"
        )
    if not setting.workers:
        raise ConfigError("no device serves experts")
    if trace.shape != setting.shape:
        raise ConfigError(f"the trace is of {trace.shape.name}, the setting of {setting.shape.name}")


def with_forecasts(trace: RoutingTrace, recall: float, agreement: float, seed: int = 0) -> RoutingTrace:
    """The trace with what a shadow of this recall would have named, where it was recorded without one."""
    if trace.foretold_NLK is not None:
        return trace
    random = np.random.default_rng(seed)
    return replace(
        trace,
        foretold_NLK=foretold(trace.chosen_NLK, trace.shape.experts, recall, random),
        guessed_N=random.random(trace.steps) < agreement,
    )


def with_agreement(trace: RoutingTrace, agreement: float, seed: int = 0) -> RoutingTrace:
    """The trace with so many tokens guessed, each for itself: so often drafts are right.

    Raises ConfigError for a share that is none.
    """
    if not 0 <= agreement <= 1:
        raise ConfigError(f"--acceptance is {agreement:g}; allowed is 0 to 1")
    return replace(trace, guessed_N=np.random.default_rng(seed).random(trace.steps) < agreement)


class _Mark:
    """All totals at one moment."""

    def __init__(self, loop: EventLoop, main: SimMain, policy: Policy, shadow: SimShadow | None) -> None:
        links = [worker.link for worker in policy.workers]
        self.now_s, self.events = loop.now_s, loop.events
        self.position = main.ends[-1][1] if main.ends else 0
        self.passes = len(main.ends)
        self.main = np.array([main.busy_s, main.waited_s, main.loaded_s, main.sent.busy_s, main.received.busy_s])
        self.pairs = np.array([main.pairs, main.hits, main.hosted, policy.tally.planned, policy.tally.substituted])
        self.drafts = np.array([main.drafted, main.accepted])
        self.shadow_s = 0.0 if shadow is None else shadow.busy_s
        self.compute_s = np.array([worker.busy_s for worker in policy.workers])
        self.link_s = np.array([0.0 if link is None else link.used_s() for link in links])
        self.loads = np.array([0 if link is None else link.loads for link in links])


def _result(
    before: _Mark, after: _Mark, setting: Setting, policy: str, ttft_s: float, *, has_shadow: bool
) -> SimResult:
    took_s, tokens = after.now_s - before.now_s, after.position - before.position
    busy_s, waited_s, loaded_s, sent_s, received_s = (after.main - before.main).tolist()
    pairs, hits, hosted, planned, substituted = (after.pairs - before.pairs).tolist()
    drafted, accepted = (after.drafts - before.drafts).tolist()
    loads_W, link_W = after.loads - before.loads, (after.link_s - before.link_s) / took_s
    compute_W = (after.compute_s - before.compute_s) / took_s
    loads = int(loads_W.sum())
    rate_W = np.array([1 / w.load_s if w.load_s and w.slots is not None else 0.0 for w in setting.workers])
    moved_s = float((link_W * rate_W).sum() / rate_W.sum()) * took_s / tokens if rate_W.any() else 0.0
    return SimResult(
        policy=policy,
        model=setting.shape.name,
        workers=len(setting.workers),
        steps=tokens,
        tpot_s=took_s / tokens,
        ttft_s=ttft_s,
        hit_rate=hits / pairs,
        planned=planned / pairs if has_shadow else None,
        accepted=accepted / drafted if drafted else None,
        tokens_per_pass=tokens / (after.passes - before.passes),
        substituted=substituted / pairs,
        hosted=hosted / pairs,
        loads_per_token=loads / tokens,
        bytes_per_token=loads / tokens * setting.shape.expert_bytes,
        parts={
            "main": busy_s / tokens,
            "loads": loaded_s / tokens,
            "experts": (waited_s - loaded_s) / tokens,
        },
        main=busy_s / took_s,
        shadow=min(1.0, (after.shadow_s - before.shadow_s) / took_s) if has_shadow else None,
        sent=sent_s / took_s,
        received=received_s / took_s,
        devices=tuple(
            DeviceUse(name=str(name), link=float(link), compute=float(compute), loads=int(count))
            for name, link, compute, count in zip(setting.names, link_W, compute_W, loads_W, strict=True)
        ),
        roofline_s=max((busy_s + waited_s - loaded_s) / tokens, moved_s),
        events_per_step=(after.events - before.events) / tokens,
        emulated=setting.emulated,
    )
