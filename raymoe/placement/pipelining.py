"""How fast a decode step can be when experts are loaded on demand: the timing bound, and what lies beyond it.

**The pipeline** (OD-MoE). The main node takes t_M per MoE layer, then the workers of the layer's group take t_W
together, both with the messages. The group serves every n-th layer, n groups in all. Each of its workers loads c
experts for a layer (1 where the group has as many workers as the router chooses experts), t_L each, one after the
other, and evicts them when the layer is computed.

**The bound.** A worker with slots for just c experts begins to load when it has computed. Until its next layer has
to be computed the main node does n layers and the other groups n - 1. So a load is hidden as long as::

    c·t_L <= n·t_M + (n - 1)·t_W        (hidden_load_s)

**Beyond it.** A group comes back to the same point after the longer of two cycles, and n layers take that long:

- the layers themselves: n·(t_M + t_W);
- its loads: c·t_L + max(0, t_W - s·t_L). With s spare slots, the first s loads for a layer go on while the layer
  before is computed. Without any, this is c·t_L + t_W; with enough, the link never rests.

So one token takes ``layers / n · max(n·(t_M + t_W), c·t_L + max(0, t_W - s·t_L))`` plus the head: flat up to the
bound, then linear in t_L with a slope of c·layers/n. Three things come on top, all of which ``predicted_tpot_s``
follows layer by layer, since they hit some layers and not others:

- *Turn of the token.* Where n does not divide the layers, the last layer's group is soon asked again.
- *The shadow.* It has the forecast for layer l after (l + 1)·t_S. If it departs late, when the token is known, the
  first layers' loads are exposed: layer 0 waits for t_S + c·t_L instead of t_M. If it runs ahead it keeps its lead.
  Either way the main node can't be faster than the shadow, layers·t_S per token.
- *Misses.* If an expert that a layer needs was not forecast, it is loaded after the router has spoken: the layer takes
  one load more, and so does the link. They enter by their mean, as a delay of ``missed`` loads in every layer.

No allowance is made for jitter, so measured times are somewhat longer near the bound, where any delay is exposed.
"""

from dataclasses import dataclass

from raymoe.placement.grouping import group_count

STEPS = 64  # decode steps to get into the stride, and as many to average; leads and lags of a few steps die away in it


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePipeline:
    """What the time per output token depends on.

    Attributes:
        layers: MoE layers.
        groups: groups of workers that take turns.
        main_s: t_M, seconds that the main node takes per MoE layer.
        worker_s: t_W, seconds that a group takes to compute a layer.
        load_s: t_L, seconds of one load.
        loads: c, loads per worker and layer.
        spare_slots: s, slots of a worker beside the ``loads`` that a layer needs.
        head_s: seconds per token outside of the layers, until the next token is known.
        shadow_s: t_S, seconds that the shadow takes per layer; None: there are no forecasts, and loads begin when
            the router has chosen.
        steps_ahead: how many steps the shadow may begin before their token is known; 0: it departs late. That its
            tokens turn out to be the right ones is taken for granted.
        missed: share of (step, layer) pairs that need an expert that was not forecast, see ``missed_share``.
    """

    layers: int
    groups: int
    main_s: float
    worker_s: float
    load_s: float
    loads: int = 1
    spare_slots: int = 0
    head_s: float = 0.0
    shadow_s: float | None = 0.0
    steps_ahead: int = 1
    missed: float = 0.0


def hidden_load_s(workers: int, group_size: int, main_s: float, worker_s: float) -> float:
    """The longest time of a layer's loads that costs nothing: t_max = n·t_M + (n - 1)·t_W with n groups."""
    groups = group_count(workers, group_size)
    return groups * main_s + (groups - 1) * worker_s


def missed_share(recall: float, top_k: int) -> float:
    """Share of (step, layer) pairs in which some expert was not forecast, if errors are independent of each other.

    Errors that come together, as they do, make it less: down to ``1 - recall``, where all experts of a layer are
    wrong at once. Measure it if you can.
    """
    return 1.0 - recall**top_k


def predicted_tpot_s(pipeline: DecodePipeline) -> float:
    """Seconds per output token in steady state, by following every layer of some steps."""
    flow = _Flow(pipeline)
    for _ in range(STEPS):
        flow.step()
    begin_s = flow.now_s
    for _ in range(STEPS):
        flow.step()
    return (flow.now_s - begin_s) / STEPS


class _Flow:
    """The clocks of main node, shadow and groups, moved on step by step. Each is the time at which it is free.

    ``done_s`` are, for each group, the times at which its layers were computed and their slots became free.
    """

    def __init__(self, pipeline: DecodePipeline) -> None:
        self.pipeline = pipeline
        self.now_s = 0.0
        self.shadow_s = 0.0
        self.link_s = [0.0] * pipeline.groups
        self.done_s: list[list[float]] = [[] for _ in range(pipeline.groups)]
        self.known_s = [0.0] * (pipeline.steps_ahead + 1)  # when the tokens of the last steps were known

    def step(self) -> None:
        """One token through all layers."""
        pipeline = self.pipeline
        departed_s = self.shadow_s = max(self.shadow_s, self.known_s[-1 - pipeline.steps_ahead])
        for layer in range(pipeline.layers):
            group = layer % pipeline.groups
            asked_s = self.now_s + pipeline.main_s
            ordered_s = asked_s
            if pipeline.shadow_s is not None:
                ordered_s = departed_s + (layer + 1) * pipeline.shadow_s
            loaded_s = self._load(group, ordered_s)
            missed_s = pipeline.missed * pipeline.load_s
            self.link_s[group] += missed_s
            self.now_s = max(asked_s, loaded_s) + missed_s + pipeline.worker_s
            self.done_s[group].append(self.now_s)
        self.shadow_s = departed_s + pipeline.layers * (pipeline.shadow_s or 0.0)
        self.now_s += pipeline.head_s
        self.known_s = [*self.known_s[1:], self.now_s]

    def _load(self, group: int, ordered_s: float) -> float:
        """When a layer's loads are done. Each waits for the order, for the link and for a slot."""
        pipeline, done_s = self.pipeline, self.done_s[group]
        slots = pipeline.loads + pipeline.spare_slots
        for load in range(pipeline.loads):
            before = (len(done_s) * pipeline.loads + load - slots) // pipeline.loads  # the layer whose slot it gets
            free_s = done_s[before] if before >= 0 else 0.0
            self.link_s[group] = max(self.link_s[group], ordered_s, free_s) + pipeline.load_s
        return self.link_s[group]
