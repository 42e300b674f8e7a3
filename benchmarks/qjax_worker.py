"""qjax as a worker: whole requests through its engine, the choice of each token included.

python qjax_worker.py FILE NUMERICS
"""

import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from worker import serve

import qjax
from qjax.api import engine_for
from qjax.engine.engine import Engine
from qjax.engine.sampling_params import SamplingParams


class Model:
    """One model; one engine at a time, made for one test."""

    def __init__(self, path: str, numerics: str):
        self._params = qjax.load(path)
        self._numerics = numerics
        self._run: Callable[[], float] = lambda: 0.0

    def info(self) -> dict[str, str]:
        """What is measured."""
        version = f"qjax {qjax.__version__}, jax {jax.__version__}"
        return {"version": version, "numerics": self._numerics}

    def prepare_prompt(self, length: int) -> dict:
        """Makes ready to measure a prompt, to its first new token."""
        engine, drawn, sampling = self._engine(1, length, 1)

        def run() -> float:
            (prompt,) = drawn()  # another one each time: the cache remembers those that it has read
            start = time.perf_counter()
            engine.add(prompt, sampling)
            while engine.busy:
                engine.step()
            return length / (time.perf_counter() - start)

        return self._warm(run)

    def prepare_decode(self, batch: int, prompt: int, generate: int) -> dict:
        """Makes ready to measure decoding of `batch` sequences, from first token to last."""
        engine, drawn, sampling = self._engine(batch, prompt, generate + 1)

        def run() -> float:
            requests = [engine.add(ids, sampling) for ids in drawn()]
            while not all(request.output_ids for request in requests):
                engine.step()
            done = sum(len(request.output_ids) for request in requests)
            start = time.perf_counter()
            while engine.busy:
                engine.step()
            return (batch * (generate + 1) - done) / (time.perf_counter() - start)

        return self._warm(run)

    def measure(self) -> float:
        """Tokens/s of one run of what was prepared last."""
        return self._run()

    def _engine(
        self, batch: int, length: int, max_tokens: int
    ) -> tuple[Engine, Callable[[], list[tuple[int, ...]]], SamplingParams]:
        """An engine, and what draws prompts for it."""
        random = np.random.default_rng(0)

        def drawn() -> list[tuple[int, ...]]:
            ids = random.integers(0, self._params.config.vocab_size, (batch, length))
            return [tuple(row) for row in ids.tolist()]

        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        engine = engine_for(self._params, drawn(), sampling, numerics=self._numerics)
        return engine, drawn, sampling

    def _warm(self, run: Callable[[], float]) -> dict:
        run()  # compiles
        run()
        self._run = run
        return {}


def main() -> None:
    model = Model(*sys.argv[1:])
    serve(
        {
            "info": model.info,
            "prepare_prompt": model.prepare_prompt,
            "prepare_decode": model.prepare_decode,
            "measure": model.measure,
        }
    )


if __name__ == "__main__":
    main()
