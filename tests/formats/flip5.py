"""flip5, a made-up format: 5-bit weights, as a plugin for qjax that is one file."""

import numpy as np

import qjax


@qjax.register_quantization_config("flip5")
class Flip5(qjax.QuantizationConfig):
    """A weight is (16 - code) * scale: codes rise as weights fall.

    Stored are "low" uint8 [N, K / 2], the lower four bits of columns j and j + K / 2 in one byte,
    "high" uint8 [N, K / 8], and "scale" float16 [N, K / group_size].
    """

    def __init__(self, group_size, online):
        self.group_size = group_size
        self.online = online  # qjax.load(model, quantization="flip5"): weights are not yet in flip5

    @classmethod
    def from_config(cls, config, checkpoint):
        keys = qjax.Keys(config, checkpoint.file)
        keys.ignore("quant_method")
        group_size = keys.choice("group_size", (32, 64, 128), 32)
        keys.done()  # an unknown key is an error
        return cls(group_size, online=not config)

    def layer(self, module, stored, shape):
        n, k = shape
        group = (1, self.group_size)
        if "low" in stored:
            qjax.expect(module, stored, "low", "u8", (n, k // 2))
            qjax.expect(module, stored, "high", "u8", (n, k // 8))
            qjax.expect(module, stored, "scale", "f16", (n, k // self.group_size))
            return qjax.Layer(("low", "high", "scale"), lambda arrays: decode(arrays, shape, group))
        if self.online and "layers" in module:
            qjax.expect(module, stored, "weight", ("bf16", "f16", "f32"), shape)
            return qjax.Layer(("weight",), lambda arrays: quantize(arrays["weight"], group))
        return None  # a plain layer, such as the embedding

    def encode(self, module, weight):
        if weight.qtype != "uint5b16" or weight.group != (1, self.group_size):
            raise qjax.UnsupportedError(f"{module}: flip5 holds no {weight.qtype} {weight.group}")
        bits = np.unpackbits(weight.qvalue, axis=-1, bitorder="little")
        codes = np.packbits(bits.reshape(len(bits), -1, 5), axis=-1, bitorder="little")[..., 0]
        left, right = np.split(codes & 15, 2, axis=-1)
        return {
            "low": left | right << 4,
            "high": np.packbits(codes >> 4, axis=-1, bitorder="little"),
            "scale": -weight.scale,
        }

    def to_config(self):
        return {"quant_method": "flip5", "group_size": self.group_size}


def decode(arrays, shape, group):
    low, high = arrays["low"], np.unpackbits(arrays["high"], axis=-1, bitorder="little")
    codes = np.concatenate([low & 15, low >> 4], axis=-1) | high << 4
    return as_weight(codes, -arrays["scale"], shape, group)


def quantize(weight, group):
    groups = weight.astype(np.float32).reshape(len(weight), -1, group[1])
    scale = (np.abs(groups).max(-1, keepdims=True) / 15 + 1e-6).astype(np.float16)
    codes = np.clip(np.rint(groups / scale) + 16, 1, 31).astype(np.uint8)
    return as_weight(codes.reshape(weight.shape), scale[..., 0], weight.shape, group)


def as_weight(codes, scale, shape, group):
    """Packed along the row, the first code in the lowest bits: what qjax computes with."""
    bits = np.unpackbits(codes[..., None], axis=-1, count=5, bitorder="little")
    packed = np.packbits(bits.reshape(shape[0], -1), axis=-1, bitorder="little")
    return qjax.QArray(packed, "uint5b16", shape, scale=scale, group=group)
