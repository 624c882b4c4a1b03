"""ONNX: one file for any number of images, whose maps in onnxruntime are JAX's; what cannot be made of it is said."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import lax
from test_stablehlo import OPTIONS, SIZE, TASK_LIST, network, noise

from sgw_jax.backbones import BACKBONES
from sgw_jax.data_pipelines.errors import FileError, InputError, MissingPackageError
from sgw_jax.data_pipelines.transforms import normalise
from sgw_jax.export.onnx import file as onnx_file
from sgw_jax.export.onnx.file import IMAGES, IR, METADATA, export_onnx, in_dtype, save_onnx
from sgw_jax.export.onnx.lowering import OPSET
from sgw_jax.export.onnx.primitives import PRIMITIVES
from sgw_jax.export.onnx.program import Program

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-4  # of a map's largest value, where that is above 1


def session_of(model: Path | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def maps_of(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """What onnxruntime makes of the images."""
    session = session_of(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {IMAGES: images}), strict=True))


def exactly(model: Any, variables: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """Raw predictions in float64: in float32 either side may keep another token than the other where scores are as good
    as equal, and be right."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        pixels = np.stack([normalise(image) for image in images]).astype(np.float64)
        return jax.device_get(jax.jit(in_dtype(model, jnp.float64).apply)(wide, pixels))


