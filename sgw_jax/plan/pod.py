"""A training step compiled for a mesh of devices, there or not: what it holds, computes and exchanges, and how long."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.experiment.experiment import Experiment
from sgw_jax.layers.parameter_names import BACKBONE
from sgw_jax.plan.chips import GIB, Chip, chip_of
from sgw_jax.plan.cost import multiply_accumulates
from sgw_jax.plan.hlo import memory_by, traffic
from sgw_jax.plan.network import part_of, target_shapes
from sgw_jax.run.state import abstract_state
from sgw_jax.run.steps import compiled_steps
from sgw_jax.sharding import batch_sharding

TOPOLOGIES = "v5e:4x4, v5e:16x16, v6e:8x8, v5p:2x2x1, v5p:4x4x4"


@dataclasses.dataclass(frozen=True)
class PodPlan:
    """One training step on a mesh, by device.

    arguments, temporaries, peak: bytes, the compiler's; peak is arguments, temporaries and what leaves without taking
    an argument's place. flops: of the step as it is, recomputation included, by matrix products and convolutions.
    useful: FLOPs that count towards MFU: the forward pass, and twice as many for the backward pass of all but what is
    frozen, which has none. exchanged, number, memory: see `Traffic`. needed: where the step does not fit, the bytes
    that the compiler asked for, and no other figure of the program. memory_by: memory by part of the network, "rest"
    for the losses, the optimiser and what the compiler added.
    """

    device: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    flops: float
    useful: float
    arguments: float = 0
    temporaries: float = 0
    peak: float = 0
    exchanged: dict[str, float] = dataclasses.field(default_factory=dict)
    number: dict[str, int] = dataclasses.field(default_factory=dict)
    memory: float = 0
    memory_by: dict[str, float] = dataclasses.field(default_factory=dict)
    needed: float | None = None

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Roofline: seconds of computation, memory and exchange, each alone at the chip's peak, and of a step.

        A step takes at least the longest of the three (all overlap) and at most about their sum (nothing does).
        """
        parts = {
            "compute": self.flops / chip.flops,
            "memory": self.memory / chip.bandwidth,
            "exchange": sum(self.exchanged.values()) / chip.link,
        }
        return parts | {"at least": max(parts.values()), "no overlap": sum(parts.values())}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the estimate where the chip is known."""
        chip = chip_of(self.device)
        return dataclasses.asdict(self) | ({} if chip is None else {"seconds": self.seconds(chip)})


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU slice such as "v5e:4x4", to compile for; the machine needs no TPU, but ``jax[tpu]``.

    Raises:
      ValueError: jax[tpu] is not installed, or there is no such slice.
    """
    try:
        from jax.experimental import topologies  # no public name yet
    except ImportError as error:
        raise InputError(f"--topology={name}: jax {jax.__version__} compiles for no absent device.") from error
    # Without them the TPU's library asks the network which machine it is on, in vain and aloud, and lets one process at
    # a time load it, although a compiler takes no chip.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    quiet["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    for variable, value in quiet.items():
        os.environ.setdefault(variable, value)
    if not re.fullmatch(r"\w+:\d+(x\d+){1,2}", name):
        raise InputError(f"--topology={name}: expected a TPU slice such as {TOPOLOGIES}.")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        if "libtpu" in reason or "not found" in reason.lower() or isinstance(error, ImportError):
            raise InputError(
                f"--topology={name} compiles for a TPU by its compiler: pip install -e '.[train,tpu]'. ({reason})"
            ) from error
        raise InputError(f"--topology={name}: {reason} Slices are named like {TOPOLOGIES}.") from error


