"""The shadow at work: listens to the engine, runs ahead, sends orders to the workers. A plain class, one thread."""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from predictor.forecast import LayerForecast
from predictor.quantized_experts import QuantizedExperts
from predictor.shadow import RUN_AHEAD, Alignment, Guess, Rows, Shadow, Told
from predictor.shadow_model import ShadowModel
from predictor.thinning import Thinning, skipped_layers
from raymoe.checkpoint.opening import open_configured
from raymoe.config import ModelConfig, PredictorConfig
from raymoe.engine.conductor import Conductor
from raymoe.engine.sampling import Sampler
from raymoe.engine.watch import ShadowWatch
from raymoe.errors import FrameError, NotFiniteError, RequestError
from raymoe.experts.build import torch_device
from raymoe.experts.call import LoadOrder
from raymoe.model.kv import KvEntries, unpack
from raymoe.observe.trace import SHADOW, Recording, Tracer
from raymoe.placement.assignment import Fleet
from raymoe.transport.client import WorkerClient
from raymoe.transport.shadow import ShadowServer
from raymoe.transport.shadow_messages import Begin, Draft, End, News, Token
from raymoe.transport.sockets import Endpoint
from raymoe.types import DeviceName, StepId

log = logging.getLogger(__name__)

OpenClient = Callable[[], WorkerClient]
"""Connects to the workers."""

IDLE_WAIT_S = 0.1  # how often an idle shadow looks whether it should stop


