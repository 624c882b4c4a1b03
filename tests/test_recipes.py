"""CONTRIBUTING's six recipes, performed on a copy of the tree: each touches the files it names, and they train."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREE = ("sgw_jax", "configs", "data_pipelines", "launch", "tests", "pyproject.toml")
CONTRACTS = ("tasks", "configs", "backbones", "interactions", "aggregators", "scalarize", "objective", "sharding")

TASK = '''"""Brightness: how light a pixel is."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from sgw_jax.tasks.base import IGNORED_COLOUR, Task, count, ratio, scalar_map


@dataclasses.dataclass(frozen=True)
class Yours(Task):
    """One number a pixel; those that are not positive are ignored."""

    kind: ClassVar[str] = "yours"

    name: str = "yours"
    channels = 1
    metric = "error"
    higher_is_better = False
    units: ClassVar = {"error": ""}
    target: ClassVar = {"kind": "depth", "fill": 0.0, "resample": "nearest"}

    def valid(self, target):
        return jnp.isfinite(scalar_map(target)) & (scalar_map(target) > 0)

    def _error(self, prediction, target):
        found, target = self.float32(prediction)[..., 0], self.scalar_target(prediction, target)
        valid = self.valid(target)
        return jnp.sum(jnp.where(valid, jnp.abs(found - jnp.where(valid, target, 0)), 0)), count(valid)

    def loss_terms(self, prediction, target, statistics=None):
        return self._error(prediction, target)

    def metric_sums(self, prediction, target):
        error, number = self._error(prediction, target)
        return {"error": error, "pixels": number}

    def metric_values(self, sums):
        return {"error": ratio(sums["error"], sums["pixels"])}

    def decode(self, prediction):
        return self.float32(prediction)[..., 0]

    def draw(self, decoded, like=None):
        grey = np.clip(np.nan_to_num(np.asarray(decoded, np.float32)), 0, 255).astype(np.uint8)
        picture = np.repeat(grey[..., None], 3, axis=-1)
        picture[~np.asarray(self.valid(jnp.asarray(decoded)))] = IGNORED_COLOUR
        return picture
'''
SOURCE = '''"""Squares of noise."""

from pathlib import Path

import numpy as np

from sgw_jax.data_pipelines.errors import InputError


class Yours:
    """Eight images."""

    def __init__(self, root, split, tasks):
        self.split = split
        if not (Path(root) / "yours.txt").is_file():
            raise InputError(f"{root} holds no yours.txt.")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (32, 32, 3), np.uint8)
        labels = rng.integers(0, 3, (32, 32), np.uint8)
        return {"image": image, "semseg": labels, "yours": image.mean(-1, dtype=np.float32)}

    def fingerprint(self):
        return {"name": "yours", "split": self.split}
'''
CONFIGURATION = '''"""Yours: all that the recipes add.

Command:   python -m sgw_jax train --config=yours --config.data.root=DIR --workdir=runs/yours
"""

from sgw_jax.configs import base


def get_config(arg=None):
    config = base.get_config()
    config.data.source, config.data.size = "yours", (32, 32)
    config.tasks = ("semseg", "yours")
    config.backbone = config.interaction = config.objective = config.mesh.name = "yours"
    config.channels, config.steps, config.augment.colour = 8, 1, False
    return config
'''
BACKBONE = '''"""Means of patches, mapped."""

import flax.linen as nn
import jax.numpy as jnp


