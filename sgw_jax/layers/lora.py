"""LoRA: the matrices of a network plus products of two thin ones, which alone learn."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.parameter_names import LORA

# The modules whose matrices can be adapted, by their names in a backbone.
TARGETS = ("attention", "mlp")
# Matrices that are several side by side, each of which gets factors of its own.
JOINED = {"query_key_value": 3}


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) of the linear maps in a module's attentions and MLPs.

    With W (inputs, outputs) a map's kernel, A (inputs, rank) and B (rank, outputs), the map becomes x W + b + (alpha /
    rank) (x A) B, as Hugging Face's PEFT has it: A starts uniform in [-1, 1] / sqrt(inputs), B at zero, so that the
    start adds zeros to what the module computes. Query, key and value are three maps, though their kernels lie side
    by side. The factors are the parameters ``lora/a`` (maps, inputs, rank) and ``lora/b`` (maps, rank, outputs) beside
    the kernel; they are taken with the tokens, rank by rank, and W + (alpha / rank) A B is never made, so that the
    gradient costs no product of the size of W's.

    No module knows of it: ``with lora.adapting(): module.apply(variables, x)`` adapts any linen module, inside scans
    and rematerialised blocks too. What is frozen is the train step's affair (`Freezing`).

    Attributes:
      rank: from 1 to the smaller side of every matrix.
      alpha: positive.
      targets: of `TARGETS`, whose matrices.

    Raises:
      ValueError: an attribute out of the range given above; when the module is called, a rank above the smaller side
        of a matrix, or no matrix in the targets.

    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax.layers.lora import LoRA
    >>> from sgw_jax.layers.mlp import MLP
    >>> class Block(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return MLP(8, name="mlp")(x)
    >>> with LoRA(rank=2, alpha=4.0).adapting():
    ...     params = jax.eval_shape(Block().init, jax.random.key(0), jnp.ones((1, 4)))["params"]
    >>> jax.tree.map(lambda leaf: leaf.shape, params["mlp"]["hidden"])
    {'bias': (8,), 'kernel': (4, 8), 'lora': {'a': (1, 4, 2), 'b': (1, 2, 8)}}
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank is {self.rank}; it must be at least 1, or None for no LoRA.")
        if not self.alpha > 0:
            raise InputError(f"lora.alpha is {self.alpha}; it must be positive.")
        if not self.targets or not set(self.targets) <= set(TARGETS):
            raise InputError(f"lora.targets are {self.targets}; they must be at least one of {TARGETS}.")

    @contextlib.contextmanager
    def adapting(self) -> Iterator[None]:
        """What is called inside is adapted."""
        seen: set[str] = set()

        def adapt(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if not isinstance(module, nn.Dense) or context.method_name != "__call__":
                return call(*args, **kwargs)
            parents = set(module.path[:-1]) & set(TARGETS)
            seen.update(parents)
            if not parents & set(self.targets):
                return call(*args, **kwargs)
            return call(*args, **kwargs) + self._update(module, *args)

        with nn.intercept_methods(adapt):
            yield
        if not seen & set(self.targets):
            raise InputError(
                f"lora.targets are {self.targets}, but the network has no such matrices; it has {sorted(seen)}."
            )

    def _update(self, module: nn.Dense, inputs: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        maps, width = JOINED.get(str(module.name), 1), inputs.shape[-1]
        outputs = module.features // maps
        if self.rank > min(width, outputs):
            raise InputError(
                f"lora.rank is {self.rank}, but {'/'.join(module.path)} maps {width} channels to {outputs}; it must "
                f"be at most {min(width, outputs)}."
            )
        scope = module.scope.push(LORA, reuse=True)  # type: ignore[union-attr]
        a = scope.param("a", _uniform, (maps, width, self.rank))
        b = scope.param("b", nn.initializers.zeros, (maps, self.rank, outputs))
        promoted: Any = module.promote_dtype(inputs, a, b, dtype=module.dtype)
        inputs, a, b = promoted
        thin = jnp.einsum("...i,mir->...mr", inputs, a)
        update = jnp.einsum("...mr,mro->...mo", thin, b) * (self.alpha / self.rank)
        return update.reshape(*inputs.shape[:-1], module.features)


def adapting(lora: LoRA | None) -> contextlib.AbstractContextManager[None]:
    """``lora.adapting()``; None adapts nothing."""
    return contextlib.nullcontext() if lora is None else lora.adapting()


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
