"""Values of a linen module as an nnx module's, and back."""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.etf.projections import factors_of
from sgw_jax.nnx.parameters import params_of

ROUNDING = 1e-5  # a frame of the same seed that another machine or program has made


def from_linen(module: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Sets the parameters of a module to those of its linen counterpart.

    Args:
      module: whose parameters are set, in their own dtype.
      variables: of the linen module, or their ``params`` alone.

    Raises:
      ValueError: names or shapes differ (the message lists them); a frame in ``constants`` that is not the one the
        module's program makes, as in checkpoints of the release before.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sgw_jax
    >>> from flax import nnx
    >>> from sgw_jax.nnx import KEM, from_linen
    >>> features = {"depth": jnp.ones((1, 4, 8))}
    >>> linen = sgw_jax.KEM(num_slots=2)
    >>> variables = jax.jit(linen.init)(jax.random.key(0), features)
    >>> kem = KEM(channels=8, num_slots=2, rngs=nnx.Rngs(1))
    >>> from_linen(kem, variables)
    >>> bool(jnp.allclose(kem(features)["depth"], linen.apply(variables, features)["depth"]))
    True
    """
    params = variables.get("params", variables)
    given = flax.traverse_util.flatten_dict(params, sep="/")
    own = flax.traverse_util.flatten_dict(params_of(module), sep="/")
    absent = "absent"
    problems = [
        f"{name}: {np.shape(given[name]) if name in given else absent} given, "
        f"{np.shape(own[name]) if name in own else absent} here"
        for name in sorted(given.keys() | own.keys())
        if name not in given or name not in own or np.shape(given[name]) != np.shape(own[name])
    ]
    if problems:
        raise InputError(f"from_linen: the parameters of {type(module).__name__} differ:\n  " + "\n  ".join(problems))
    _check_frame(module, variables.get("constants", {}))
    tree = flax.traverse_util.unflatten_dict({name: jnp.asarray(given[name], own[name].dtype) for name in own}, sep="/")
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, tree)
    nnx.update(module, state)


def to_linen(module: nnx.Module) -> dict[str, Any]:
    """The ``variables`` of the linen counterpart: {"params": ...}; its program makes the same frame.

    Args:
      module: one of this package.

    Returns:
      {"params": ...}.

    >>> from flax import nnx
    >>> from sgw_jax.nnx import KEM, to_linen
    >>> sorted(to_linen(KEM(channels=8, num_slots=2, rngs=nnx.Rngs(0)))["params"])
    ['retrieve', 'slots', 'write']
    """
    return {"params": params_of(module)}


def _check_frame(module: Any, constants: Mapping[str, Any]) -> None:
    frames = flax.traverse_util.flatten_dict(constants, sep="/")
    for name, frame in frames.items():
        kind = getattr(module, "projection", "etf")
        vertices, seed = getattr(module, "etf_vertices", None), getattr(module, "etf_seed", 0)
        if vertices is None:
            vertices, seed = module.num_vertices, module.seed
        factors = factors_of(kind, vertices, seed)
        made = None if factors is None else factors(jnp.ones((1, frame.shape[0])))[1]
        if made is None or made.shape != frame.shape or float(jnp.max(jnp.abs(made - frame))) > ROUNDING:
            raise InputError(
                f"from_linen: constants/{name} is not the frame that {type(module).__name__} makes of seed {seed}; "
                "keep to the linen module, which reads it."
            )
