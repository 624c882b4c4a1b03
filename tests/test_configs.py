"""Every shipped configuration: it reads, its tasks and its network exist, and its published recipe is what it says."""

import ast
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.configs.base import SYSTEMS, mixture_source
from sgw_jax.data_pipelines.cityscapes import Cityscapes
from sgw_jax.experiment.build import build, build_model, build_tasks
from sgw_jax.experiment.config_files import read_config
from sgw_jax.experiment.data_sets import DATA_SETS, Published
from sgw_jax.tasks import TASKS

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(file.stem for file in FOLDER.glob("[!_]*.py") if file.stem != "base")
VARIANTS = [
    *CONFIGS,
    "nyud:interaction=skem,tasks=semseg+depth,protocol=published",
    "pascal_context:interaction=none,protocol=published",
    "cityscapes:interaction=cross_attention",
    "mtan:data=cityscapes",
    *(f"nyud:{name},interaction=skem" for name in SYSTEMS),
]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_network_of_a_configuration_predicts_every_task_at_the_labels_size(name):
    config = read_config(name)
    tasks = build_tasks(config)
    model = build_model(config, tasks)
    image = jax.ShapeDtypeStruct((1, *config.data.size, 3), jnp.float32)
    predictions, _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), image)
    assert {n: p.shape for n, p in predictions.items()} == {t.name: (1, *config.data.size, t.channels) for t in tasks}
    assert {task.protocol for task in tasks} == {config.protocol}


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("scenes")])
def test_without_the_data_the_error_says_what_to_give(name, tmp_path):
    keys = ["--config.batch_size=8"]  # the published 6 does not divide by the 8 fake devices
    with pytest.raises(ValueError, match=r"config.data.root is empty: give the data's directory \(--config.data.root"):
        build(read_config(name, keys), tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        build(read_config(name, [*keys, f"--config.data.root={tmp_path}"]), tmp_path)
    with pytest.raises(ValueError, match=r"config.data.format is 'archived'; it must be one of"):
        build(read_config(name, [*keys, f"--config.data.root={tmp_path}", "--config.data.format=archived"]), tmp_path)


def test_published_recipes():
    """Numbers of the peers' configuration files (learning rate, decay, steps, images a step, weights, sizes)."""
    nyud, pascal, cityscapes, mtan = (read_config(name) for name in ("nyud", "pascal_context", "cityscapes", "mtan"))
    for config in (nyud, pascal):
        assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (2e-5, 1e-6)
        assert (config.steps, config.batch_size, config.schedule.name) == (40_000, 6, "poly")
        assert config.augment.to_dict() == {
            "scale": (0.5, 2.0), "scale_crop": (), "cat_max_ratio": 0.75, "flip": True, "colour": True
        }  # fmt: skip
    weights = {task.name: task.weight for task in build_tasks(nyud)}
    assert weights == {"semseg": 1, "depth": 1, "normals": 10, "edges": 50}
    weights = {task.name: task.weight for task in build_tasks(pascal)}
    assert weights == {"semseg": 1, "human_parts": 2, "saliency": 5, "normals": 10, "edges": 50}
    assert (nyud.data.size, pascal.data.size, cityscapes.data.size) == ((448, 576), (512, 512), (1024, 2048))
    assert (nyud.boundary.max_dist, pascal.boundary.max_dist) == (0.011, 0.0075)
    assert not nyud.boundary.outline_targets
    assert read_config("nyud:protocol=published").boundary.outline_targets
    assert cityscapes.input_scale == 0.5
    assert mtan.augment.scale_crop == (1.0, 1.2, 1.5)
    np.testing.assert_allclose(mtan.steps / (795 / 8), 200, rtol=0.01)


def test_sources_name_the_task_that_their_depth_is_for():
    """What a source says of its depth and what the library makes of it, in the same word."""
    published = {name: data for name, data in DATA_SETS.items() if isinstance(data, Published)}
    for name, data in published.items():
        quantity = data.tasks.get("depth", {}).get("quantity")
        said = re.findall(r'Depth\(quantity="(\w+)"', data.archive.__doc__ or "")
        assert said == ([quantity] if quantity else []), name


@pytest.mark.parametrize("name", sorted({*DATA_SETS} - {"mixture"}))  # of which test_mixture.py has the contract
def test_contract_of_a_data_set(name, tmp_path):
    """Its tasks exist and take the options; without its files the error names the key that says where they are."""
    config = read_config("scenes", [f"--config.data.source={name}", "--config.batch_size=8"])
    for task, options in DATA_SETS[name].task_options(config.data).items():
        found = TASKS[task](**options)
        assert all(getattr(found, key) == value for key, value in options.items() if value != ()), task
    assert len(build_tasks(config)) == len(config.tasks)
    if name != "scenes":
        with pytest.raises(ValueError, match=r"config.data.root is empty: give the data's directory"):
            build(config, tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_commands_in_a_configuration_exist(name):
    said = re.findall(r"--config=(\S+)", ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())))
    assert said
    for argument in said:
        read_config(argument)


