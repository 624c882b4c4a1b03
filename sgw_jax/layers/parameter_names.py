"""What parameters are called: the one place that knows what a path such as ``backbone/blocks/norm1/scale`` means."""

import re
from collections.abc import Iterable, Sequence

# Collections of a train state and of a checkpoint.
PARAMS, EMA, CONSTANTS = "params", "ema", "constants"

# The parts of a network, by the first word of the path; all but the backbone and the interaction are one a task.
BACKBONE, STEM, INTERACTION, HEAD, PRELIMINARY = "backbone", "stem", "interaction", "head", "preliminary"

# What matrix products and convolutions are made of: biases, norms, slots, embeddings and gates have other names.
KERNEL = "kernel"

_PART = re.compile(rf"(?:^|/)({BACKBONE}|{STEM}|{INTERACTION}|{HEAD}|{PRELIMINARY})\d*(?:_[^/]*)?(?:/|$)")
# The low-rank factors of a matrix, below the module that holds its kernel (layers/lora.py).
LORA = "lora"

# What a model adds to a backbone: at its initial values even where the rest is pretrained.
_ADDED = re.compile(rf"(pyramid|lateral|norm_stage)|.*/{LORA}/")
_STAGE, _PAIRS = re.compile(r"stage(\d)/"), re.compile(r"stage(\d)/(regular|shifted)/")
_MERGE, _DOWNSAMPLE = re.compile(r"merge(\d)/"), re.compile(r"downsample(\d)/")


def of_task(part: str, task: str, stride: int | None = None) -> str:
    """A task's stem, head or preliminary head; ``stride``: of a coarser scale (stem16_depth)."""
    return f"{of_scale(part, stride)}_{task}"


def of_scale(part: str, stride: int | None) -> str:
    """A part of a coarser scale (interaction16); None is the finest."""
    return part if stride is None else f"{part}{stride}"


def part_of(path: str) -> str | None:
    """Which part of a network a path lies in, a parameter's or an operation's in a program; None: in none of them."""
    found = _PART.search(path)
    return found[1] if found else None


def owner(path: str, tasks: Sequence[str], mixes: bool) -> str | None:
    """The task that alone uses a parameter; None if tasks share it.

    Heads belong to their task. Stems do too unless the interaction mixes tasks, when stem t feeds every task.
    """
    parts = rf"{HEAD}|{PRELIMINARY}" if mixes else rf"{HEAD}|{PRELIMINARY}|{STEM}\d*"
    found = re.match(rf"({parts})_(?P<task>[^/]+)/", path)
    return found["task"] if found and found["task"] in tasks else None


def is_kernel(path: str) -> bool:
    """Whether the path ends at a kernel."""
    return path.rpartition("/")[2] == KERNEL


def is_lora(path: str) -> bool:
    """Whether it is a low-rank factor."""
    return f"/{LORA}/" in path


def evaluated(paths: Iterable[str]) -> str:
    """Which collection of a saved state is evaluated: `EMA` where there is an average, else `PARAMS`."""
    return EMA if any(path.startswith(f"{EMA}/") for path in paths) else PARAMS


# --- inside the backbone ---------------------------------------------------------------------------------------------


def in_backbone(path: str) -> str | None:
    """The path from the backbone on; None outside it."""
    return path.removeprefix(f"{BACKBONE}/") if path.startswith(f"{BACKBONE}/") else None


def is_added(path: str) -> bool:
    """Whether the library adds a parameter, by its path in the backbone, to the pretrained network."""
    return _ADDED.match(path) is not None


def stage_depths(shapes: dict[str, tuple[int, ...]]) -> dict[int, int]:
    """Stage -> its number of blocks: {0: depth} of a ViT, {1: ..., 2: ..., 3: ..., 4: ...} of a Swin or ConvNeXt;
    ``shapes`` by the path in the backbone."""
    depths: dict[int, int] = {}
    for path, shape in shapes.items():
        if path.startswith("blocks/"):
            depths[0] = shape[0]
        elif stage := _STAGE.match(path):
            depths[int(stage[1])] = (2 if _PAIRS.match(path) else 1) * shape[0]
    return depths


def layers_of(path: str, depths: dict[int, int]) -> int | list[int]:
    """The layer of a parameter by its path in the backbone; of a stack the layers along its first axis."""
    before = {stage: sum(depth for other, depth in depths.items() if other < stage) for stage in depths}
    if path.startswith("blocks/"):
        return list(range(1, depths[0] + 1))
    if stage := _PAIRS.match(path):
        first = before[int(stage[1])] + (1 if stage[2] == "regular" else 2)
        return list(range(first, first + depths[int(stage[1])], 2))
    if stage := _STAGE.match(path):
        return list(range(before[int(stage[1])] + 1, before[int(stage[1])] + depths[int(stage[1])] + 1))
    if downsample := _DOWNSAMPLE.match(path):  # of the block behind it
        return before[int(downsample[1]) + 1] + 1
    if merge := _MERGE.match(path):
        return before[int(merge[1]) + 1]  # of the block before it
    return sum(depths.values()) + 1 if path.startswith("norm/") else 0
