"""Real weights on real photographs: DINOv2's tensors and features, and the commands of `--config=people` one by one.

Where the photographs and the recipe of the weights lie beside the checkout; neither is part of the repository. The
weights, 88 MB, are made once and kept in the user's cache.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from scipy.special import erf

from sgw_jax.backbones.pretrained import load_pretrained

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
PEOPLE, RECIPE = SHARED / "data" / "people", SHARED / "tools" / "real_backbone.sh"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sgw_jax" / "real"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (PEOPLE.is_dir() and RECIPE.is_file()), reason="no real photographs and weights beside the checkout"
    ),
]
WIDTH, DEPTH, HEADS, PATCH, EPSILON = 384, 12, 6, 14, 1e-6
COUNTS = {"train": 32, "validation": 8, "test": 8}


@pytest.fixture(scope="module")
def weights() -> Path:
    """The hub folder, made if it is not there: under another name first, so that a half-written one is never taken."""
    folder = CACHE / "dinov2-small"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        begun = CACHE / f"begun-{os.getpid()}"
        made = subprocess.run(["bash", RECIPE, begun], capture_output=True, text=True, timeout=900)
        if made.returncode:
            pytest.skip(f"the weights cannot be made here: {(made.stderr.strip().splitlines() or ['no word'])[-1]}")
        begun.rename(folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """The first photographs of each split, as a data set of their own."""
    root = tmp_path_factory.mktemp("people")
    for folder in PEOPLE.iterdir():
        if folder.name != "splits":
            (root / folder.name).symlink_to(folder)
    (root / "splits").mkdir()
    for split, number in COUNTS.items():
        ids = (PEOPLE / "splits" / f"{split}.txt").read_text(encoding="utf-8").split()[:number]
        (root / "splits" / f"{split}.txt").write_text("\n".join(ids), encoding="utf-8")
    return root


def command(*arguments: str) -> str:
    """Runs the command as people do, on one device; its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    ended = subprocess.run(
        [sys.executable, "-m", "sgw_jax", *arguments], env=environment, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def reference(tensors: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """DINOv2's last layer after its norm, in float64, from the file's tensors by their own names: (rows, columns,
    width) of an image (H, W, 3) as large as those that the position embedding is made for."""

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
        return centred / spread * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    rows, columns = (length // PATCH for length in pixels.shape[:2])
    patches = pixels.reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 4, 1, 3).reshape(rows * columns, -1)
    name = "embeddings.patch_embeddings.projection"
    grid = patches @ tensors[f"{name}.weight"].reshape(WIDTH, -1).T + tensors[f"{name}.bias"]
    tokens = np.concatenate([tensors["embeddings.cls_token"][0], grid]) + tensors["embeddings.position_embeddings"][0]
    for layer in (f"encoder.layer.{i}" for i in range(DEPTH)):
        normed = norm(f"{layer}.norm1", tokens)
        query, key, value = (
            linear(f"{layer}.attention.attention.{part}", normed).reshape(len(tokens), HEADS, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(1, 2) / math.sqrt(WIDTH / HEADS)
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        mixed = (attention @ value).swapaxes(0, 1).reshape(len(tokens), WIDTH)
        branch = linear(f"{layer}.attention.output.dense", mixed)
        tokens = tokens + branch * tensors[f"{layer}.layer_scale1.lambda1"]
        hidden = linear(f"{layer}.mlp.fc1", norm(f"{layer}.norm2", tokens))
        hidden *= (1 + erf(hidden / math.sqrt(2))) / 2
        tokens = tokens + linear(f"{layer}.mlp.fc2", hidden) * tensors[f"{layer}.layer_scale2.lambda1"]
    return norm("layernorm", tokens)[1:].reshape(rows, columns, WIDTH)


def test_every_tensor_is_read_once(weights):
    tensors = load_file(weights / "model.safetensors")
    assert len(tensors) == 222
    # The class token always has the same position: the module holds their sum.
    positions = tensors["embeddings.position_embeddings"]
    tensors["embeddings.position_embeddings"] = positions[:, 1:]
    tensors["embeddings.cls_token"] = tensors["embeddings.cls_token"] + positions[:, :1]
    _, variables = load_pretrained(weights)
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == sum(tensor.size for tensor in tensors.values()) == 22_055_808
    squares = [sum(float(np.square(np.float64(x)).sum()) for x in held) for held in (leaves, tensors.values())]
    assert squares[0] == pytest.approx(squares[1], rel=1e-6)


def test_features_of_a_photograph_are_those_of_the_paper(weights):
    """At 518 x 518, where the position embedding needs no interpolation; as near as tests of parity have it."""
    file = sorted((PEOPLE / "images").iterdir())[0]
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB").resize((518, 518)), np.float64) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    tensors = {name: np.float64(tensor) for name, tensor in load_file(weights / "model.safetensors").items()}
    expected = reference(tensors, pixels)
    module, variables = load_pretrained(weights)
    features = jax.jit(module.apply)(variables, np.float32(pixels)[None])[DEPTH][0]
    assert np.abs(features - expected).max() <= 2e-5 * np.abs(expected).max()


def test_train_evaluate_and_predict(weights, photographs, tmp_path):
    """A command each, at the photographs' own size. After two passes over 32 photographs saliency is already better
    than the best constant's."""
    run, drawn, cache = tmp_path / "run", tmp_path / "drawn", f"--cache_dir={CACHE}"
    keys = {"steps": 8, "checkpoint_every": 8, "eval_every": 8, "schedule.warmup_steps": 2, "ema_decay": None}
    command(
        "train", "--config=people", f"--config.data.root={photographs}", f"--config.backbone_weights={weights}",
        f"--config.backbone_cache={tmp_path / 'features'}", f"--workdir={run}", cache,
        *(f"--config.{key}={value}" for key, value in keys.items()),
    )  # fmt: skip
    assert (run / "report.html").is_file()
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results["split"] == "test"
    constant = results["references"]["constant"]["saliency"]["max_f"]
    assert results["metrics"]["saliency"]["max_f"] > constant
    assert "legwear" in results["per_class"]["semseg"]

    assert "human_parts" in command("evaluate", f"--workdir={run}", "--split=validation", cache)

    ids = (photographs / "splits" / "test.txt").read_text(encoding="utf-8").split()[:2]
    command("predict", f"--workdir={run}", f"--output={drawn}", *(str(PEOPLE / "images" / f"{id_}.jpg") for id_ in ids))
    shown = sorted(file.name for file in drawn.glob("[!.]*"))
    assert shown == sorted(["predictions.json", *(f"{i}.{end}" for i in ids for end in ("npz", "png"))])
    with np.load(drawn / f"{ids[0]}.npz") as maps:
        assert {maps[task].shape[:2] for task in ("semseg", "human_parts", "saliency", "edges")} == {(336, 168)}


def test_low_rank_updates_of_real_weights(weights, photographs, tmp_path):
    """The documented override; the report says that the factors alone learn in the backbone."""
    run = tmp_path / "run"
    keys = {"lora.rank": 4, "data.size": "112,56", "steps": 2, "checkpoint_every": 2, "eval_every": 2}
    command(
        "train", "--config=people:interaction=none", f"--config.data.root={photographs}", f"--workdir={run}",
        f"--config.backbone_weights={weights}", "--config.schedule.warmup_steps=0", f"--cache_dir={CACHE}",
        *(f"--config.{key}={value}" for key, value in keys.items()),
    )  # fmt: skip
    assert (run / "report.html").is_file()
