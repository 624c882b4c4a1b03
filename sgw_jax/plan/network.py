"""What a network costs, without running it: parameters, MACs, FLOPs and memory by part."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from sgw_jax.differentiate import flat, unflat
from sgw_jax.layers import parameter_names as names
from sgw_jax.model import MultiTaskModel
from sgw_jax.plan.cost import by_part, largest_arrays, multiply_accumulates, residual_bytes
from sgw_jax.tasks.base import Task
from sgw_jax.train_step import Trained, task_losses

HEADINGS = {
    names.BACKBONE: "backbone",
    names.STEM: "stems",
    names.INTERACTION: "interaction",
    names.HEAD: "heads",
    names.PRELIMINARY: "preliminary heads",
}
PARTS = tuple(HEADINGS.values())
GIB, GIGA = 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of one image.

    parameters, macs: by part of the network, of one prediction. trained: how many of the parameters learn.
    training_macs: of the forward and backward pass of one
    image, predictions before the interaction included. kept_bytes: what the forward pass keeps for the backward pass
    of one image, see `residual_bytes`. largest: the largest arrays of a prediction, (module, shape, bytes).
    """

    size: tuple[int, int]
    tasks: tuple[str, ...]
    interaction: str
    dtype: str
    parameters: dict[str, int]
    trained: int
    macs: dict[str, int]
    training_macs: int
    kept_bytes: int
    largest: list[tuple[str, tuple[int, ...], int]]

    @property
    def interaction_share(self) -> float:
        """Of the multiply-accumulates of a prediction; 0 where there are none."""
        return self.macs["interaction"] / max(sum(self.macs.values()), 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the totals."""
        totals = {"parameters_total": sum(self.parameters.values()), "macs_total": sum(self.macs.values())}
        return dataclasses.asdict(self) | totals | {"interaction_share": self.interaction_share}


def plan(model: MultiTaskModel, size: tuple[int, int], trained: Trained | None = None) -> Plan:
    """Traces a network for images of a size (height, width); nothing is computed and no data is read.

    ``trained``: the part of the parameters that learns, as of `make_train_step`.
    """
    tasks = model.tasks
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(image.shape), train=True))
    params, constants = variables.get("params", {}), variables.get("constants", {})
    targets = target_shapes(tasks, size)

    def predict(params: Any, constants: Any, image: Any) -> Any:
        return model.apply({"params": params, "constants": constants}, image)

    def loss(part: Any, params: Any, constants: Any, image: Any, targets: Any, key: Any) -> Any:
        variables = {"params": unflat(flat(part), params), "constants": constants}
        found: Any = model.apply(variables, image, train=True, rngs={"drop_path": key})
        known = {task.name: task.batch_statistics(targets[task.name]) for task in tasks}
        return sum(task_losses(tasks, found, targets, known))

    part = params if trained is None else jax.eval_shape(trained, params)
    training = (part, params, constants, image, targets, jax.eval_shape(lambda: jax.random.key(0)))
    return Plan(
        size=size,
        tasks=tuple(task.name for task in tasks),
        interaction=_name(model.interaction),
        dtype=jnp.dtype(model.dtype).name,
        parameters=_sums({name: _count(tree) for name, tree in params.items()}),
        trained=_count(part),
        macs=_sums(multiply_accumulates(predict, params, constants, image)),
        training_macs=sum(multiply_accumulates(jax.grad(loss), *training).values()),
        kept_bytes=residual_bytes(loss, *training),
        largest=largest_arrays(predict, params, constants, image),
    )


def target_shapes(tasks: Sequence[Task], size: tuple[int, int], batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """The targets of a batch as shapes, by what `Task.target` says of them."""
    widths = {"labels": (), "vectors": (3,)}
    return {
        task.name: jax.ShapeDtypeStruct(
            (batch, *size, *widths.get(task.target["kind"], (1,))),
            jnp.int32 if task.target["kind"] == "labels" else jnp.float32,
        )
        for task in tasks
    }


def print_plan(found: Plan, console: Console) -> None:
    """The table, each number with its unit."""
    height, width = found.size
    table = Table(title=f"{', '.join(found.tasks)} at {height} x {width}, interaction {found.interaction}")
    for heading in ("part", "parameters (M)", "MACs (G)", "FLOPs (G) = 2 MACs", "share of MACs"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    total = sum(found.macs.values())
    for part in PARTS:
        if found.parameters[part] or found.macs[part]:
            _add_row(table, part, found.parameters[part], found.macs[part], total)
    table.add_section()
    _add_row(table, "network", sum(found.parameters.values()), total, total)
    console.print(table)
    console.print("MACs of matrix products and convolutions of one prediction; of one image.")
    console.print(f"Training: {2 * found.training_macs / GIGA:,.1f} GFLOPs an image, forward and backward.")
    console.print(
        f"Kept for the backward pass ({found.dtype}): {found.kept_bytes / GIB:.2f} GiB an image, before the compiler."
    )
    total_parameters = sum(found.parameters.values())
    if found.trained < total_parameters:
        console.print(f"Trained: {found.trained / 1e6:,.2f} M of the parameters; the rest is frozen.")
    state = 4 * (total_parameters + 3 * found.trained)
    console.print(f"Parameters, gradients and two moments in float32: {state / GIB:.2f} GiB.")
    for path, shape, size in found.largest[:1]:
        console.print(f"Largest array of a prediction: {list(shape)}, {size / GIB:.3f} GiB, in {path}.")


def _name(interaction: nn.Module) -> str:
    """The class, but sKEM for a KEM that projects onto a simplex."""
    name = type(interaction).__name__
    return "sKEM" if name == "KEM" and getattr(interaction, "etf_vertices", None) is not None else name


def _add_row(table: Table, part: str, parameters: int, macs: int, total: int) -> None:
    share = f"{macs / total:.1%}" if total else ""
    table.add_row(part, f"{parameters / 1e6:,.2f}", f"{macs / GIGA:,.2f}", f"{2 * macs / GIGA:,.2f}", share)


def part_of(path: str) -> str | None:
    """Which of `PARTS` an operation belongs to, by its path in a trace or a compiled program; None: none of them."""
    found = names.part_of(path)
    return None if found is None else HEADINGS[found]


def _sums(counts: dict[str, int]) -> dict[str, int]:
    """Counts by module path, summed by `PARTS`; what has no part, as the resize of the image, comes before them all."""
    return dict.fromkeys(PARTS, 0) | by_part(counts, lambda path: part_of(path) or "backbone")


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
