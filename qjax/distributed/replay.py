"""What one engine does, done by another: the calls of an engine as events, and back.

An engine is a state machine: of the same calls in the same order comes the same, in every process,
down to the collectives that its steps run. So nothing but the calls travels.
"""

import contextlib
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from qjax.engine.engine import Engine
from qjax.engine.request import Request
from qjax.engine.sampling_params import SamplingParams
from qjax.engine.speculation import SpeculativeConfig
from qjax.errors import DistributedError, QjaxError
from qjax.params import Params


class Recorder:
    """Sends each call of each engine of this process, before it is carried out.

    Args:
      params: the model that the other processes have, too.
      send: takes what `Replay.carry_out` takes.
    """

    def __init__(self, params: Params, send: Callable[..., None]):
        self._params = params
        self._send = send
        self._numbers: weakref.WeakKeyDictionary[Engine, int] = weakref.WeakKeyDictionary()
        self._made = 0
        self._gone: deque[int] = deque()

    def start(self) -> None:
        """Records all engines that are made from here on."""
        Engine.journal = self._record

    @staticmethod
    def stop() -> None:
        Engine.journal = None

    def _record(self, engine: Engine, call: str, *arguments: Any) -> None:
        if engine.params is not self._params:
            raise DistributedError(
                "the model of this engine is not the one that lead() was given, and the other "
                "processes have only that."
            )
        # What is collected may be so at any moment, also while something is being sent.
        while self._gone:
            self._send(self._gone.popleft(), "drop")
        if call == "make":
            self._made += 1
            self._numbers[engine] = self._made
            weakref.finalize(engine, self._gone.append, self._made)
        elif engine not in self._numbers:
            raise DistributedError("the other processes do not have an engine made before lead().")
        if call == "add":
            prompt_ids, params, told = arguments
            arguments = [int(token) for token in prompt_ids], encode(params), told
        self._send(self._numbers[engine], call, *arguments)


class Replay:
    """Makes the same calls of engines as another process.

    Args:
      params: this process's part of the same model.
    """

    def __init__(self, params: Params):
        self._params = params
        self._engines: dict[int, Engine] = {}
        self._requests: dict[int, dict[int, Request]] = {}

    def carry_out(self, number: int, call: str, *arguments: Any) -> None:
        """One call of engine `number`, as `Recorder` sends it.

        Raises DistributedError where this process has come to other tokens.
        """
        if call == "drop":
            self._engines.pop(number, None)
            self._requests.pop(number, None)
            return
        if call == "make":
            options = dict(arguments[0])
            if options["speculative"] is not None:
                options["speculative"] = SpeculativeConfig.of(options["speculative"])
            with contextlib.suppress(QjaxError):  # process 0 has it too, and tells its caller
                self._engines[number] = Engine(self._params, **options)
            self._requests[number] = {}
            return
        if number not in self._engines:
            raise DistributedError("this process cannot make the engine that process 0 made.")
        engine, requests = self._engines[number], self._requests[number]
        if call == "add":
            prompt_ids, params, told = arguments
            request = engine.add(tuple(prompt_ids), decode(params), **told)
            requests[request.number] = request
        elif call == "abort":
            engine.abort(requests.pop(arguments[0]))
        else:
            if engine.digest != arguments[0]:
                raise DistributedError(
                    "this process has come to other tokens than process 0: are the files of the "
                    "model, qjax and jax the same here?"
                )
            for request in engine.step():
                if request.finish_reason is not None:
                    del requests[request.number]


def encode(params: SamplingParams) -> dict[str, Any]:
    """SamplingParams as JSON holds them."""
    fields = asdict(params)
    if params.logit_bias is not None:
        fields["logit_bias"] = list(params.logit_bias.items())  # JSON's keys are strings
    return fields


def decode(fields: dict[str, Any]) -> SamplingParams:
    """What `encode` made, back."""
    bias = fields["logit_bias"]
    return SamplingParams.of(**fields | {"logit_bias": None if bias is None else dict(bias)})
