"""Figures of accelerator chips, for estimates; each from its maker's published specification."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one chip: peak bf16 FLOP/s, main memory in bytes and its bandwidth in bytes/s.

    link: bytes/s that it can send round a ring of the interconnect, both ways together; host: chips of one host;
    source: where the figures are published.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    host: int
    source: str


# The links are those of one axis of the torus, 2 x the one-way figure: a mesh axis may use more, a slice without
# wrap-around less.
_TPU = "cloud.google.com/tpu/docs/{}; links: jax-ml.github.io/scaling-book/tpus"
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1228e9, 90e9, 4, _TPU.format("v4")),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 90e9, 4, _TPU.format("v5e")),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2765e9, 180e9, 4, _TPU.format("v5p")),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1640e9, 180e9, 4, _TPU.format("v6e")),
    "h100": Chip("NVIDIA H100 SXM", 989e12, 80e9, 3350e9, 450e9, 8, "nvidia.com/data-center/h100"),
    "h200": Chip("NVIDIA H200 SXM", 989e12, 141e9, 4800e9, 450e9, 8, "nvidia.com/data-center/h200"),
}

# What JAX calls their devices, as a part of `device_kind`.
KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e", "v4": "v4"}
KINDS |= {"H100": "h100", "H200": "h200"}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device; None if it is not in the table (a CPU)."""
    return next((CHIPS[name] for part, name in KINDS.items() if part in device_kind), None)