class ShadowHost:
    """Feeds a shadow with the engine's news and hands its forecasts on, until stopped.

    Args:
        decides: whether it tells workers what to load; else the engine does, to which forecasts go with all scores.

    Attributes:
        failure: why it stopped, or None while it is well.
    """

    def __init__(self, model: ShadowModel, alignment: Alignment, server: ShadowServer, *, decides: bool = True) -> None:
        self.failure: BaseException | None = None
        self.shadow = Shadow(model, alignment, self._on_forecast, on_draft=self._on_draft)
        self._model = model
        self._server = server
        self._decides = decides
        self._client: WorkerClient | None = None
        self._conductor: Conductor | None = None
        self._devices: tuple[DeviceName, ...] = ()
        self._connection: tuple[OpenClient, Fleet, tuple[DeviceName, ...], tuple[DeviceName, ...]] | None = None
        self._stopping = False
        self._watch: ShadowWatch | None = None

    def trace(self, on: bool) -> Recording | None:
        """Begin to record layers and steps; or end it, which returns what was recorded. From any thread."""
        before, self._watch = self._watch, ShadowWatch(Tracer(SHADOW)) if on else None
        return None if before is None else before.tracer.recording()

    def connect(
        self, workers: Mapping[DeviceName, Endpoint], open_client: OpenClient, fleet: Fleet, names: Sequence[DeviceName]
    ) -> None:
        """Send orders to these workers from now on. From any thread; sockets are made by the host's own.

        Args:
            names: of the fleet, in its order. Those that are no ``workers`` live in the engine's process, which orders
                from them by itself.
        """
        self._connection = open_client, fleet, tuple(names), tuple(workers)

    def stop(self) -> None:
        """End the loop after the step in hand. From any thread."""
        self._stopping = True

    def run(self) -> None:
        """Work until stopped."""
        try:
            while not self._stopping:
                self._reconnect()
                self._listen(0.0)
                if not self._step():
                    self._listen(IDLE_WAIT_S)
        except BaseException as error:
            log.exception("the shadow failed")
            self.failure = error
        if self._client is not None:
            self._client.close()

    def _step(self) -> bool:
        watch = self._watch
        if watch is None:
            return self.shadow.step()
        watch.begin(self.shadow.counts)
        did = self.shadow.step()
        watch.end(self.shadow.counts, did)
        return did

    def _reconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        open_client, fleet, names, devices = connection
        before, client = self._client, open_client()

        def send(device: DeviceName, order: LoadOrder) -> None:
            if device in devices:
                client.order(device, order)

        self._client, self._devices, self._conductor = client, devices, Conductor(fleet, names, send)
        if before is not None:
            before.close()

    def _listen(self, wait_s: float) -> None:
        """Take in all that has come, waiting for the first."""
        while (news := self._server.receive(wait_s)) is not None:
            self._take(news)
            wait_s = 0.0

    def _take(self, news: News) -> None:
        if isinstance(news, Begin):
            self.shadow.begin(news.sequence, [news.tokens], self._guess(news), coming=news.coming)
        elif isinstance(news, End):
            self.shadow.end(news.sequence)
            for device in self._devices:
                assert self._client is not None, "the devices are the client's"
                self._client.forget(device, news.sequence)
        else:
            entries = self._entries(news)
            told = Told(
                position=news.step.position,
                tokens=(news.token,),
                drafts=news.drafts,
                coming=news.coming,
                entries=entries,
                start=news.start,
            )
            self.shadow.tell(news.step.sequence, told)

    def _guess(self, news: Begin) -> Guess | None:
        """Choose tokens as the engine does, so that guesses are right wherever logits are alike."""
        if news.recipe is None:
            return None
        try:
            sampler = Sampler.by(news.recipe)
        except RequestError as error:
            log.warning("a recipe that no request has was dropped: %s", error)
            return None
        prompt = list(news.tokens[: len(news.tokens) - news.first])

        def guess(step: int, logits_BV: torch.Tensor) -> Rows:
            tokens = [row[0] for row in self.shadow.tokens(news.sequence)]
            try:
                token, _ = sampler.choose(logits_BV[0], prompt, tokens[len(prompt) :], news.first + step)
            except NotFiniteError:  # the model tells whoever asked; a guess is worth nothing then
                token = 0
            return (token,)

        return guess

    def _entries(self, news: Token) -> KvEntries | None:
        """The keys and values that came along; None where none did, or they fit another model's caches."""
        if not news.count:
            return None
        try:
            return unpack(news.entries, news.count, news.dtype)
        except FrameError as error:
            log.warning("keys and values of another layout were dropped: %s", error)
            return None

    def _on_forecast(self, forecast: LayerForecast) -> None:
        watch = self._watch
        if watch is not None:
            watch.foretold(forecast)
        if not self._decides:
            self._server.send(forecast)
        elif self._conductor is not None:
            self._server.send(self._conductor.conduct(forecast))
        self._listen(0.0)  # so that a step which reads a wrong token is left at once
        if watch is not None:
            watch.ordered()

    def _on_draft(self, step: StepId, epoch: int, tokens: Rows) -> None:
        if self.shadow.alignment.drafts:
            self._server.send(Draft(step=step, epoch=epoch, token=tokens[0]))


def alignment_of(config: PredictorConfig) -> Alignment:
    """How a configured shadow follows the model."""
    return Alignment(
        token_every=config.token_align_every,
        kv_every=config.kv_align_every,
        run_ahead=RUN_AHEAD if config.run_ahead else 0,
        drafts=config.drafts,
    )


def build_shadow_model(model: ModelConfig, config: PredictorConfig) -> ShadowModel:
    """Open a checkpoint and make a shadow of it.

    Raises CheckpointError where it can't be opened, ConfigError where the device or a layer to skip is not there.
    """
    device = torch_device(config.device, "predictor")
    torch.set_num_threads(config.threads or 1)
    checkpoint = open_configured(model, "bfloat16" if config.bits == 16 else None)
    thinning = Thinning(top_k=config.top_k, skipped=skipped_layers(config.skip_layers, len(checkpoint.layers)))
    depth = (RUN_AHEAD + 1) * (config.drafts + 1) if config.run_ahead else 0  # positions of the passes in its reach
    experts = QuantizedExperts(checkpoint, config.bits, device)
    return ShadowModel(checkpoint, experts, device, depth=depth, thinning=thinning)
