"""The simulated main node: runs the trunk layer by layer, asks workers, waits, and knows the next token.

With drafts it reads several positions in one pass: the token that it knows and those that the shadow has guessed by
then. As many of them as were right are accepted, and each of a layer's experts is asked for once per pass.

T rows of a pass, K experts per token, E experts.
"""

import numpy as np

from raymoe.simulation.loop import EventLoop, Lane
from raymoe.simulation.policies import Ask, Caching, Policy, Routed
from raymoe.simulation.setting import Setting
from raymoe.simulation.shadow import Routes, SimShadow
from raymoe.simulation.worker import SimAnswer


class SimMain:
    """Decodes until it has read ``steps`` positions.

    Attributes:
        busy_s: seconds of computing so far; waited_s: in which it waited for workers, loaded_s: of these, in which the
            last of them waited for loads.
        sent, received: its network port.
        ends: when each pass ended, and how many positions had been read then.
        drafted, accepted: tokens that were read before they were known, and those that were right.
        pairs, hits, hosted: (row, expert) pairs as workers counted them.
    """

    def __init__(
        self,
        loop: EventLoop,
        setting: Setting,
        policy: Policy,
        routes: Routes,
        shadow: SimShadow | None,
        *,
        steps: int,
        drafts: int = 0,
    ) -> None:
        self.busy_s = self.waited_s = self.loaded_s = 0.0
        self.sent, self.received = Lane(), Lane()
        self.ends: list[tuple[float, int]] = []
        self.drafted = self.accepted = 0
        self.pairs = self.hits = self.hosted = 0
        self._loop, self._setting, self._policy, self._routes = loop, setting, policy, routes
        self._shadow, self._steps, self._most = shadow, steps, drafts
        self._start = self._told = 0
        self._rows: tuple[int, ...] = ()
        self._gain = 1
        self._layer = 0
        self._asked_s = self._latest_s = self._longest_s = 0.0
        self._missing = self._ahead = 0

    @property
    def is_over(self) -> bool:
        """Whether all positions were read."""
        return self._start >= self._steps

    def begin_pass(self) -> None:
        """Read the token that is known, and the drafts there are."""
        start, routes, steps = self._start, self._routes, self._routes.trace.steps
        drafts = self._drafts(start)
        right = 0
        while right < drafts and routes.guessed(start + 1 + right):
            right += 1
        self.drafted += drafts
        self.accepted += right
        self._gain = 1 + right
        self._rows = tuple(
            (start + row) % steps if row <= right else routes.elsewhere(start + row) for row in range(1 + drafts)
        )
        if self._shadow is not None:
            # keys and values of what was read since, and the token
            network = self._setting.network
            nbytes = (start - self._told) * self._setting.shape.kv_bytes
            arrives_s = self.sent.take(self._loop.now_s, network.takes_s(nbytes)) + network.latency_s
            self._told = start
            self._loop.at(arrives_s, self._shadow.told, start, 1 + drafts)
        self._layer = 0
        self._compute(self._setting.main.layer_s)

    def _drafts(self, start: int) -> int:
        if self._shadow is None or not self._most:
            return 0
        return self._shadow.drafts(start, self._most, self._loop.now_s - self._setting.network.latency_s)

    def _compute(self, takes_s: float) -> None:
        takes_s += (len(self._rows) - 1) * self._setting.main.row_s
        self._loop.at(self._loop.now_s + takes_s, self._routed, takes_s)

    def _routed(self, took_s: float) -> None:
        """The router has chosen."""
        self.busy_s += took_s
        trace, layer = self._routes.trace, self._layer
        rows = list(self._rows)
        scores_TE = None if trace.scores_NLE is None else trace.scores_NLE[rows, layer].astype(np.float32)
        chosen_TK = trace.chosen_NLK[rows, layer]
        calls = self._policy.ask(
            Routed(start=self._start, layer=layer, positions_T=self._rows, chosen_TK=chosen_TK, scores_TE=scores_TE)
        )
        self._asked_s, self._latest_s, self._longest_s, self._missing = self._loop.now_s, 0.0, 0.0, len(calls)
        for call in calls:
            self._loop.at(self._send(call), self._begin, call)
        if isinstance(self._policy, Caching):
            self._foretell(self._policy, layer)

    def _send(self, call: Ask) -> float:
        """When a call is there."""
        network = self._setting.network
        if self._setting.workers[call.worker].is_local:
            return self._loop.now_s
        takes_s = network.takes_s(call.rows * self._setting.shape.row_bytes)
        return self.sent.take(self._loop.now_s, takes_s) + network.latency_s

    def _begin(self, call: Ask) -> None:
        def answered(answer: SimAnswer) -> None:
            self._answered(call, answer)

        worker = self._policy.workers[call.worker]
        worker.call(call.layer, call.experts_P, call.rows, call.scores_E, call.step, answered)

    def _answered(self, call: Ask, answer: SimAnswer) -> None:
        network, now_s = self._setting.network, self._loop.now_s
        self._policy.answered(call.worker, answer)
        self.pairs += answer.pairs
        self.hits += answer.hits
        self.hosted += answer.hosted
        arrives_s = now_s
        if not self._setting.workers[call.worker].is_local:
            takes_s = network.takes_s(answer.pairs * self._setting.shape.row_bytes)
            arrives_s = self.received.take(now_s + network.latency_s, takes_s)
        self._latest_s = max(self._latest_s, arrives_s)
        self._longest_s = max(self._longest_s, answer.waited_s)
        self._missing -= 1
        if not self._missing:
            self._loop.at(self._latest_s, self._next)

    def _next(self) -> None:
        """All answers are there."""
        self.waited_s += self._loop.now_s - self._asked_s
        self.loaded_s += self._longest_s
        self._layer += 1
        if self._layer < self._setting.shape.layers:
            self._compute(self._setting.main.layer_s)
        else:
            self._loop.at(self._loop.now_s + self._setting.main.head_s, self._ended)

    def _ended(self) -> None:
        self.busy_s += self._setting.main.head_s
        self._start += self._gain
        self.ends.append((self._loop.now_s, self._start))
        if not self.is_over:
            self.begin_pass()

    def _foretell(self, policy: Caching, layer: int) -> None:
        """As the engine: the layer that a load begun now would be in time for, at the first one those before it too."""
        ahead = policy.ahead() if layer == 0 else self._ahead
        if layer == 0:
            self._ahead = ahead
        trace, rows = self._routes.trace, list(self._rows)
        for distance in range(1 if layer == 0 else max(1, ahead), ahead + 1):
            there = layer + distance
            if there < self._setting.shape.layers and trace.scores_NLE is not None:
                scores_TE = trace.scores_NLE[rows, there].astype(np.float32)
                policy.expect(there, distance, trace.chosen_NLK[rows, there], scores_TE)
