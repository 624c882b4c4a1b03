"""Whether programs in bfloat16 can be believed here: of a network that computes in it, on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.host import FUSIONS

SHAPE = (6, 28, 28, 64)  # as many positions as a head sees of six images; what went wrong was right with fewer
CLOSE = 0.1  # values below 6 in magnitude, rounded to 8 bits half a dozen times on their way


def check_bfloat16(dtype: jnp.dtype | None) -> None:
    """Raises where networks of this dtype compute nonsense: once a process two residual blocks are compared with
    themselves in float32, on CPUs alone, in a second or two. None: a model that does not say what it computes in.

    Raises:
      InputError: names the version, and what to do.
    """
    if dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and not (found := _error()) <= CLOSE:
        raise InputError(
            f"jaxlib {jax.lib.__version__} computes convolutions in bfloat16 wrongly on this CPU: two blocks of a "
            f"network differ from float32 by {found:.3g}, where {CLOSE} is allowed. Add {FUSIONS}= to XLA_FLAGS before "
            "Python starts, take another version of jax, or train with --config.dtype=float32."
        )


@functools.cache
def _error() -> float:
    """The largest difference, not a number or infinite where values are."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=SHAPE).astype(np.float32)
    kernel = (rng.normal(size=(3, 3, SHAPE[-1], SHAPE[-1])) / 24).astype(np.float32)
    rounded, exact = (np.asarray(_blocks(jnp.asarray(inputs, kind), kernel)) for kind in (jnp.bfloat16, jnp.float32))
    return float(np.max(np.abs(rounded.astype(np.float32) - exact)))


@jax.jit
def _blocks(x: Float[Array, "batch h w c"], kernel: Float[Array, "3 3 c c"]) -> Float[Array, "batch h w c"]:
    for _ in range(2):
        numbers = ("NHWC", "HWIO", "NHWC")
        update = lax.conv_general_dilated(_normed(x), kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=numbers)
        x = x + jax.nn.relu(update)
    return _normed(x)


def _normed(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
    """LayerNorm without parameters, in float32 as flax's."""
    return jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-6).astype(x.dtype)