def pod_plan(experiment: Experiment) -> PodPlan:
    """Compiles the experiment's training step for its mesh, from shapes alone.

    Raises:
      ValueError: what a run would refuse at its start.
    """
    state, mesh, rows = abstract_state(experiment), experiment.mesh, experiment.settings.batch_size
    step, _ = compiled_steps(experiment, state)
    shapes = target_shapes(experiment.tasks, experiment.size, rows)
    shapes["image"] = jax.ShapeDtypeStruct((rows, *experiment.size, 3), jnp.float32)
    place = batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in shapes.items()}
    forward = jax.eval_shape(lambda: jnp.zeros((rows, *experiment.size, 3)))
    variables = {"params": state.params, "constants": state.constants}

    with jax.set_mesh(mesh):
        macs = sum(multiply_accumulates(step, state, batch).values())
        key = jax.eval_shape(lambda: jax.random.key(0))
        predicted = multiply_accumulates(
            lambda v, x, k: experiment.model.apply(v, x, train=True, rngs={"drop_path": k}), variables, forward, key
        )
        known = PodPlan(
            device=mesh.devices.flat[0].device_kind,
            devices=mesh.size,
            mesh=dict(mesh.shape),
            batch_size=rows,
            flops=2 * macs / mesh.size,
            useful=_useful(experiment, state.params, predicted) / mesh.size,
        )
        try:
            compiled = step.lower(state, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            # Either all that the program needs or, where these alone are too much, its temporaries.
            needed = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", str(error))
            if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
                raise
            scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
            return dataclasses.replace(known, needed=float(needed[1]) * scale[needed[2]])
    memory, program = compiled.memory_analysis(), compiled.as_text()
    moved = traffic(program)
    leaves = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return dataclasses.replace(
        known,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes + memory.temp_size_in_bytes + leaves,
        exchanged=moved.exchanged,
        number=moved.number,
        memory=moved.memory,
        memory_by=memory_by(program, lambda instruction: part_of(instruction.path) or "rest"),
    )


def _useful(experiment: Experiment, params: Any, macs: Mapping[str, int]) -> int:
    """What learns in part counts whole: a stack of blocks of which the lowest are frozen."""
    learning = params if experiment.trained is None else jax.eval_shape(experiment.trained, params)
    frozen = params[BACKBONE].keys() - learning.get(BACKBONE, {}).keys()
    no_backward = re.compile(rf"(?:^|/){BACKBONE}/(?:{'|'.join(frozen)})(?:/|$)" if frozen else "(?!)")
    return sum((2 if no_backward.search(path) else 6) * number for path, number in macs.items())


def print_pod_plan(found: PodPlan, console: Console) -> None:
    """The plan in words; estimates are called so."""
    chip = chip_of(found.device)
    mesh = ", ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    console.print(Text.assemble((f"{found.devices} x {chip.name if chip else found.device}", "bold"), f", mesh {mesh}"))
    console.print(f"Batch {found.batch_size}: {found.batch_size / found.devices:g} images a device.")
    if found.needed is not None:
        have = f" of {chip.memory / GIB:.2f}" if chip else ""
        console.print(
            Text.assemble(
                ("It does not fit", "red"),
                f": the step needs {found.needed / GIB:.2f}{have} GiB a device. What helps, in this order: "
                "--config.backbones.NAME.remat=full (a third more compute), a smaller batch_size or a larger "
                "accumulate, a larger mesh.fsdp (parameters and moments), a larger mesh.context (activations).",
            )
        )
        return
    table = Table("a device", "GiB")
    table.columns[1].justify = "right"
    table.add_row("arguments: state and batch", f"{found.arguments / GIB:.2f}")
    table.add_row("temporaries", f"{found.temporaries / GIB:.2f}")
    have = f" of {chip.memory / GIB:.2f}" if chip else ""
    table.add_row("peak", f"{found.peak / GIB:.2f}{have}")
    console.print(table)
    for kind, sent in sorted(found.exchanged.items(), key=lambda item: -item[1]):
        console.print(f"{kind}: {found.number[kind]:,} a step, {sent / 1e6:,.1f} MB sent by a device.")
    if not found.exchanged:
        console.print("Nothing is exchanged between devices.")
    console.print(
        f"{found.flops / 1e12:,.3f} TFLOPs and {found.memory / 1e9:,.2f} GB to and from memory a device and step."
    )
    parts = sorted(found.memory_by.items(), key=lambda item: -item[1])
    if parts:
        console.print("Of the memory's: " + ", ".join(f"{name} {moved / 1e9:,.2f}" for name, moved in parts) + " GB.")
    if chip is None:
        console.print(f"There are no published figures of {found.device} here, hence no estimate of the time.")
        return
    times = found.seconds(chip)
    alone = ", ".join(f"{part} {times[part] * 1e3:.2f}" for part in ("compute", "memory", "exchange"))
    console.print(f"Estimate (roofline at the published peaks; ms): {alone}.")
    rows = [(name, times[name]) for name in ("at least", "no overlap") if times[name]]
    for name, seconds in rows:
        rate, mfu = found.batch_size / seconds, found.useful / seconds / chip.flops
        console.print(f"  {name}: {seconds * 1e3:.2f} ms a step, {rate:,.0f} images/s, MFU {mfu:.0%}")
    console.print(f"Chip: {chip.flops / 1e12:.0f} TFLOP/s bf16, {chip.bandwidth / 1e9:.0f} GB/s, {chip.source}")