def assert_near(path: Path, model: Any, variables: Any, images: np.ndarray) -> None:
    """Onnxruntime's maps are those of the network's code; labels where more than the tolerance decides them."""
    found, raw = maps_of(path, images), exactly(model, variables, images)
    assert list(found) == [task.name for task in model.tasks]
    for task in model.tasks:
        wanted, scale = np.asarray(task.decode(raw[task.name].astype(np.float32))), np.abs(raw[task.name]).max()
        assert (found[task.name].dtype, found[task.name].shape) == (wanted.dtype, wanted.shape)
        if task.target["kind"] == "labels":
            second, first = np.sort(raw[task.name], axis=-1)[..., -2:].transpose(3, 0, 1, 2)
            clear = first - second > TOLERANCE * max(1, scale)
            assert clear.mean() > 0.9
            np.testing.assert_array_equal(found[task.name][clear], wanted[clear])
        else:
            atol = np.asarray(TOLERANCE * max(1, np.abs(wanted).max()))
            if task.kind == "normals":  # the direction of a shorter vector is as much less certain
                atol = atol * np.maximum(1, scale / np.linalg.norm(raw[task.name], axis=-1, keepdims=True))
                assert np.mean(atol < 100 * TOLERANCE) > 0.9
            assert (np.abs(found[task.name] - wanted) <= atol).all(), task.name


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a KEM network; tests that damage it copy it."""
    path = tmp_path_factory.mktemp("onnx") / "scenes.onnx"
    export_onnx(*network(), TASK_LIST, SIZE, path, step=7)
    return path


# --- the same arrays

Tensor = jax.Array
WEIGHTS = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(3, 2, 5, 4)).astype(np.float32)

# x: (batch, 4, 6, 5) float32 in steps of 1/8, so that many entries are equal.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "argmax": lambda x: jnp.argmax(x, -1),
    "argmin of an axis": lambda x: jnp.argmin(x, 1),
    "attention": lambda x: jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", x, x)),
    "broadcast against the batch": lambda x: jnp.broadcast_to(jnp.arange(5.0), x.shape) * 2 + x[:1].sum(),
    "clip": lambda x: jnp.clip(x, -0.5, 0.75),
    "comparisons": lambda x: (x > 0) & (x <= 1) | ~(x != 0.5) ^ (x >= 2) & (x < 3),
    "concatenate": lambda x: jnp.concatenate([x, jnp.ones_like(x), x[..., :2]], -1),
    "convolution": lambda x: lax.conv_general_dilated(
        x, KERNEL, (2, 1), ((1, 0), (0, 2)), rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    "cumulative sum": lambda x: jnp.cumsum(x, 2),
    "depth to space": lambda x: x[..., :4].reshape(-1, 4, 6, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 12),
    "division of integers": lambda x: lax.div((8 * x).astype(jnp.int32), jnp.int32(3)),
    "exponentials": lambda x: jnp.exp(x) + jnp.expm1(x) + jnp.exp2(x) + jnp.log1p(jnp.abs(x)) + jnp.log(x * x + 1),
    "flip": lambda x: x[:, ::-1, ::2],
    "gelu": jax.nn.gelu,
    "gelu, exact": lambda x: jax.nn.gelu(x, approximate=False),
    "is finite": lambda x: jnp.isfinite(1 / x),
    "kernel first": lambda x: jnp.einsum("ij,bhwj->ibhw", WEIGHTS, x),
    "layer norm": lambda x: (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6),
    "map over the batch of constants": lambda x: jnp.broadcast_to(WEIGHTS, (x.shape[0], 5, 5)) @ x[:, 0].mT,
    "maximum": lambda x: jnp.maximum(x.max((1, 2)), x.min((1, 3))[:, :5]),
    "narrow product": lambda x: jnp.einsum("bhwc,cd->bhwd", x.astype(jnp.float16), WEIGHTS.astype(jnp.float16)),
    "no batch": lambda x: jnp.tanh(jnp.sin(WEIGHTS) + jnp.cos(WEIGHTS)),
    "outer product": lambda x: jnp.einsum("bhw,bc->bhwc", x[..., 0], x[:, 0, 0]),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (3, 0)), constant_values=7),
    "powers": lambda x: jnp.square(x) + x**3 + jnp.abs(x) ** 0.5 + jnp.sqrt(jnp.abs(x)) + jnp.sign(x),
    "quantifiers": lambda x: jnp.all(x > -1, -1) | jnp.any(x > 1, -1),
    "rematerialised": jax.checkpoint(lambda x: jax.nn.silu(x)),
    "remainder": lambda x: lax.rem(x, jnp.float32(0.75)),
    "repeat": lambda x: jnp.tile(x, (1, 2, 1, 3)),
    "resize": lambda x: jax.image.resize(x, (x.shape[0], 7, 9, 5), "bilinear"),
    "round": lambda x: jnp.round(4 * x) + jnp.floor(x) + jnp.ceil(x),
    "rows by place": lambda x: x[:, jnp.array([3, 0, 0])],
    "rows by place of the image": lambda x: jnp.take_along_axis(x, (jnp.abs(4 * x)).astype(jnp.int32) % 6, 2),
    "rows of a table": lambda x: jnp.asarray(WEIGHTS)[jnp.abs(x[:, 0]).astype(jnp.int32) % 5],
    "scan": lambda x: lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum(-1)), x, jnp.stack([WEIGHTS, WEIGHTS.T]))[0],
    "scan, what its steps give": lambda x: lax.scan(lambda c, w: (c @ w, c.sum(-1)), x, WEIGHTS[None])[1][0],
    "scan over parts": lambda x: lax.map(lambda part: part.sum(-1), x.transpose(1, 0, 2, 3)),
    "select": lambda x: jnp.where(x > 0, x, -3.0),
    "rows at the end": lambda x: jnp.pad(x, ((0, 0), (0, 0), (1, 2), (0, 0)), mode="edge"),
    "split": lambda x: sum(jnp.split(x[..., :4], 4, -1)),
    "stack": lambda x: jnp.stack([x, 2 * x], 2),
    "top-k": lambda x: lax.top_k(x.reshape(-1, 120), 9)[1],
    "top-k, nearly": lambda x: lax.approx_max_k(x.reshape(-1, 120), 9)[0],
    "windows": lambda x: (x.reshape(-1, 2, 2, 3, 2, 5).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 5) + 1) @ WEIGHTS,
}


def functions(images: Tensor) -> dict[str, Tensor]:
    x = images.astype(jnp.float32) / 8 - 2
    return {name: function(x) for name, function in FUNCTIONS.items()}


def test_every_primitive_is_the_operators_that_it_is_made_of() -> None:
    program = Program(lambda parameters, images: functions(images), {}, (4, 6, 5), IMAGES)
    model = program.graph.model(program.images, program.outputs, OPSET, IR, "test", "0")
    onnx.checker.check_model(model, full_check=True)
    session = session_of(model.SerializeToString())
    for count in (1, 3):
        images = np.random.default_rng(count).integers(0, 32, (count, 4, 6, 5), dtype=np.uint8)
        wanted = jax.device_get(jax.jit(functions)(images))
        names = list(wanted)
        for name, found in zip(names, session.run(names, {IMAGES: images}), strict=True):
            assert (found.dtype, found.shape) == (wanted[name].dtype, wanted[name].shape), name
            if wanted[name].dtype.kind == "f":
                atol = float(np.finfo(wanted[name].dtype).eps) * 32 * max(1, np.abs(wanted[name]).max())
                np.testing.assert_allclose(found, wanted[name], rtol=0, atol=atol, err_msg=name)
            else:  # of equal ones the first, as in JAX
                np.testing.assert_array_equal(found, wanted[name], err_msg=name)


@pytest.mark.parametrize("count", [1, 3])
def test_a_network_with_kem(count: int, exported: Path) -> None:
    assert_near(exported, *network(), noise(count, *SIZE))


BALANCED = {"balanced": True, "slot_exchange": True, "pair_gate": True, "task_gate": False}


@pytest.mark.slow
@pytest.mark.parametrize(("interaction", "options"), [*((name, {}) for name in OPTIONS), ("kem", BALANCED)])
def test_every_interaction(interaction: str, options: dict[str, bool], tmp_path: Path) -> None:
    given = network(interaction, **options)
    export_onnx(*given, TASK_LIST, SIZE, tmp_path / "file")
    for count in (1, 3):
        assert_near(tmp_path / "file", *given, noise(count, *SIZE))


TINY = {"width": 8, "depth": 4, "num_heads": 2}
BACKBONE_SIZES: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit": ("vit", {**TINY, "image_size": (32, 64)}, "skem"),
    "vit, by parts": ("vit", {**TINY, "image_size": (32, 64), "attention_chunk": 5, "patch_embed": "conv"}, "kem"),
    "dinov2": ("dinov2", {**TINY, "registers": 2}, "kem"),
    "dinov3": ("dinov3", {**TINY, "gated": True}, "skem"),
    "swin": ("swin", {"width": 8, "depths": (2,) * 4, "num_heads": (1,) * 4, "window_size": 2}, "kem"),
    "convnext": ("convnext", {"width": 8, "depths": (1,) * 4}, "kem"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONE_SIZES)
def test_every_family_of_backbones(name: str, tmp_path: Path) -> None:
    kind, options, interaction = BACKBONE_SIZES[name]
    given = network(interaction, BACKBONES[kind](**options))
    export_onnx(*given, TASK_LIST, (32, 64), tmp_path / "file")
    for count in (1, 2):  # of the third, ConvNeXt has two tokens for one place whose scores rounding cannot tell apart
        assert_near(tmp_path / "file", *given, noise(count, 32, 64))


def test_half_precision(exported: Path, tmp_path: Path) -> None:
    path, given = tmp_path / "file", network("none")
    about = export_onnx(*given, TASK_LIST, SIZE, path, precision="float16")
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert stored["params/stem_depth/conv/kernel"] == onnx.TensorProto.FLOAT16
    wanted = export_onnx(*given, TASK_LIST, SIZE, tmp_path / "wide")
    assert path.stat().st_size < (tmp_path / "wide").stat().st_size
    # Eleven bits of a number, over the ten or so layers that a value goes through.
    assert 0 < about["checked"]["normals"]["difference"] < 10 * 2**-10
    assert wanted["checked"]["normals"]["largest"] < TOLERANCE
    images = noise(2, *SIZE)
    for name, values in maps_of(tmp_path / "wide", images).items():
        assert maps_of(path, images)[name].dtype == values.dtype  # the maps stay as they are


def test_numbers_that_float16_does_not_have(tmp_path: Path) -> None:
    model, variables = network("none")
    far = jax.tree.map(lambda leaf: 1e5 * leaf, variables)
    with pytest.raises(InputError, match=r"not a number in onnxruntime .* beyond 65,504 are none in float16"):
        export_onnx(model, far, TASK_LIST, SIZE, tmp_path / "file", precision="float16")
    assert not list(tmp_path.iterdir())


# --- what the file says, and who reads it


def test_the_file_says_what_a_reader_needs(exported: Path) -> None:
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    (images,) = model.graph.input
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == ["batch", *SIZE, 3]
    assert any(tensor.name.startswith("params/") for tensor in model.graph.initializer)
    about = json.loads({entry.key: entry.value for entry in model.metadata_props}[METADATA])
    semseg, depth, normals = about["tasks"]
    assert semseg["classes"] == list(TASK_LIST[0].class_names)
    assert (semseg["dtype"], depth["dtype"], depth["unit"], normals["channels"]) == ("uint8", "float32", "m", 3)
    assert (about["opset"], about["precision"], about["step"], about["size"]) == (OPSET, "float32", 7, list(SIZE))


def lines() -> str:
    """Those of docs/deploy.md that run a file, for images of this test."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (snippet,) = (part for part in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "onnxruntime" in part)
    assert "jax" not in snippet
    return re.sub(r"(?m)^images = .*$", 'images = np.load("images.npy")', snippet)


