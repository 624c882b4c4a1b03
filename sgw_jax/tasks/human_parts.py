"""Human parts: segmentation of people into body parts; images without a person are wholly ignored."""

import dataclasses
from typing import ClassVar

from sgw_jax.tasks.semseg import SemSeg


@dataclasses.dataclass(frozen=True)
class HumanParts(SemSeg):
    """Loss and metrics of `SemSeg`; the default classes are PASCAL-Context's background and six parts.

    The weight 2 is ATRC's and InvPT's. An image without parts must come with every label 255, as the data pipeline
    writes it, so that the background of such images does not count.
    """

    kind: ClassVar[str] = "human_parts"
    configured: ClassVar[tuple[str, ...]] = ()
    balances_crops: ClassVar[bool] = False
    DEFAULT_NAMES: ClassVar[tuple[str, ...]] = (
        "background",
        "head",
        "torso",
        "upper arms",
        "lower arms",
        "upper legs",
        "lower legs",
    )

    name: str = "human_parts"
    weight: float = 2.0
    num_classes: int = 7
