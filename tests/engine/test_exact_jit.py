"""Which options programs with large products are compiled with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.engine.exact_jit import exact_jit


def test_on_a_gpu_xla_looks_for_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    @exact_jit(static_argnames="times")
    def product(x: jax.Array, times: int) -> jax.Array:
        """A product."""
        return x @ x * times

    x = jnp.ones((4, 4))
    inside = jax.jit(lambda x: product(x, times=2))
    np.testing.assert_array_equal(inside(x), np.full((4, 4), 8))
    assert product.__doc__ == "A product."
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(product(x, times=3), np.full((4, 4), 12))
    # Options are for whole programs: jax tells which ones these were.
    with pytest.raises(ValueError, match="xla_gpu_enable_triton_gemm': False"):
        jax.jit(lambda x: product(x, times=4))(x)