def test_classes_of_the_data_sets():
    data = read_config("scenes").data
    counts = {
        name: {task: options["num_classes"] for task, options in found.items() if "num_classes" in options}
        for name, found in ((name, DATA_SETS[name].task_options(data)) for name in DATA_SETS)
    }
    expected = {
        "scenes": {"semseg": 12, "human_parts": 7},
        "folder": {"semseg": 12, "human_parts": 7},
        "nyud": {"semseg": 40},
        "pascal_context": {"semseg": 21, "human_parts": 7},
        "cityscapes": {"semseg": 19},
        "mtan_nyuv2": {"semseg": 13},
        "mtan_cityscapes": {"semseg": 7},
    }
    assert {name: counts[name] for name in expected} == expected


def test_a_folder_names_its_classes():
    semseg, parts = build_tasks(read_config("people:tasks=semseg+human_parts"))
    assert (semseg.class_names[:3], parts.class_names[-2:]) == (("background", "hair", "skin"), ("feet", "dress"))
    assert [task.colours[0] for task in (semseg, parts)] == [(0, 0, 0)] * 2
    assert len(set(semseg.colours)) == 14
    keys = ["--config.data.source=folder", "--config.data.num_classes=3"]
    (unnamed,) = build_tasks(read_config("scenes:tasks=semseg", keys))
    assert unnamed.class_names == ("class 0", "class 1", "class 2")
    keys.append("--config.data.class_names=road,traffic light,sky")
    (named,) = build_tasks(read_config("scenes:tasks=semseg", keys))
    assert named.class_names == ("road", "traffic light", "sky")
    with pytest.raises(ValueError, match=r"config.data.class_names are 3 names, road, .*config.data.num_classes is 4:"):
        build_tasks(read_config("scenes:tasks=semseg", [*keys, "--config.data.num_classes=4"]))


def test_a_source_of_a_mixture_names_its_own_classes():
    config = read_config("people:tasks=semseg", ["--config.data.source=mixture"])  # whose 14 names are another's
    street = mixture_source(num_classes=2, class_names=("road", "sky"))
    config.data.mixture.street = street
    (semseg,) = build_tasks(config)
    assert semseg.class_names == ("road", "sky")
    config.data.mixture.street = {**street, "num_classes": 3}
    with pytest.raises(ValueError, match=r"config.data.mixture.street.class_names are 2 names, road, sky; .* is 3:"):
        build_tasks(config)


def test_mtan_knows_its_two_sets():
    with pytest.raises(Exception, match=r"data='kitti'; it must be one of \['cityscapes', 'nyuv2'\]"):
        read_config("mtan:data=kitti")