class Yours(nn.Module):
    """A convolution for each stride."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image, train=False):
        strides = (4, 8, 16, 32)
        convolutions = {s: nn.Conv(self.width, (s, s), s, dtype=self.dtype, name=f"stride{s}") for s in strides}
        return {stride: convolution(image) for stride, convolution in convolutions.items()}


def yours(image_size, width=8, dtype=jnp.float32):
    """A `Yours`; any size of the image will do."""
    return Yours(width, dtype)
'''
INTERACTION = '''"""The mean over all tokens, mapped and added."""

import flax.linen as nn
import jax.numpy as jnp

from sgw_jax.functional.tokens import check_features


class Yours(nn.Module):
    """``F <- F + W mean(F)``."""

    scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features):
        check_features(features, "Yours")
        means = [jnp.mean(value, tuple(range(1, value.ndim - 1))) for value in features.values()]
        width = means[0].shape[-1]
        added = self.scale * nn.Dense(width, use_bias=False, dtype=self.dtype)(sum(means) / len(means))
        shape = {name: (len(value), *(1,) * (value.ndim - 2), width) for name, value in features.items()}
        return {name: value + added.reshape(shape[name]).astype(value.dtype) for name, value in features.items()}
'''
AGGREGATOR = '''"""Yours: the preference itself, wherever there is a task."""

import jax.numpy as jnp


def yours_weights(gramian, *, scale=1.0, preference=None, mask=None):
    """``w = scale p``."""
    tasks = len(gramian)
    shares = jnp.full(tasks, 1 / tasks) if preference is None else preference
    shares = shares if mask is None else jnp.where(mask, shares, 0)
    return scale * shares / jnp.maximum(jnp.sum(shares), 1e-30)
'''
SCALARISER = '''def yours_mean(num_tasks: int) -> Scalarizer:
    """``sum_t L_t / T``."""

    def apply(losses: Losses, state: Any, mask: Mask | None = None) -> tuple[Array, Any]:
        present = _present(losses, mask)
        return jnp.sum(jnp.where(present, losses, 0)) / jnp.maximum(jnp.sum(present), 1), state

    return Scalarizer(init=lambda: (), apply=apply)


'''
# Recipe -> (files it adds, lines it puts into others: file -> pairs of a line and the text before which it goes).
BASE, KEYS = "configs/base.py", "sgw_jax/experiment/keys.py"
RECIPES = {
    "task": (
        {"sgw_jax/tasks/yours.py": TASK},
        {
            "sgw_jax/tasks/__init__.py": [
                ("from sgw_jax.tasks.yours import Yours\n", "\n__all__ ="),
                ('    "yours": Yours,\n', '    "semseg": SemSeg,\n'),
            ],
            BASE: [('                "yours": 2.0,\n', '                "semseg": 1.0,\n')],
            KEYS: [('"yours", ', '"semseg", "depth", "normals"')],
        },
    ),
    "data set": (
        {"data_pipelines/yours.py": SOURCE, "configs/yours.py": CONFIGURATION},
        {
            "sgw_jax/experiment/data_sets.py": [
                ("from sgw_jax.data_pipelines.yours import Yours\n", "\nFORMATS ="),
                (
                    '    "yours": Published(Yours, {"semseg": {"num_classes": 3}}),\n',
                    '    "scenes": RenderedScenes(),\n',
                ),
            ]
        },
    ),
    "backbone": (
        {"sgw_jax/backbones/yours.py": BACKBONE},
        {
            "sgw_jax/backbones/__init__.py": [
                ("from sgw_jax.backbones.yours import yours\n", "\nBACKBONES"),
                ('"yours": yours, ', '"vit": vit'),
            ],
            BASE: [('                "yours": {"width": 8},\n', '                "vit": {\n')],
            KEYS: [('        "yours": {"width": WIDTH},\n', '        "vit": {\n')],
        },
    ),
    "interaction": (
        {"sgw_jax/interactions/yours.py": INTERACTION},
        {
            "sgw_jax/interactions/__init__.py": [
                ("from sgw_jax.interactions.yours import Yours\n", "\n# sKEM"),
                ('    "yours": Yours,\n', '    "none": NoInteraction,\n'),
            ],
            BASE: [('                "yours": {"scale": 1.0},\n', '                "none": {\n')],
            KEYS: [('        "yours": {"scale": POSITIVE},\n', '        "none": {"mlp_width"')],
        },
    ),
    "aggregator": (
        {"sgw_jax/multi_objective/_yours.py": AGGREGATOR},
        {
            "sgw_jax/multi_objective/__init__.py": [
                ("from sgw_jax.multi_objective._yours import yours_weights\n", "\n# The family"),
                ('    "yours": method(yours_weights),\n', '    "equal": method('),
            ],
            "sgw_jax/multi_objective/scalarize.py": [
                (SCALARISER, "SCALARIZERS:"),
                ('    "yours_mean": yours_mean,\n', '    "equal": equal,\n'),
            ],
            BASE: [('                "yours": {"scale": 1.0},\n', '                "uncertainty": {')],
            KEYS: [('        "yours": {"scale": POSITIVE},\n', '        "uncertainty": {')],
        },
    ),
    "mesh": (
        {},
        {"sgw_jax/sharding.py": [('    "yours": {"data": -1, "context": 2},\n', '    "data": {"data": -1},')]},
    ),
}

STEP = '''"""One step of what the recipes added."""

import jax
import numpy as np

from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.run.state import new_state
from sgw_jax.run.steps import compiled_steps
from sgw_jax.sharding import global_batch


def test_a_step_with_yours(tmp_path):
    (tmp_path / "yours.txt").touch()
    experiment = build(read_config("yours", [f"--config.data.root={tmp_path}"]), tmp_path)
    assert dict(experiment.mesh.shape) == {"data": 4, "fsdp": 1, "context": 2}
    assert {task.name: task.weight for task in experiment.tasks} == {"semseg": 1, "yours": 2}
    state = new_state(experiment)
    step, _ = compiled_steps(experiment, state)
    with jax.set_mesh(experiment.mesh), experiment.data.train(0, 1) as batches:
        state, metrics = step(state, global_batch(next(iter(batches)), experiment.mesh))
    assert int(state.step) == 1
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["weight/yours"] == metrics["weight/semseg"] == 0.5
'''


def paragraph(recipe):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^\*\*Add an? {recipe}\.\*\*.*?(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_names_what_it_touches(recipe):
    added, changed = RECIPES[recipe]
    named = set(re.findall(r"`([\w/]+\.py)`", paragraph(recipe)))
    assert {*added, *changed} <= named
    for path, lines in changed.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        assert [before for _, before in lines if text.count(before) != 1] == [], f"where lines go in {path}"
    for path in named - set(added):
        assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path


@pytest.mark.slow
def test_what_the_recipes_make_meets_its_contracts_and_trains(tmp_path):
    """All of it in one tree and one process: the families' own tests, of the new members alone, and a step."""
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path)
    for added, changed in RECIPES.values():
        for path, text in added.items():
            assert not (tmp_path / path).exists()
            (tmp_path / path).write_text(text, encoding="utf-8")
        for path, lines in changed.items():
            text = (tmp_path / path).read_text(encoding="utf-8")
            for line, before in lines:
                text = text.replace(before, line + before)
            (tmp_path / path).write_text(text, encoding="utf-8")
    (tmp_path / "tests/test_yours.py").write_text(STEP, encoding="utf-8")
    files = [f"tests/test_{name}.py" for name in (*CONTRACTS, "yours")]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-k", "yours", "-vv", *files],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    said = found.stdout + found.stderr
    assert found.returncode == 0, said
    for name in (*CONTRACTS, "yours"):
        assert re.search(rf"test_{name}\.py::\S*yours\S* PASSED", said), (name, said)
