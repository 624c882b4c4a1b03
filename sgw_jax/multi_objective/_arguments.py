"""What the members of the family check alike."""

import math

from sgw_jax.data_pipelines.errors import InputError


def check_positive(caller: str, **arguments: float) -> None:
    """Raises an InputError for the first argument that is not positive and finite; traced ones pass."""
    for name, value in arguments.items():
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise InputError(f"{caller}: {name} is {value}; it must be positive.")
