"""How far rounded activations lead from the exact model: mean KL divergence on a text.

    python benchmarks/kl_divergence.py smollm2-135m text.txt [--peer-python PATH]

The reference is qjax with exact activations and a float32 cache; beside it, the roundings that the
fast mode uses in prompts and in decoding, with its cache, and llama.cpp (given an interpreter that
has llama-cpp-python) on the same weights. All see the same windows of the text, token by token.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from worker import Worker

import qjax
from qjax.checkpoint import source
from qjax.engine.runner import NUMERICS
from qjax.errors import QjaxError
from qjax.evaluate.divergence import row_divergence
from qjax.evaluate.logits import ROWS, rounded_reader
from qjax.params import Params


def of_llamacpp(worker: Worker, folder: str) -> Callable[[np.ndarray], Iterator[jax.Array]]:
    """Logits of a window by llama.cpp, through a file."""

    def logits(ids: np.ndarray) -> Iterator[jax.Array]:
        path = f"{folder}/logits.npy"
        worker.ask("logits", ids=ids.tolist(), path=path)
        rows = np.load(path, mmap_mode="r")
        for first in range(0, len(ids), ROWS):
            yield jnp.asarray(rows[first : first + ROWS])

    return logits


def windows(params: Params, text: str, length: int, count: int) -> np.ndarray:
    """int32 [count, length]; each begins as a text of its own does."""
    prefix = params.tokenizer.encode("")
    ids = params.tokenizer.encode(text, add_special_tokens=False)
    step = length - len(prefix)
    if len(ids) < step:
        sys.exit(f"the text has {len(ids)} tokens, less than one window of {length}.")
    starts = range(0, len(ids) - step + 1, step)[:count]
    return np.array([[*prefix, *ids[start : start + step]] for start in starts], np.int32)


def table_line(name: str, divergence: np.ndarray, equal: np.ndarray) -> str:
    error = divergence.std() / np.sqrt(divergence.size)
    return (
        f"| {name} | {divergence.mean():.5f} ± {error:.5f} | {np.median(divergence):.5f} | "
        f"{np.quantile(divergence, 0.99):.4f} | {equal.mean():.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="KL divergence of rounded activations")
    parser.add_argument("model", help="anything that qjax.load takes")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--window", type=int, default=512, help="tokens, at most 512")
    parser.add_argument("--windows", type=int, default=4, help="how many, from the start")
    parser.add_argument("--peer-python", help="an interpreter that has llama_cpp")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    options = parser.parse_args()

    params = qjax.load(options.model)
    ids = windows(params, options.text.read_text(), options.window, options.windows)
    exact, fast = NUMERICS["exact"], NUMERICS["fast"]
    exactly = rounded_reader(params, exact.prefill, exact.cache_dtype)
    others: dict[str, Callable[[np.ndarray], Iterator[jax.Array]]] = {
        "fast, prompt": rounded_reader(params, fast.prefill, fast.cache_dtype),
        "fast, decoding": rounded_reader(params, fast.decode, fast.cache_dtype),
    }
    with tempfile.TemporaryDirectory() as folder:
        if options.peer_python:
            path = str(source.resolve(options.model).path)
            worker = Worker(options.peer_python, "llamacpp_worker.py", path, str(options.threads))
            others["llama.cpp"] = of_llamacpp(worker, folder)
        found: dict[str, list] = {name: [] for name in others}
        for window in ids:
            rows = list(exactly(window))
            for name, logits in others.items():
                found[name] += [
                    row_divergence(a, b) for a, b in zip(rows, logits(window), strict=True)
                ]

    print(f"{len(ids)} windows of {ids.shape[1]} tokens; KL in nats from the exact model\n")
    print("| | mean ± standard error | median | 99 % quantile | same top token |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, parts in found.items():
        divergence, equal = (np.concatenate(part) for part in zip(*parts, strict=True))
        print(table_line(name, divergence, equal))


if __name__ == "__main__":
    try:
        main()
    except (QjaxError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
