"""Tasks of lm-eval on a model of qjax, and four small ones that need no network.

The items of these are in `items/`, one a line, about a hundred for each task. They tell two
quantizations of a model apart roughly, and a broken one at once; they are no benchmark.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qjax.errors import RequestError
from qjax.evaluate.harness import model_class
from qjax.params import Params

ITEMS = Path(__file__).parent / "items"

_ACCURACY = [
    {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for name in ("acc", "acc_norm")
]
# In the fields of lm-eval's task files.
OFFLINE: dict[str, dict[str, Any]] = {
    "qjax_facts": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": _ACCURACY,
    },
    "qjax_sense": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "answer",
        "metric_list": _ACCURACY,
    },
    "qjax_cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{' ' + last}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    "qjax_sums": {
        "output_type": "generate_until",
        "doc_to_text": "What is {{question}}? It is",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 4,
        "fewshot_config": {
            "sampler": "first_n",
            "samples": [
                {"question": "3 plus 14", "answer": "17"},
                {"question": "25 minus 9", "answer": "16"},
                {"question": "4 times 6", "answer": "24"},
                {"question": "38 plus 21", "answer": "59"},
            ],
        },
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
        "filter_list": [
            {
                "name": "first number",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(-?\d+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def run_tasks(
    params: Params,
    tasks: Sequence[str] = tuple(OFFLINE),
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    numerics: str = "exact",
    kv_cache_dtype: str = "auto",
    include_path: str | None = None,
) -> dict[str, Any]:
    """Runs lm-eval.

    Args:
      tasks: names of tasks, groups or tags: those of `OFFLINE`, or any that lm-eval knows, most of
        which fetch their data from the Hugging Face hub.
      num_fewshot: examples before each item, None for as many as the task asks for.
      limit: only so many items of each task.
      apply_chat_template: put items through the model's chat template.
      numerics, kv_cache_dtype: see `qjax.generate`.
      include_path: a folder with task files of your own.

    Returns:
      What `lm_eval.simple_evaluate` does; `table` shows it.

    Raises:
      UnsupportedError: lm-eval is not installed.
      RequestError: an argument is out of range, or there is no such task.
    """
    if not tasks:
        raise RequestError(f"no task is named; without network there are {', '.join(OFFLINE)}.")
    if limit is not None and limit < 1:
        raise RequestError(f"limit must be at least 1, got {limit}.")
    model = model_class()(params, numerics=numerics, kv_cache_dtype=kv_cache_dtype)
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    # It remarks on everything that a task does not say.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # It would fork for error bars, which a process with threads does not survive.
    os.environ["DISABLE_MULTIPROC"] = "1"
    others = [name for name in tasks if name not in OFFLINE]
    # The index of its own tasks takes seconds.
    manager = TaskManager(include_path=include_path, include_defaults=bool(others))
    known = {*manager.all_tasks, *manager.all_groups, *manager.all_tags}
    if unknown := [name for name in others if name not in known]:
        raise RequestError(
            f"lm-eval knows no task {', '.join(unknown)}; without network there are "
            f"{', '.join(OFFLINE)}."
        )
    with contextlib.redirect_stdout(sys.stderr):
        return simple_evaluate(
            model=model,
            tasks=[configured(name) if name in OFFLINE else name for name in tasks],
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )


def table(results: dict[str, Any]) -> str:
    """What `run_tasks` gives, as lm-eval's table in Markdown."""
    from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]

    return make_table(results).rstrip("\n")


def items(name: str) -> list[dict[str, Any]]:
    """The items of a task of `OFFLINE`."""
    file = ITEMS / f"{name.removeprefix('qjax_')}.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def configured(name: str) -> dict[str, Any]:
    """A task of `OFFLINE` as `lm_eval.simple_evaluate` takes it."""
    return {
        "task": name,
        "custom_dataset": partial(_dataset, name),
        "test_split": "test",
        "metadata": {"version": 1},
        **OFFLINE[name],
    }


def _dataset(name: str, **_: Any) -> dict[str, Any]:
    from datasets import Dataset  # pyright: ignore[reportMissingImports]

    return {"test": Dataset.from_list(items(name))}
