"""Meshes with Explicit axes, as `jax.make_mesh` makes them: inside, the compiler chooses the layout."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

Function = TypeVar("Function", bound=Callable[..., Any])
Layouts = dict[str, NamedSharding]


def auto_inside(outputs: Callable[[Layouts, NamedSharding], Any]) -> Callable[[Function], Function]:
    """Decorates ``function(params, features, *, slots=, mask=, **options)``: Explicit axes are Auto inside.

    Under Explicit axes every reshape and product would have to say where its result lies; the sequence that several
    tasks' maps are joined to has no layout of its own to name, so the compiler chooses it [our decision]. Under Auto
    and Manual axes nothing changes.

    Args:
      outputs: (the features' layouts, that of their batch axis alone) -> the layout of what the function returns.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(params: Any, features: Mapping[str, Array] | Array, /, *, slots: Any = None, **options: Any) -> Any:
            named = features if isinstance(features, Mapping) else {"": features}
            layouts = {name: getattr(jax.typeof(value), "sharding", None) for name, value in named.items()}
            first = next(iter(layouts.values()), None)
            arrays = {name: value for name, value in options.items() if name == "mask" and value is not None}
            arrays |= {} if slots is None else {"slots": slots}
            if not isinstance(first, NamedSharding) or AxisType.Explicit not in first.mesh.axis_types:
                return function(params, features, **(options | arrays))
            static = {name: value for name, value in options.items() if name not in arrays}

            def inside(params: Any, features: Any, arrays: dict[str, Any]) -> Any:
                return function(params, features, **static, **arrays)

            rows = NamedSharding(first.mesh, P(first.spec[0] if len(first.spec) else None))
            layout = outputs(layouts, rows)  # type: ignore[arg-type]
            return jax.sharding.auto_axes(inside, out_sharding=layout)(params, features, arrays)

        return call  # type: ignore[return-value]

    return decorate
