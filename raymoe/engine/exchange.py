"""One layer's calls to workers: sent, waited for, and handed out again where a worker falls silent.

Mostly every worker answers, and each pair is brought by the one call that asked for it. A call whose answer is late
(``placement.patience``) makes its worker doubtful, see ``suspects``; calls to suspects, lost ones and refused ones are
handed out again among the other owners of their experts, in the middle of the layer. A suspect may still bring what it
was asked for: whoever is first does, and a later answer is dropped by its number. What nobody else owns is waited for a
short time, for the suspect to come back or for news of another owner; then ``ExpertLostError``.

P pairs of a layer, H hidden.
"""

import itertools
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch

from raymoe.engine.directory import Directory
from raymoe.engine.holdings import Holdings
from raymoe.engine.splitting import by_worker, part_of
from raymoe.engine.suspects import MUTE_S, Suspects
from raymoe.engine.workers import LocalWorker, RemoteWorkers
from raymoe.errors import ExpertLostError, ExpertUnavailableError
from raymoe.experts.call import ExpertAnswer, ExpertCall
from raymoe.experts.worker import Begun
from raymoe.placement.owners import NOBODY
from raymoe.placement.patience import Patience
from raymoe.transport.client import Received
from raymoe.types import DeviceName

LISTEN_S = 0.001  # how long answers are waited for at a time where something else is to be heard meanwhile
TICK_S = 0.02  # how long without a look whether workers live: a small part of a pause, and nothing of a core
DOUBTS = 3  # times a living worker is late, each time twice as long: then a message may be lost, and another is asked


@dataclass(slots=True, kw_only=True, eq=False)
class Asked:
    """A call under way.

    Attributes:
        worker: by its place in the directory; NOBODY where there was none to ask.
        pairs_P: whose of the layer's pairs it asks for, in its order; None: all.
        is_alone: whether its worker had nothing else to do for this layer.
        is_lost: its worker will not answer it.
        rest_P: places in the call of the pairs that nobody else was asked for; None: all.
        refused_by: workers that could not do it.
        late_s: when its worker is doubted; None before anybody has looked.
    """

    worker: int
    name: DeviceName
    call: ExpertCall
    pairs_P: np.ndarray | None
    sent_s: float
    is_alone: bool
    is_lost: bool = False
    rest_P: np.ndarray | None = None
    refused_by: frozenset[int] = frozenset()
    late_s: float | None = None
    patience_s: float = 0.0
    doubts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """An answer, when it came, and which of its pairs count; None: all."""

    asked: Asked
    answer: ExpertAnswer
    arrived_s: float
    counts_P: np.ndarray | None = None

    def put_into(self, output_PH: torch.Tensor) -> None:
        """Put what counts where it belongs."""
        answered_PH = self.answer.output_PH.to(output_PH.device)
        pairs_P = self.asked.pairs_P
        if self.counts_P is not None:
            answered_PH = answered_PH[torch.from_numpy(self.counts_P).to(output_PH.device)]
            pairs_P = self.counts_P if pairs_P is None else pairs_P[self.counts_P]
        if pairs_P is None:
            output_PH.copy_(answered_PH)
        else:
            output_PH[torch.from_numpy(pairs_P).to(output_PH.device)] = answered_PH


@dataclass(slots=True)
class _Layer:
    """What is under way for one layer of so many pairs.

    Attributes:
        busy: workers that were sent something.
        open_P: the pairs that were not brought yet; None while nothing went wrong.
    """

    pairs: int = 0
    under_way: dict[int, Asked] = field(default_factory=dict)
    busy: set[int] = field(default_factory=set)
    open_P: np.ndarray | None = None
    done: list[Answered] = field(default_factory=list)