def test_systems():
    for name, (backbone, options) in SYSTEMS.items():
        config = read_config(f"nyud:{name},interaction=cross_attention")
        assert (config.backbone, config.interaction) == (backbone, "cross_attention")
        assert config.backbones[backbone].size == options["size"]
    assert read_config("nyud:backbone=swin_b").backbones.swin.size == "base"
    with pytest.raises(Exception, match=r"backbone='resnet'; it must be one of \['swin_t'"):
        read_config("nyud:backbone=resnet")


def test_a_key_that_holds_no_numbers_takes_any_number_of_them():
    config = read_config("scenes", ["--config.scales=16,8", "--config.augment.scale_crop=(1.0,1.5)"])
    assert (config.scales, config.augment.scale_crop) == ((16, 8), (1.0, 1.5))
    assert all(isinstance(scale, int) for scale in config.scales)
    with pytest.raises(Exception, match=r"--config.scales=coarse: expected a number"):
        read_config("scenes", ["--config.scales=coarse"])


def test_the_keys_of_a_task_are_its_own():
    keys = ["--config.edge_weight=0.5", "--config.dot_regression=2.0"]
    tasks = {task.name: task for task in build_tasks(read_config("scenes", keys))}
    assert (tasks["edges"].edge_weight, tasks["semseg"].dot_regression) == (0.5, 2.0)
    assert tasks["human_parts"].dot_regression == 0
    assert [name for name, task in tasks.items() if task.boundary_scores] == ["edges"]
    base = read_config("scenes")
    for name, kind in TASKS.items():
        assert set(kind.configured) <= set(base) & {field.name for field in dataclasses.fields(kind)}, name


def test_what_is_measured_beside_the_rest_is_a_matter_of_the_configuration():
    plain = {task.name: task for task in build_tasks(read_config("scenes"))}
    keys = [
        "depth.crop=garg",
        "depth.min_depth=0.5",
        "depth.max_depth=9",
        "depth.by_image=True",
        "semseg.boundary_iou=True",
    ]
    keys = [f"--config.metric_options.{key}" for key in [*keys, "saliency.image_scores=True"]]
    tasks = {task.name: task for task in build_tasks(read_config("scenes", keys))}
    assert tasks["depth"] == dataclasses.replace(
        plain["depth"], crop="garg", min_depth=0.5, max_depth=9.0, by_image=True
    )
    assert tasks["semseg"] == dataclasses.replace(plain["semseg"], boundary_iou=True)
    assert tasks["saliency"] == dataclasses.replace(plain["saliency"], image_scores=True)
    assert tasks["saliency"].scores_images
    assert not any(task.scores_images for task in plain.values())
    for name, options in read_config("scenes").metric_options.items():  # of each its default
        assert all(getattr(TASKS[name](), key) == value for key, value in options.items())


def test_the_categories_of_cityscapes_hold_every_class_once():
    assert sorted(c for _, classes in Cityscapes.CATEGORIES for c in classes) == list(range(19))
    semseg, depth = build_tasks(read_config("cityscapes"))
    assert semseg.categories == Cityscapes.CATEGORIES
    assert depth.max_depth == 80
    assert build_tasks(read_config("cityscapes", ["--config.metric_options.depth.max_depth=50"]))[1].max_depth == 50


def test_crops_are_balanced_by_a_task_with_classes():
    keys = ["--config.augment.cat_max_ratio=0.75", "--config.batch_size=8"]
    data = build(read_config("scenes", keys), None).data
    assert (data.augmentation.cat_max_ratio, data.augmentation.cat_max_target) == (0.75, "semseg")
    renamed = [dataclasses.replace(build_tasks(read_config("scenes"))[0], name="things")]
    assert build(read_config("scenes", keys), None, renamed).data.augmentation.cat_max_target == "things"
    with pytest.raises(ValueError, match=r"cat_max_ratio is 0.75, but none of the tasks \['depth'\] has classes"):
        build(read_config("scenes:tasks=depth", keys), None)
