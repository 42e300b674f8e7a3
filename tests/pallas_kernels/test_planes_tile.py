"""Decoding of tiles of planes: against the layout's own codes, and ml_dtypes."""

from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.matmul import planes, planes_tile
from tests.pallas_kernels.coded import Coded

FLOATS = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_segments(bits, dtype):
    """The segments of a block, one behind the other, are its codes in their order."""
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 512), np.uint8)
    layout = planes.describe(Coded(f"uint{bits}", (1, 32), zero_point="uint8").spec)
    layout = replace(layout, shape=(3, 512), k=512, block=256)
    packed = planes.pack(codes, layout).astype(dtype)
    length = planes_tile.segment_columns(layout)
    found = []
    for block in range(2):
        tiles = []
        for start, width, count in zip(
            layout.offsets, layout.widths, planes_tile.runs(layout), strict=True
        ):
            at = [start + block * 256 * width // 8 + run * length for run in range(count)]
            tiles.append([packed[:, a : a + length] for a in at])
        found += [planes_tile.codes(tiles, layout, s) for s in range(planes_tile.segments(layout))]
    np.testing.assert_array_equal(np.concatenate(found, 1), codes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("qtype", FLOATS)
def test_small_floats(qtype, dtype):
    layout = planes.describe(Coded(qtype, (1, 32)).spec)
    codes = np.arange(1 << layout.bits)
    wanted = codes.astype(np.uint8).view(FLOATS[qtype]).astype(np.float32)
    finite = np.isfinite(wanted)
    for kind in (jnp.uint8, jnp.int16, jnp.int32):
        got = planes_tile.values(jnp.asarray(codes, kind), layout, dtype)
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32)[finite], wanted[finite])


def test_signed_and_looked_up():
    layout = planes.describe(Coded("int8", (1, 32)).spec)
    for kind in (jnp.uint8, jnp.int16, jnp.int32):
        got = planes_tile.values(jnp.arange(256, dtype=kind), layout, jnp.float32)
        np.testing.assert_array_equal(got, np.arange(256).astype(np.uint8).view(np.int8))
    entries = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    layout = planes.describe(Coded("lookup4", (1, 32)).spec)
    got = planes_tile.values(jnp.arange(16, dtype=jnp.uint8), layout, jnp.float32, list(entries))
    np.testing.assert_array_equal(got, entries)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn])
def test_scales_of_bytes(dtype):
    stored = np.arange(1, 0x7F, dtype=np.uint8)
    got = planes_tile.scales(jnp.asarray(stored), np.dtype(dtype).name)
    np.testing.assert_array_equal(got, stored.view(dtype).astype(np.float32))