class Exchange:
    """Calls of a layer under way. Used by one thread.

    Args:
        on_answer: told of each answer, whatever of it counts.
        catch_up: takes in news of owners, if there are any; returns workers whose connection is another one now.
        timeout_s: for all answers of a layer, whatever signs of life there are.

    Attributes:
        while_waiting: done again and again while answers are waited for; None is nothing.
        rerouted: calls that were handed out again so far.
    """

    def __init__(
        self,
        directory: Directory,
        holdings: Holdings,
        suspects: Suspects,
        *,
        local: Mapping[DeviceName, LocalWorker],
        remote: RemoteWorkers | None,
        timeout_s: float,
        on_answer: Callable[[DeviceName, ExpertAnswer], None],
        catch_up: Callable[[], Collection[DeviceName]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.while_waiting: Callable[[], None] | None = None
        self.rerouted = 0
        self._directory = directory
        self._holdings = holdings
        self._suspects = suspects
        self._local = local
        self._remote = remote
        self._timeout_s = timeout_s
        self._on_answer = on_answer
        self._catch_up = catch_up
        self._clock = clock
        self._nowhere = itertools.count(-1, -1)  # numbers of calls that could not be sent
        self._patience: dict[DeviceName, Patience] = {}
        self._layer = _Layer()

    def send(
        self,
        worker: int,
        call: ExpertCall,
        pairs_P: np.ndarray | None = None,
        before: Asked | None = None,
    ) -> None:
        """Send a call to a remote worker, or keep it where there is nobody to ask. Never waits.

        Args:
            before: the call that it takes up.
        """
        layer, now_s = self._layer, self._clock()
        name = self._directory.names[worker] if worker != NOBODY else DeviceName("")
        asked = Asked(
            worker=worker,
            name=name,
            call=call,
            pairs_P=pairs_P,
            sent_s=now_s,
            is_alone=worker not in layer.busy,
        )
        if before is not None:
            asked.refused_by = before.refused_by
            asked.doubts = before.doubts if worker == before.worker else 0
        layer.busy.add(worker)
        number = None
        if worker != NOBODY:
            assert self._remote is not None, "a device is either local or remote"
            try:
                number = self._remote.send(name, call)
            except ExpertUnavailableError as error:
                self._suspects.suspect(name, is_sure=False, why=str(error))
        if number is None:
            number, asked.is_lost = next(self._nowhere), True
        layer.under_way[number] = asked

    def done_here(self, worker: int, begun: Begun, pairs_P: np.ndarray | None = None) -> None:
        """Compute a call that has begun in this process."""
        name, start_s = self._directory.names[worker], self._clock()
        answer = self._local[name].finish(begun)
        here = Asked(worker=worker, name=name, call=begun.call, pairs_P=pairs_P, sent_s=start_s, is_alone=False)
        self._count(here, answer, self._clock())

    def clear(self) -> None:
        """Whatever is still under way is not waited for any more."""
        if self._layer.under_way or self._layer.done:
            self._layer = _Layer()

    def gather(self, pairs: int) -> list[Answered]:
        """Wait for all that was sent.

        Args:
            pairs: of the layer.

        Raises:
            ExpertLostError: nobody can be asked for an expert.
            ExpertUnavailableError: a worker fails at a call and nobody else can be asked, or an answer is overdue.
        """
        layer = self._layer
        layer.pairs = pairs
        start_s = looked_s = self._clock()
        if any(asked.is_lost for asked in layer.under_way.values()):
            self._look()
        while self._is_missing():
            wait_s = TICK_S
            if self.while_waiting is not None:
                self.while_waiting()
                wait_s = LISTEN_S
            came = self._remote.receive(wait_s, layer.under_way) if self._remote is not None else []
            for received in came:
                self._take(received)
            now_s = self._clock()
            if not came and now_s - looked_s >= TICK_S:
                looked_s = now_s
                self._look()
                if now_s - start_s > self._timeout_s:
                    self._overdue()
        done = layer.done
        self._layer = _Layer()
        return done

    def _is_missing(self) -> bool:
        layer = self._layer
        return bool(layer.under_way) and (layer.open_P is None or bool(layer.open_P.any()))

    def _take(self, received: Received) -> None:
        """A worker has answered."""
        asked = self._layer.under_way.get(received.request)
        if asked is None:  # the same answer twice
            return
        if received.answer is None:
            self._refused(asked, received.error or "no answer")
            return
        del self._layer.under_way[received.request]
        arrived_s = self._clock()
        self._count(asked, received.answer, arrived_s)
        if asked.is_alone:
            self._learn(asked, received.answer, arrived_s - asked.sent_s)

    def _learn(self, asked: Asked, answer: ExpertAnswer, took_s: float) -> None:
        """A call that was alone took so long; of a worker that was paused only some of it counts."""
        if asked.doubts:
            took_s = min(took_s, asked.patience_s)
        loads = max(1, answer.loads) if answer.misses else 0
        patience = self._patience.setdefault(asked.name, Patience())
        patience.note(took_s, answer.compute_s, len(asked.call.experts_P), loads)

    def _count(self, asked: Asked, answer: ExpertAnswer, arrived_s: float) -> None:
        """Note which of an answer's pairs were not brought by anybody yet."""
        self._on_answer(asked.name, answer)
        layer, counts_P = self._layer, None
        if layer.open_P is not None:
            places_P = places(asked)
            counts_P = np.flatnonzero(layer.open_P[places_P])
            layer.open_P[places_P] = False
        if counts_P is None or counts_P.size:
            layer.done.append(Answered(asked=asked, answer=answer, arrived_s=arrived_s, counts_P=counts_P))

    def _refused(self, asked: Asked, error: str) -> None:
        """A worker could not do it: perhaps another can."""
        call = asked.call
        asked.is_lost, asked.refused_by = True, asked.refused_by | {asked.worker}
        if error.startswith(ExpertUnavailableError.__name__):  # it does not own them all, as after a restart
            self._directory.disown(asked.worker, call.layer, np.unique(call.experts_P))
        elif (self._directory.elsewhere(call.layer, call.experts_P, asked.refused_by) == NOBODY).any():
            raise ExpertUnavailableError(f'worker "{asked.name}": {error}')
        self._hand_out_again(asked)

    # --- where something is wrong -------------------------------------------------------------------------

    def _look(self) -> None:
        """See who is silent, and hand out again what must be."""
        gone = {*self._catch_up(), *self._suspects.look()}
        now_s = self._clock()
        for asked in list(self._layer.under_way.values()):
            asked.is_lost |= asked.name in gone
            if asked.is_lost or asked.name in self._suspects.names:
                self._hand_out_again(asked)
            elif now_s > self._late_s(asked):
                self._doubt(asked, now_s)
        self._give_up(now_s)

    def _late_s(self, asked: Asked) -> float:
        if asked.late_s is None:
            call = asked.call
            ready_E = self._holdings.ready(asked.name, call.layer)
            loads = int(np.count_nonzero(~ready_E[np.unique(call.experts_P)]))
            patience = self._patience.setdefault(asked.name, Patience())
            asked.patience_s = 2**asked.doubts * patience.limit_s(len(call.experts_P), loads)
            asked.late_s = asked.sent_s + asked.patience_s
        return asked.late_s

    def _doubt(self, asked: Asked, now_s: float) -> None:
        """An answer is late."""
        self._suspects.doubt(asked.name)
        asked.doubts += 1
        asked.patience_s *= 2
        asked.late_s = now_s + asked.patience_s
        if asked.doubts == DOUBTS:
            others_P = self._directory.elsewhere(asked.call.layer, asked.call.experts_P, {asked.worker})
            if (others_P == NOBODY).any():
                asked.is_lost = True  # nobody else has them all: the same worker gets the call once more
            else:
                asked.refused_by |= {asked.worker}
                self._suspects.suspect(asked.name, is_sure=False, why="answers pings, but no call", mute_s=MUTE_S)
            self._hand_out_again(asked)

    def _hand_out_again(self, asked: Asked) -> None:
        """Ask others for what this call has not brought, as far as there are any."""
        rest_P = self._rest(asked)
        if not rest_P.size:
            return
        call = asked.call
        owner_P = self._directory.elsewhere(call.layer, call.experts_P[rest_P], asked.refused_by)
        found_P = owner_P != NOBODY
        if not found_P.any():
            return
        asked.rest_P = rest_P[~found_P]
        self.rerouted += 1
        mine_P, owner_P = rest_P[found_P], owner_P[found_P]
        for worker, part_P in by_worker(call.experts_P[mine_P], owner_P):
            self._ask_again(worker, asked, mine_P[part_P])

    def _ask_again(self, worker: int, asked: Asked, part_P: np.ndarray) -> None:
        call, pairs_P = part_of(asked.call, part_P), places(asked)[part_P]
        local = self._local.get(self._directory.names[worker])
        if local is None:
            self.send(worker, call, pairs_P, asked)
            return
        self.done_here(worker, local.begin(call), pairs_P)

    def _rest(self, asked: Asked) -> np.ndarray:
        """Places in a call of the pairs that are its alone to bring, and were not."""
        layer = self._layer
        if layer.open_P is None:
            layer.open_P = np.zeros(layer.pairs, dtype=bool)
            for other in layer.under_way.values():
                layer.open_P[places(other)] = True
        rest_P = np.arange(len(asked.call.experts_P)) if asked.rest_P is None else asked.rest_P
        asked.rest_P = rest_P[layer.open_P[places(asked)[rest_P]]]
        return asked.rest_P

    def _give_up(self, now_s: float) -> None:
        """Raise where what nobody can be asked for was waited for long enough."""
        for asked in self._layer.under_way.values():
            is_stuck = asked.is_lost or asked.name in self._suspects.names
            if is_stuck and asked.rest_P is not None and asked.rest_P.size:
                experts = np.unique(asked.call.experts_P[asked.rest_P])
                silent = self._directory.silent_owners(asked.call.layer, experts)
                if now_s > self._suspects.hope_until_s(silent):
                    raise lost(asked.call.layer, experts.tolist(), silent)

    def _overdue(self) -> NoReturn:
        late = sorted({asked.name for asked in self._layer.under_way.values() if asked.name})
        raise ExpertUnavailableError(
            f"no answer from worker {', '.join(late)} within {self._timeout_s:g} s; is its node up and reachable?"
        )


def places(asked: Asked) -> np.ndarray:
    """Among the layer's pairs, of a call's own."""
    return np.arange(len(asked.call.experts_P)) if asked.pairs_P is None else asked.pairs_P


def lost(layer: int, experts: list[int], silent: list[DeviceName]) -> ExpertLostError:
    """The error that says which experts nobody can be asked for, and why."""
    named = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
    why = f"their owner {', '.join(silent)} is silent" if silent else "no worker that is up owns them"
    return ExpertLostError(
        f"layer {layer}: experts {named} can't be reached: {why} and no other has a copy; bring the device back, add "
        "one, or raise replication",
        experts=tuple((layer, expert) for expert in experts),
        devices=tuple(silent),
    )
