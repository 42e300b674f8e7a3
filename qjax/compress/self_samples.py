"""Samples that a model writes itself, for calibration without any data.

As in LLM-QAT (arXiv:2305.17888), what a model generates is close to what it was trained on.
"""

from __future__ import annotations

import numpy as np

from qjax.engine.block_manager import BlockManager
from qjax.engine.engine import BLOCK_SIZE, Engine
from qjax.engine.sampling_params import SamplingParams
from qjax.errors import RequestError
from qjax.params import Params

MAX_NUM_SEQS = 32


def begin(params: Params) -> int | None:
    """The token that the tokenizer puts in front of a text, or None."""
    prefix = params.tokenizer.encode("") if params.tokenizer is not None else []
    return prefix[0] if prefix else None


def self_samples(
    params: Params, count: int, length: int, seed: int = 0, progress: bool = False
) -> np.ndarray:
    """Samples int32 [count, length] at temperature 1; past an end of text the model goes on.

    Each begins with the model's beginning-of-sequence token, or its end-of-sequence token, with
    which models without the former part texts.

    Raises:
      RequestError: the model has no tokenizer, or neither of these tokens.
    """
    from tqdm import tqdm  # slow to import

    if params.tokenizer is None:
        raise RequestError("the model has no tokenizer to tell how a text begins: give a dataset.")
    starts = (begin(params), params.tokenizer.bos_id, *sorted(params.tokenizer.eos_ids))
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise RequestError("the model has no token that begins or ends a text: give a dataset.")
    rows = min(count, MAX_NUM_SEQS)
    engine = Engine(
        params,
        num_blocks=rows * BlockManager(0, BLOCK_SIZE).blocks_for(length),
        max_num_seqs=rows,
        max_model_len=length,
        seed=seed,
    )
    sampling = SamplingParams(temperature=1.0, max_tokens=length - 1, ignore_eos=True)
    requests = [engine.add((start,), sampling) for _ in range(count)]
    with tqdm(total=count, desc="writing samples", disable=None if progress else True) as bar:
        while engine.busy:
            bar.update(sum(r.finish_reason is not None for r in engine.step()))
    return np.array([[start, *request.output_ids] for request in requests], np.int32)
