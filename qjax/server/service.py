"""The model behind the server, from loading to draining, and who is using it."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

import qjax
from qjax.api import sampling_defaults
from qjax.engine.async_engine import AsyncEngine
from qjax.engine.engine import Engine
from qjax.engine.replicas import Replicas
from qjax.engine.stats import EngineStats
from qjax.params import Params
from qjax.server.errors import ApiError, invalid, queue_full, unavailable
from qjax.server.limits import Bodies
from qjax.server.metrics import Metrics

if TYPE_CHECKING:
    from qjax.server.generation import Generation

logger = logging.getLogger("qjax.server")

# Seconds that requests have to say goodbye, once they are told to.
_GOODBYE = 5.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve.

    Attributes:
      names: of the model, in requests; the first is the one in answers.
      api_keys: that open all paths but /health; none for no guard.
      max_queue: sequences that may wait; more are refused (429).
      body_seconds: within which the body of a request must arrive.
      stall_seconds: that a client may take to read a piece of a stream.
      log_prompts: whether prompts and answers are written to the log.
    """

    names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_queue: int = 1024
    body_seconds: float = 30.0
    stall_seconds: float = 30.0
    log_prompts: bool = False


class Phase(StrEnum):
    loading = "loading"
    ready = "ready"
    draining = "draining"
    failed = "failed"


@dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
      params: of one copy.
      engine: of all copies.
      max_model_len: most tokens of prompt and output.
      max_num_seqs: sequences that run at a time, on all copies.
      defaults: sampling parameters by its generation_config.json.
      quantization: of its weights: {"method", "qtype", "bits_per_weight"}.
      cache_tokens: that the caches of all copies hold.
      created: seconds since 1970.
    """

    params: Params
    engine: AsyncEngine
    max_model_len: int
    max_num_seqs: int
    defaults: dict[str, Any]
    quantization: dict[str, Any]
    cache_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, engine: Engine | Replicas) -> "Model":
        """A model whose engine is not used by anybody else."""
        engines = engine.engines if isinstance(engine, Replicas) else [engine]
        params = engines[0].params
        summary = params.summary()
        most = summary.uses[0]
        defaults = sampling_defaults(params)
        if defaults:
            logger.info("generation_config.json sets defaults", extra=defaults)
        return cls(
            params=params,
            engine=AsyncEngine(engine),
            max_model_len=engines[0].max_model_len,
            max_num_seqs=sum(each.scheduler.max_num_seqs for each in engines),
            defaults=defaults,
            quantization={
                "method": most.method or None,
                "qtype": most.qtype,
                "bits_per_weight": round(summary.total.bits_per_weight, 2),
            },
            cache_tokens=engine.stats().num_blocks * engines[0].scheduler.blocks.block_size,
        )

    @property
    def fingerprint(self) -> str:
        return f"qjax-{qjax.__version__}-{self.quantization['qtype']}"


class Service:
    """Loads the model in a thread, counts who uses it, and ends with a deadline.

    Args:
      load: makes the engine.
      settings: how to serve.

    Attributes:
      requests: that are being answered; sequences: theirs that run or wait.
      ended: set when there is nothing left to serve: after a drain, or a failure.
      error: why it failed, or None.
    """

    def __init__(self, load: Callable[[], Engine | Replicas], settings: Settings):
        self.settings = settings
        self.phase = Phase.loading
        self.error: BaseException | None = None
        self.ended = asyncio.Event()
        self.bodies = Bodies(settings.body_seconds)
        self.metrics = Metrics(settings.names[0], self.stats)
        self._load = load
        self._thread: threading.Thread | None = None
        self._model: Model | None = None
        self._generations: set[Generation] = set()
        self.sequences = 0
        self.requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self) -> None:
        """Begins to load."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._make, args=(loop,), name="load", daemon=True)
        self._thread.start()

    @property
    def loading(self) -> bool:
        """Whether the thread that loads is still at it."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def model(self) -> Model:
        """The model. Raises ApiError (503) where requests are not taken now."""
        if self.phase is Phase.ready and self._model is not None:
            return self._model
        if self.phase is Phase.loading:
            raise unavailable("the model is still loading.", retry_after=5)
        if self.phase is Phase.draining:
            raise unavailable("the server is shutting down.")
        raise unavailable("the engine has failed.")

    def stats(self) -> EngineStats | None:
        """Of the engine; None while there is none."""
        return None if self._model is None else self._model.engine.stats()

    def check_name(self, name: str | None) -> None:
        """Raises ApiError (404) for a model that is not served here."""
        if name is not None and name not in self.settings.names:
            known = ", ".join(self.settings.names)
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist; this server has {known}.",
                param="model",
                code="model_not_found",
            )

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Counts a request from its head to the end of its answer."""
        self.requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.requests -= 1
            if self.requests == 0:
                self._idle.set()

    @contextlib.contextmanager
    def admitted(self, generation: "Generation", sequences: int) -> Iterator[None]:
        """Room for the sequences of a request.

        Raises:
          ApiError: there is none now (429), or never will be (400).
        """
        most = self.model.max_num_seqs + self.settings.max_queue
        if sequences > most:
            raise invalid(
                f"n times the number of prompts must be at most {most}, got {sequences}.", "n"
            )
        if self.sequences + sequences > most:
            raise queue_full(
                f"the queue is full: at most {self.settings.max_queue} sequences may wait."
            )
        self.sequences += sequences
        self._generations.add(generation)
        try:
            yield
        finally:
            self.sequences -= sequences
            self._generations.discard(generation)

    def fail(self, error: BaseException) -> None:
        """There is no model, or there is none any more."""
        if self.phase is Phase.failed:
            return
        self.phase, self.error = Phase.failed, error
        logger.error("failed", extra={"error": f"{type(error).__name__}: {error}"})
        self.ended.set()

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, and waits for those that run; who is not through after `seconds`
        is told. Sets `ended`."""
        if self.phase is not Phase.failed:
            self.phase = Phase.draining
        logger.info("draining", extra={"requests": self.requests, "seconds": seconds})
        if not await self._idle_within(seconds):
            logger.warning("drain deadline passed", extra={"requests": self.requests})
            for generation in list(self._generations):
                generation.interrupt(unavailable("the server is shutting down."))
            self.bodies.end()
            await self._idle_within(_GOODBYE)
        self.ended.set()

    async def close(self) -> None:
        """Ends the engine's thread."""
        if self._model is not None:
            await asyncio.to_thread(self._model.engine.close)

    async def _idle_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _make(self, loop: asyncio.AbstractEventLoop) -> None:
        """Runs in a thread of its own."""
        try:
            done = partial(self._made, Model.of(self._load()))
        except BaseException as error:
            done = partial(self.fail, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            loop.call_soon_threadsafe(done)

    def _made(self, model: Model) -> None:
        self._model = model
        if self.phase is Phase.loading:
            self.phase = Phase.ready
            told = {
                "model": self.settings.names[0],
                "weights_bytes": model.params.nbytes,
                **model.quantization,
                "max_model_len": model.max_model_len,
                "max_num_seqs": model.max_num_seqs,
                "cache_tokens": model.cache_tokens,
            }
            logger.info("ready", extra={k: v for k, v in told.items() if v is not None})