@pytest.mark.slow
def test_a_fresh_process_with_onnxruntime_alone(exported: Path, tmp_path: Path) -> None:
    images = noise(3, *SIZE)
    np.save(tmp_path / "images.npy", images)
    shutil.copy(exported, tmp_path)
    code = f"""
import sys

class Alone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "flax", "sgw_jax", "onnx"):
            raise AssertionError(f"{{name}} is imported")

sys.meta_path.insert(0, Alone())
{lines()}
np.savez("maps.npz", **maps)
"""
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, check=True)
    with np.load(tmp_path / "maps.npz") as maps:
        for name, values in maps_of(exported, images).items():
            np.testing.assert_array_equal(maps[name], values)


def test_parameters_beside_the_file(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    given = (*network(), TASK_LIST, SIZE, path)
    monkeypatch.setattr(onnx_file, "MOST_INSIDE", 1000)
    with pytest.raises(InputError, match=r"ends at 2 GiB; write them beside it \(--parameters=beside\)"):
        export_onnx(*given)
    assert not list(tmp_path.iterdir())
    for _ in range(2):  # the second in place of the first
        export_onnx(*given, parameters="beside")
        assert {file.name for file in tmp_path.iterdir()} == {"file", "file.data"}
    images = noise(2, *SIZE)
    for name, values in maps_of(exported, images).items():
        np.testing.assert_array_equal(maps_of(path, images)[name], values)


# --- what can be wrong


def test_what_onnx_has_no_operators_for_is_named() -> None:
    for function, message in (
        (lambda _, images: {"sorted": jnp.sort(images)}, "computes sort, which export to ONNX has no operators for"),
        (lambda _, images: {"pairs": jnp.outer(images + 1.0, images + 1.0).ravel()}, "no multiple of the batch"),
    ):
        with pytest.raises(InputError, match=message):
            Program(function, {}, (2, 3, 1), IMAGES)


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRIMITIVES, "exp", PRIMITIVES["neg"])
    for parameters in ("inside", "beside"):
        with pytest.raises(InputError, match=r"onnxruntime's \w+ is not JAX's"):
            export_onnx(*network(), TASK_LIST, SIZE, tmp_path / "file", parameters=parameters)
        assert not list(tmp_path.iterdir())


def test_options_that_there_are_not(tmp_path: Path) -> None:
    model, variables = network()
    with pytest.raises(InputError, match=r"precision is 'int8'; it must be one of \['float32', 'float16'\]"):
        export_onnx(model, variables, TASK_LIST, SIZE, tmp_path / "file", precision="int8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'inside' or 'beside'"):
        export_onnx(model, variables, TASK_LIST, SIZE, tmp_path / "file", parameters="away")  # type: ignore[arg-type]
    there: Any = SimpleNamespace(module=model, variables=variables, tasks=TASK_LIST, size=SIZE, step=1)
    with pytest.raises(FileError, match=r"--output=.* is there already"):
        save_onnx(there, tmp_path)
    with pytest.raises(InputError, match="it is of a SimpleNamespace; export the run"):
        save_onnx(SimpleNamespace(module=there), tmp_path / "file")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_a_package(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf'needs {package},.*pip install "sgw_jax\[onnx\]"'):
        export_onnx(*network(), TASK_LIST, SIZE, tmp_path / "file")
