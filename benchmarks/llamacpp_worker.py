"""llama.cpp as a worker, through the low-level functions of llama-cpp-python.

It is given its best: the batch functions rather than the Python class, no sampling (tokens are
drawn beforehand, as llama-bench does), logits of the rows that need them only, and for each test
the fastest of its settings for attention and cache, found beforehand.

    python llamacpp_worker.py FILE THREADS
"""

import itertools
import sys
import time
from collections.abc import Callable

import llama_cpp as lib
import numpy as np
from worker import serve

BATCH = 512  # most tokens of one call, also in llama-bench
CELLS = 256  # the cache of a sequence comes in multiples of so many tokens


class Model:
    """One file; one context at a time, made for one test.

    Args:
      path: a GGUF file.
      threads: of prompts and of decoding.
    """

    def __init__(self, path: str, threads: int):
        lib.llama_backend_init()
        self._threads = threads
        self._model = lib.llama_model_load_from_file(
            path.encode(), lib.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(BATCH, 0, 1)
        self._context = None
        self._run: Callable[[], float] = lambda: 0.0

    def info(self) -> dict[str, str]:
        """What is measured."""
        return {
            "version": f"llama-cpp-python {lib.__version__}",
            "system": lib.llama_print_system_info().decode().strip(),
        }

    def prepare_prompt(self, length: int) -> dict[str, bool]:
        """Makes ready to measure a prompt; the settings that are fastest for it."""
        tokens = self._random(length)

        def run() -> float:
            start = self._clear()
            for first in range(0, length, BATCH):
                part = tokens[first : first + BATCH]
                self._fill(part, range(first, first + len(part)), [0] * len(part))
                self._batch.logits[len(part) - 1] = first + len(part) == length
                self._decode()
            return length / (time.perf_counter() - start)

        return self._choose(run, length, 1, unified=(False,))

    def prepare_decode(self, batch: int, prompt: int, generate: int) -> dict[str, bool]:
        """Makes ready to measure decoding of `batch` sequences."""
        tokens = self._random(batch, prompt + generate)
        sequences = range(batch)

        def run() -> float:
            self._clear()
            for row in sequences:
                self._fill(tokens[row, :prompt], range(prompt), [row] * prompt)
                self._decode()
            start = time.perf_counter()
            for position in range(prompt, prompt + generate):
                self._fill(tokens[:, position], [position] * batch, sequences)
                for row in sequences:
                    self._batch.logits[row] = True
                self._decode()
            return batch * generate / (time.perf_counter() - start)

        unified = (False,) if batch == 1 else (False, True)
        return self._choose(run, prompt + generate, batch, unified)

    def measure(self) -> float:
        """Tokens/s of one run of what was prepared last."""
        return self._run()

    def logits(self, ids: list[int], path: str) -> None:
        """Writes the logits after each of at most 512 tokens, float32 [T, V], to an .npy file."""
        self._open(len(ids), 1, lib.LLAMA_FLASH_ATTN_TYPE_AUTO, unified=False)
        self._clear()
        self._fill(ids, range(len(ids)), [0] * len(ids))
        for row in range(len(ids)):
            self._batch.logits[row] = True
        self._decode()
        shape = (len(ids), self._vocab_size)
        np.save(path, np.ctypeslib.as_array(lib.llama_get_logits(self._context), shape))

    def _choose(
        self, run: Callable[[], float], length: int, sequences: int, unified: tuple[bool, ...]
    ) -> dict[str, bool]:
        """Opens the context in which `run` is fastest."""
        flash = (lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED)
        rates = {}
        for settings in itertools.product(flash, unified):
            self._open(length, sequences, *settings)
            run()
            rates[settings] = run()
        best = max(rates, key=lambda settings: rates[settings])
        self._open(length, sequences, *best)
        run()
        self._run = run
        return {
            "flash_attention": best[0] == lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            "unified_cache": best[1],
        }

    def _open(self, length: int, sequences: int, flash: int, unified: bool) -> None:
        if self._context:
            lib.llama_free(self._context)
        params = lib.llama_context_default_params()
        params.n_ctx = -(-length // CELLS) * CELLS * sequences
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = flash
        params.kv_unified = unified
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {params.n_ctx} tokens")

    def _clear(self) -> float:
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        return time.perf_counter()

    def _fill(self, tokens, positions, sequences) -> None:
        """Sets the batch to these tokens, without logits."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for row, (token, position, sequence) in enumerate(
            zip(tokens, positions, sequences, strict=True)
        ):
            batch.token[row] = int(token)
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = False

    def _decode(self) -> None:
        if code := lib.llama_decode(self._context, self._batch):
            raise SystemExit(f"llama_decode failed with code {code}")
        lib.llama_synchronize(self._context)

    def _random(self, *shape: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, self._vocab_size, shape)


@lib.llama_log_callback
def quiet(_level: int, _text: bytes, _data: object) -> None:
    """Drops llama.cpp's progress messages."""


def main() -> None:
    lib.llama_log_set(quiet, None)
    path, threads = sys.argv[1:]
    model = Model(path, int(threads))
    serve(
        {
            "info": model.info,
            "prepare_prompt": model.prepare_prompt,
            "prepare_decode": model.prepare_decode,
            "measure": model.measure,
            "logits": model.logits,
        }
    )


if __name__ == "__main__":
    main()
