"""qjax's side of `quantize_vs_peers.py`.

python oneshot_worker.py MODEL
"""

import sys
import time

import jax
from worker import serve

import qjax


def main(model: str) -> None:
    def info() -> dict[str, str]:
        return {"qjax": qjax.__version__, "jax": jax.__version__}

    def quantize(recipe: str, tokens: str, output: str) -> float:
        """Seconds from the folder of the model to that of the result."""
        start = time.perf_counter()
        qjax.oneshot(model, recipe, tokens, output)
        return time.perf_counter() - start

    serve({"info": info, "quantize": quantize})


if __name__ == "__main__":
    main(*sys.argv[1:])
