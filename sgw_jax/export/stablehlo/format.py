"""What the file of a network as StableHLO holds, by which names, and what images its programs take.

The file is a zip archive, and as NumPy reads it an npz:

    metadata.json         tasks, classes, colours, sizes, versions: all that a reader needs to know
    predict.jax_export    (parameters, uint8 images (batch, height, width, 3)) -> {task: decoded maps}
    predict_any_size.jax_export   the same for images of other sizes, where the network takes them
    raw.jax_export        (parameters, normalised float32 images) -> {task: raw predictions}, for `Predictor`
    params/NAME.npy ...   the parameters by name, unless they are beside the file, in FILE.safetensors
"""

from typing import Any, NamedTuple

from jax import export

from sgw_jax.data_pipelines.errors import extra_named

PLATFORMS = ("cpu", "cuda", "tpu")
FORMAT, VERSION = "sgw_jax stablehlo", 1
METADATA, PREDICT, RAW = "metadata.json", "predict.jax_export", "raw.jax_export"
PREDICT_ANY_SIZE = "predict_any_size.jax_export"
STRIDE = 32  # the coarsest of all backbones here: for files that do not say theirs
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every member: the same network makes the same bytes

Parameters = dict[str, Any]  # by path: {"params/backbone/...": array, "constants/...": array}


class Dimensions(NamedTuple):
    """What images the programs take, beside any number of them.

    Attributes:
      size: height and width, those of training.
      multiple: with the program for any size height and width may be multiples of it; None: there is no such program.
      least: then neither is less.
      reason: why there is none.
    """

    size: tuple[int, int]
    multiple: int | None = None
    least: int | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.multiple is None:
            return f"{self.size[0]} x {self.size[1]} alone ({self.reason})"
        return f"{self.size[0]} x {self.size[1]}, or multiples of {self.multiple} from {self.least} on"

    def shape(self) -> tuple[Any, ...]:
        """Of images of the one size, to trace with."""
        return (*export.symbolic_shape("batch"), *self.size, 3)

    def any_shape(self) -> tuple[Any, ...] | None:
        """Of images of any size, to trace with; None if there is no such program."""
        if self.multiple is None or self.least is None:
            return None
        least = self.least // self.multiple
        text = f"batch, {self.multiple}*height, {self.multiple}*width, 3"
        return tuple(export.symbolic_shape(text, constraints=[f"height >= {least}", f"width >= {least}"]))

    def takes(self, size: tuple[int, ...]) -> bool:
        """Whether images of this height and width can be given."""
        if self.multiple is None or self.least is None:
            return size == self.size
        return size == self.size or (min(size) >= self.least and not any(length % self.multiple for length in size))


def check_flatbuffers(what: str) -> None:
    """Raises an ImportError that names the extra, where what writes and reads programs is not installed."""
    with extra_named(what, "export"):
        import flatbuffers  # noqa: F401  jax.export asks for it late, in words of its own
