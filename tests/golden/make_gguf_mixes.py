"""Makes gguf_mixes.json: the types that llama-quantize would give the tensors of small deep models.

Run by hand with the package gguf: `python tests/golden/make_gguf_mixes.py LLAMA_QUANTIZE`, which is
that of llama.cpp as vendored by llama-cpp-python 0.3.36. It is asked by --dry-run.

Model -> "<mix>/plain" or "<mix>/importance" (with an importance matrix) -> part of a layer, or name
of a tensor, -> its type in each layer, as one letter each of "types".
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np

HIDDEN, WIDE, VOCAB = 256, 512, 64
# layers, heads, heads of keys, experts, tied embeddings
MODELS = {
    "llama-24-gqa4": (24, 8, 2, 0, False),
    "llama-17-gqa2-tied": (17, 4, 2, 0, True),
    "mixtral-9": (9, 4, 1, 8, False),
}
MIXES = (
    *("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M"),
    *("Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS"),
    *("IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "Q1_0", "Q2_0"),
)
LINE = re.compile(r"\]\s+(\S+)\s+-\s+\[.*?type\s*=\s*(\w+),(?:.*->\s*\S+\s*MiB\s*\((\w+)\))?")


def shapes(layers: int, heads: int, kv_heads: int, experts: int, tied: bool) -> dict:
    found = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        found["output.weight"] = (VOCAB, HIDDEN)
    lead, suffix = ((experts,), "_exps") if experts else ((), "")
    layer = {
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (HIDDEN // heads * kv_heads, HIDDEN),
        "attn_v": (HIDDEN // heads * kv_heads, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        f"ffn_gate{suffix}": (*lead, WIDE, HIDDEN),
        f"ffn_up{suffix}": (*lead, WIDE, HIDDEN),
        f"ffn_down{suffix}": (*lead, HIDDEN, WIDE),
    }
    layer |= {"ffn_gate_inp": (experts, HIDDEN)} if experts else {}
    for i in range(layers):
        found |= {f"blk.{i}.{part}.weight": shape for part, shape in layer.items()}
    return found


def write(writer: gguf.GGUFWriter, tensors: dict) -> None:
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model(file: Path, layers: int, heads: int, kv_heads: int, experts: int, tied: bool) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    keys = {"block_count": layers, "context_length": 128, "embedding_length": HIDDEN}
    keys |= {"feed_forward_length": WIDE, "vocab_size": VOCAB, "attention.head_count": heads}
    keys |= {"attention.head_count_kv": kv_heads}
    keys |= {"expert_count": experts, "expert_used_count": 2} if experts else {}
    for key, value in keys.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("none")
    tensors = {
        name: np.ones(shape, np.float32 if len(shape) == 1 or "gate_inp" in name else np.float16)
        for name, shape in shapes(layers, heads, kv_heads, experts, tied).items()
    }
    write(writer, tensors)


def importance(file: Path, *sizes) -> None:
    writer = gguf.GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    tensors = {}
    for name, shape in shapes(*sizes).items():
        if len(shape) > 1:
            matrices = shape[0] if len(shape) == 3 else 1
            tensors[f"{name}.in_sum2"] = np.ones((matrices, shape[-1]), np.float32)
            tensors[f"{name}.counts"] = np.ones((matrices, 1), np.float32)
    write(writer, tensors)


def asked(quantize: str, file: Path, mix: str, matrix: Path | None) -> dict[str, str]:
    given = [] if matrix is None else ["--imatrix", str(matrix)]
    command = [quantize, "--dry-run", *given, str(file), mix, "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = map(LINE.search, (done.stdout + done.stderr).splitlines())
    return {line[1]: (line[3] or line[2]).lower() for line in lines if line is not None}


def main(quantize: str) -> None:
    types: list[str] = []
    result: dict = {"types": types}
    with TemporaryDirectory() as folder:
        for name, sizes in MODELS.items():
            file, matrix = Path(folder, "model.gguf"), Path(folder, "matrix.gguf")
            model(file, *sizes)
            importance(matrix, *sizes)
            result[name] = {}
            for mix in MIXES:
                for key, given in (("plain", None), ("importance", matrix)):
                    parts: dict[str, str] = {}
                    for tensor, qtype in asked(quantize, file, mix, given).items():
                        if "norm" in tensor:
                            continue
                        if qtype not in types:
                            types.append(qtype)
                        part = re.sub(r"^blk\.\d+\.|\.weight$", "", tensor)
                        parts[part] = parts.get(part, "") + chr(ord("a") + types.index(qtype))
                    result[name][f"{mix}/{key}"] = parts
    text = json.dumps(result, indent=0)
    Path(__file__).with_name("gguf_mixes.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
