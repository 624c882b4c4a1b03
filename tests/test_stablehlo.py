"""StableHLO: one file, any number of images, run by JAX alone to the same bits; what is wrong with a file is said."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from sgw_jax.backbones import BACKBONES
from sgw_jax.data_pipelines.errors import InputError, MissingFileError, MissingPackageError
from sgw_jax.data_pipelines.transforms import normalise
from sgw_jax.export.stablehlo import PLATFORMS, export_stablehlo, load_stablehlo
from sgw_jax.export.stablehlo.format import METADATA, PREDICT, Dimensions
from sgw_jax.interactions import INTERACTIONS
from sgw_jax.layers.placement import Placement
from sgw_jax.layers.resize import pad_to_multiple
from sgw_jax.model import MultiTaskModel
from sgw_jax.prediction.predictor import Predictor
from sgw_jax.tasks import TASKS, SemSeg

pytest.importorskip("flatbuffers", reason="the extra [export]")

ROOT = Path(__file__).parent.parent
SIZE = (8, 16)
EPS = float(np.finfo(np.float32).eps)
TASK_LIST = (SemSeg(num_classes=3), TASKS["depth"](), TASKS["normals"]())
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {"mlp_width": 4},
    "cross_attention": {"num_heads": 2, "query_chunk": None},
    "kem": {"num_slots": 3, "num_heads": 2, "top_k": 4, "pre_norm": True, "task_gate": True},
    "skem": {"num_slots": 3, "top_k": 4, "etf_vertices": 5, "task_embedding": True, "rounds": 2},
    "shared_workspace": {"num_slots": 3, "top_k": 4},
    "within_tasks": {"num_slots": 3, "top_k": 4},
}


class Patches(nn.Module):
    """The smallest backbone: a cell of 4 x 4 pixels is a linear map of them."""

    strides = (4,)

    @nn.compact
    def __call__(self, image, train=False):
        return {4: nn.Conv(8, (4, 4), (4, 4), "VALID", name="patches")(pad_to_multiple(image, 4))}


def network(interaction: str = "kem", backbone: nn.Module | None = None, tasks=TASK_LIST, **options: Any):
    """A model and parameters of unit size, which nothing was compiled for."""
    mixed = INTERACTIONS[interaction](**{**OPTIONS[interaction], **options})
    model = MultiTaskModel(tasks, backbone or Patches(), mixed, channels=8)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 64, 3)))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)


def maps_of(model: MultiTaskModel, variables: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """What the network's code makes of the images."""

    def decoded(variables, images):
        raw = model.apply(variables, images)
        return {task.name: task.decode(raw[task.name]) for task in model.tasks}

    return jax.jit(decoded)(variables, np.stack([normalise(image) for image in images]))


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a KEM network; tests that damage it copy it."""
    path = tmp_path_factory.mktemp("export") / "scenes.stablehlo"
    export_stablehlo(*network(), TASK_LIST, SIZE, path, step=7)
    return path


# --- the same arrays


def made_of(interaction: str):
    """(the interaction's function, variables, maps, its program for any number and size of maps)."""
    placed = (
        {} if interaction in ("none", "cross_attention") else {"placement": Placement(("data",), "rows", strict=False)}
    )
    module = INTERACTIONS[interaction](**OPTIONS[interaction], **placed)
    rng = np.random.default_rng(0)
    features = {name: rng.normal(size=(3, 3, 5, 8)).astype(np.float32) for name in ("depth", "edges")}
    shapes = jax.eval_shape(module.init, jax.random.key(0), features)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    open_shape = export.symbolic_shape("batch, height, width, 8", constraints=["height >= 3", "width >= 3"])
    apply, open_maps = jax.jit(module.apply), dict.fromkeys(features, jax.ShapeDtypeStruct(open_shape, jnp.float32))
    return apply, variables, features, export.export(apply, platforms=PLATFORMS)(shapes, open_maps)


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_every_interaction_takes_any_number_and_size_of_maps(interaction: str) -> None:
    *_, program = made_of(interaction)
    assert {str(aval.shape) for aval in program.out_avals} == {"(batch, height, width, 8)"}
    assert program.platforms == PLATFORMS


@pytest.mark.slow
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_every_interaction_makes_the_same_bits(interaction: str) -> None:
    apply, variables, features, program = made_of(interaction)
    assert_same(jax.jit(program.call)(variables, features), apply(variables, features))


def test_a_network_takes_images_of_other_sizes(exported: Path) -> None:
    images = noise(2, 12, 8)
    found, wanted = load_stablehlo(exported)(images), maps_of(*network(), images)
    for name, values in wanted.items():
        assert found[name].shape == values.shape
        # Four terms of a bilinear sum in another order; vectors are then made of unit length.
        atol = 32 * EPS * float(np.abs(values).max())
        np.testing.assert_allclose(found[name], values, rtol=0, atol=atol, err_msg=name)


def test_a_predictor_takes_whole_images_through_it(exported: Path) -> None:
    image = noise(11, 9)
    predictor = Predictor.from_stablehlo(exported)
    model, variables = network()
    assert predictor.tasks == TASK_LIST
    assert (predictor.size, predictor.step) == (SIZE, 7)
    assert_same(predictor(image), Predictor(model, variables, TASK_LIST, SIZE)(image))


def lines() -> str:
    """Those of docs/deploy.md that load a file with JAX alone, for images of this test."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (snippet,) = (part for part in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "deserialize" in part)
    assert "sgw_jax" not in snippet
    return re.sub(r"(?m)^images = .*$", 'images = np.load("images.npy")', snippet)


def test_the_lines_of_the_page(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(2, *SIZE)
    np.save(exported.with_name("images.npy"), images)
    monkeypatch.chdir(exported.parent)
    names: dict[str, Any] = {}
    exec(lines(), names)
    assert_same(names["maps"], maps_of(*network(), images))


@pytest.mark.slow
def test_a_fresh_process_with_jax_alone_makes_the_same_arrays(exported: Path, tmp_path: Path) -> None:
    images = noise(3, *SIZE)
    np.save(tmp_path / "images.npy", images)
    shutil.copy(exported, tmp_path)
    code = f"""
import sys

class Alone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flax", "sgw_jax", "optax", "orbax", "safetensors", "jaxtyping"):
            raise AssertionError(f"{{name}} is imported")

sys.meta_path.insert(0, Alone())
{lines()}
np.savez("maps.npz", **maps)
"""
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}  # with the same flags: of the bits
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, check=True)
    with np.load(tmp_path / "maps.npz") as maps:
        assert_same(dict(maps), maps_of(*network(), images))


BACKBONE_SIZES = {
    "vit": ({"image_size": (32, 64), "width": 8, "depth": 4, "num_heads": 2}, "32 x 64 alone (the ViT's position"),
    "rotary": ({"width": 8, "depth": 4, "num_heads": 2, "rope_theta": 100.0, "class_token": True}, "multiples of 32"),
    "swin": ({"width": 8, "depths": (2,) * 4, "num_heads": (1,) * 4, "window_size": 2}, "32 x 64 alone (the masks"),
    "convnext": ({"width": 8, "depths": (1,) * 4}, "multiples of 32 from 32 on"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONE_SIZES)
def test_every_family_of_backbones(name: str, tmp_path: Path) -> None:
    """But for the order of sums, which is each compiled program's own: of at most 64 terms, in 30 products one behind
    another."""
    options, takes = BACKBONE_SIZES[name]
    tasks = TASK_LIST[1:]
    model, variables = network(backbone=BACKBONES["vit" if name == "rotary" else name](**options), tasks=tasks)
    about = export_stablehlo(model, variables, tasks, (32, 64), tmp_path / "file")
    assert takes in about["images"]
    images = noise(2, 32, 64)
    found, expected = load_stablehlo(tmp_path / "file")(images), maps_of(model, variables, images)
    assert found.keys() == expected.keys()
    for task, values in expected.items():
        np.testing.assert_allclose(found[task], values, rtol=0, atol=64 * 30 * EPS * np.abs(values).max(), err_msg=task)


# --- what the file says


def test_the_metadata_says_what_a_reader_needs(exported: Path) -> None:
    with np.load(exported) as file:
        about = json.loads(file[METADATA])
    assert about["dimensions"] == {"size": [8, 16], "multiple": 4, "least": 8, "reason": ""}
    semseg, depth, normals = about["tasks"]
    assert semseg["classes"] == list(TASK_LIST[0].class_names)
    assert [tuple(colour) for colour in semseg["colours"]] == list(TASK_LIST[0].colours)
    assert (semseg["dtype"], depth["dtype"], depth["unit"]) == ("uint8", "float32", "m")
    assert (normals["channels"], depth["channels"]) == (3, None)
    assert about["made_by"]["jax"] == jax.__version__
    assert about["platforms"] == list(PLATFORMS)
    assert about["images"].endswith("any number, 8 x 16, or multiples of 4 from 8 on")


def test_a_fixed_size_is_said_with_its_reason(tmp_path: Path) -> None:
    model, variables = network("cross_attention", query_chunk=5, tasks=TASK_LIST[1:2])
    about = export_stablehlo(model, variables, TASK_LIST[1:2], SIZE, tmp_path / "file", platforms=["cpu"])
    assert about["images"].endswith("8 x 16 alone (cross attention takes query_chunk = 5 at a time)")
    with pytest.raises(InputError, match=r"are 16 x 8 .* takes 8 x 16 alone"):
        load_stablehlo(tmp_path / "file")(noise(1, 16, 8))
    with pytest.raises(InputError, match="query_chunk = 5"):
        export_stablehlo(model, variables, TASK_LIST[1:2], SIZE, tmp_path / "file", any_size=True)


@pytest.mark.parametrize(("size", "taken"), [((8, 12), True), ((4, 16), False), ((8, 17), False)])
def test_which_sizes_are_taken(size: tuple[int, int], taken: bool) -> None:
    assert Dimensions(SIZE, 4, 8).takes(size) == taken
    assert not Dimensions(SIZE).takes(size)


# --- parameters beside, and what can be wrong


def test_parameters_beside_the_file(exported: Path, tmp_path: Path) -> None:
    path, weights = tmp_path / "file", tmp_path / "file.safetensors"
    model, variables = network()
    export_stablehlo(model, variables, TASK_LIST, SIZE, path, parameters="beside")
    with zipfile.ZipFile(path) as beside, zipfile.ZipFile(exported) as inside:
        assert not [name for name in beside.namelist() if name.endswith(".npy")]
        assert beside.read(PREDICT) == inside.read(PREDICT)  # the same network, the same bytes
        assert b"sgw_jax/" not in beside.read(PREDICT)
    assert_same(load_stablehlo(path).parameters, load_stablehlo(exported).parameters)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"file\.safetensors is damaged or of another export"):
        load_stablehlo(path)
    weights.unlink()
    with pytest.raises(MissingFileError, match=r"file\.safetensors, which is not beside it"):
        load_stablehlo(path)


def test_files_that_are_none(exported: Path, tmp_path: Path) -> None:
    whole, path = exported.read_bytes(), tmp_path / "file"
    with pytest.raises(MissingFileError, match="is no file"):
        load_stablehlo(path)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (b"", b"no archive", whole[:-100], whole[:middle], flipped):
        path.write_bytes(content)
        with pytest.raises(InputError, match="truncated, damaged or no StableHLO file"):
            load_stablehlo(path)
    np.savez(tmp_path / "arrays.npz", depth=np.zeros(3))
    with pytest.raises(InputError, match="an archive, but none that"):
        load_stablehlo(tmp_path / "arrays.npz")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 99}, "version 99; this package reads .* up to version 1"),
        ({"calling_convention": 99}, r"made by JAX [\d.]+ .*Install a JAX as new"),
        ({"platforms": ["tpu"]}, "has programs for tpu; this process runs on cpu"),
        ({"parameters": {"arrays": {"params/lost": ["float32", 1]}}}, "parameters are missing, unknown or of another"),
    ],
)
def test_files_of_another_kind(changed: dict[str, Any], message: str, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with zipfile.ZipFile(exported) as whole, zipfile.ZipFile(path, "w") as other:
        for name in whole.namelist():
            content = whole.read(name)
            other.writestr(name, json.dumps(json.loads(content) | changed) if name == METADATA else content)
    with pytest.raises(InputError, match=message):
        load_stablehlo(path)


def test_images_that_no_program_takes(exported: Path) -> None:
    loaded = load_stablehlo(exported)
    with pytest.raises(InputError, match="takes 8 x 16, or multiples of 4 from 8 on"):
        loaded(noise(1, 8, 18))
    for images in (noise(8, 16), noise(0, 8, 16), noise(1, 8, 16).astype(np.float32)):
        with pytest.raises(InputError, match="must be uint8"):
            loaded(images)


def test_options_that_there_are_not(tmp_path: Path) -> None:
    given = (*network(), TASK_LIST, SIZE, tmp_path / "file")
    for platforms in (["metal"], [], "cpu"):
        with pytest.raises(InputError, match="platforms are"):
            export_stablehlo(*given, platforms=platforms)
    with pytest.raises(InputError, match="'inside' or 'beside'"):
        export_stablehlo(*given, parameters="elsewhere")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_without_flatbuffers(exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for call in (
        lambda: load_stablehlo(exported),
        lambda: export_stablehlo(*network(), TASK_LIST, SIZE, tmp_path / "file"),
    ):
        with pytest.raises(MissingPackageError, match=r'needs flatbuffers.*pip install "sgw_jax\[export\]"'):
            call()
