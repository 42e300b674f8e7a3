"""The mixes of llama-quantize, against files that it made."""

import pytest

from qjax.checkpoint import names
from qjax.checkpoint.gguf_io import read_gguf
from qjax.checkpoint.opened import gguf_model
from qjax.compress.gguf_mixes import MIXES, mix_types
from qjax.errors import UnsupportedError
from qjax.models import functional


def weights(config):
    """Shapes of weights by module."""
    shapes = functional.parameter_shapes(config).items()
    return {n.removesuffix(".weight"): s for n, s in shapes if n.endswith(".weight") and s[1:]}


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("gguf-Q2_K", "Q2_K"),
        ("gguf-Q4_1", "q4_1"),
        ("gguf-gemma3-Q5_0", "Q5_0"),
        ("gguf-qwen2-Q4_0", "Q4_0"),
        ("gguf-h128-Q4_K_M-fallback", "Q4_K"),
    ],
)
def test_types_of_files_by_llama_quantize(golden, name, mix):
    file = read_gguf(golden / name / "model.gguf")
    config = gguf_model(file)
    importance = "quantize.imatrix.file" in file.metadata
    types = mix_types(mix, config, weights(config), importance=importance)
    stored = {m: file.tensors[names.gguf_tensor(f"{m}.weight", config)].qtype for m in types}
    assert types == stored


def test_unknown_mix(golden):
    config = gguf_model(read_gguf(golden / "gguf-Q2_K" / "model.gguf"))
    with pytest.raises(UnsupportedError, match="no GGUF mix 'Q4_X'; these are: F32, F16"):
        mix_types("Q4_X", config, weights(config))
    with pytest.raises(UnsupportedError, match="no place"):
        mix_types("Q4_0", config, {"model.vision": (8, 64)})


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_divides_every_row(golden, mix):
    config = gguf_model(read_gguf(golden / "gguf-h128-Q4_K_M-fallback" / "model.gguf"))
    shapes = weights(config)
    for qtype, shape in zip(mix_types(mix, config, shapes).values(), shapes.values(), strict=True):
        assert qtype in ("f32", "f16", "bf16") or qtype.startswith(("q", "iq", "tq")), shape
