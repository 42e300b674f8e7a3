"""LLM Compressor's side of `quantize_vs_peers.py`. Runs in an environment that has it; no qjax."""

import sys
import time
from importlib.metadata import version

import numpy as np
from worker import serve


def main(model: str, threads: str) -> None:
    def info() -> dict[str, str]:
        names = ("llmcompressor", "compressed-tensors", "auto-round", "transformers", "torch")
        return {name: version(name) for name in names}

    def quantize(recipe: str, tokens: str, output: str, batch: int) -> float:
        """Seconds from the folder of the model to that of the result."""
        # Here, not above: importing it prints, which `serve` keeps away from the answers.
        import torch
        from llmcompressor import oneshot
        from llmcompressor.pipelines.cache import IntermediatesCache
        from torch.utils.data import DataLoader
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not torch.accelerator.is_available():
            # AWQ in 0.14 asks for pinned memory, which torch has not without an accelerator.
            IntermediatesCache.pin_memory = lambda *_: None
        torch.set_num_threads(int(threads))
        start = time.perf_counter()
        sequences = torch.from_numpy(np.load(tokens).astype(np.int64))
        batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in sequences]
        if "AutoRoundModifier" in recipe:
            batch = 1  # it makes batches itself, of calls with one sequence each
        dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        oneshot(
            model=dense,
            tokenizer=tokenizer,
            recipe=recipe,
            dataset=DataLoader(batches, batch_size=batch),
            num_calibration_samples=len(batches),
            max_seq_length=sequences.shape[1],
        )
        dense.save_pretrained(output, save_compressed=True)
        tokenizer.save_pretrained(output)
        return time.perf_counter() - start

    serve({"info": info, "quantize": quantize})


if __name__ == "__main__":
    main(*sys.argv[1:])
