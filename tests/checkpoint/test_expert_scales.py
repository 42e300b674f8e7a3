import numpy as np

from qjax.checkpoint.expert_scales import taken_apart
from qjax.checkpoint.mapped import TensorRecord

PARENT = "model.layers.0.mlp.experts"


def records(shapes):
    """float32 tensors one behind the other, from byte 100 on."""
    result, offset = {}, 100
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        result[name] = TensorRecord(name, "f32", shape, "a", offset, size)
        offset += size
    return result


def pieces(shapes):
    """What the records of taken apart scales point at, in a file of running numbers."""
    values = np.arange(1000, dtype=np.float32)
    return {
        name.removeprefix(f"{PARENT}."): values[(r.offset - 100) // 4 :][: r.nbytes // 4]
        .reshape(r.shape)
        .tolist()
        for name, r in taken_apart(records(shapes)).items()
        if "scale" in name
    }


def test_scales_of_blocks():
    """Rows of gate, then those of up."""
    alone = {f"{PARENT}.{i}.gate_proj.weight": () for i in range(2)}
    gate_up = np.arange(16).reshape(2, 4, 2)
    down = 16 + np.arange(4).reshape(2, 1, 2)
    found = pieces(
        {
            f"{PARENT}.gate_up_proj_scale_inv": (2, 4, 2),
            f"{PARENT}.down_proj_scale_inv": (2, 1, 2),
        }
        | alone
    )
    wanted = {}
    for i in range(2):
        wanted[f"{i}.gate_proj.weight_scale_inv"] = gate_up[i, :2].tolist()
        wanted[f"{i}.up_proj.weight_scale_inv"] = gate_up[i, 2:].tolist()
        wanted[f"{i}.down_proj.weight_scale_inv"] = down[i].tolist()
    assert found == wanted


def test_one_scale_for_an_expert():
    """That of gate and up together is that of both."""
    found = pieces(
        {
            f"{PARENT}.gate_up_proj_scale_inv": (2, 1, 1),
            f"{PARENT}.gate_up_proj_activation_scale": (2,),
            f"{PARENT}.0.gate_proj.weight": (),
        }
    )
    assert found == {
        f"{i}.{part}.{suffix}": value
        for i in range(2)
        for part in ("gate_proj", "up_proj")
        for suffix, value in (("weight_scale_inv", [[i]]), ("activation_scale", 2 + i))
    }


def test_joined_weights_keep_joined_scales():
    stored = records({f"{PARENT}.down_proj": (2, 4, 4), f"{PARENT}.down_proj_scale_inv": (2, 1, 1)})
    assert taken_apart(stored) == stored
