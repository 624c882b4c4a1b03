"""Every key has a range: in the table, in the words of configs/base.py, and refused by name just outside of it."""

import ast
import math
import re
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import optax
import pytest
from ml_collections import ConfigDict, FieldReference

from sgw_jax.configs import base
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.experiment.build import build, build_model
from sgw_jax.experiment.checks import check_config
from sgw_jax.experiment.experiment import Boundary, flatten
from sgw_jax.experiment.keys import ALLOWED, ANY, check_keys
from sgw_jax.experiment.ranges import Either, Interval, Kind, Names, OneOf, Pair, Several
from sgw_jax.multi_objective import AGGREGATORS, SCALARIZERS
from sgw_jax.tasks import TASKS
from sgw_jax.train_step import make_train_step

SOURCE = Path(base.__file__).read_text(encoding="utf-8")


def leaves(config, prefix=""):
    """Key -> (value, whether it may be None)."""
    found = {}
    for key, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            reference = isinstance(value, FieldReference)
            found[f"{prefix}{key}"] = (value.get() if reference else value, reference)
    return found


def example():
    """The defaults, with a source in the mixture, whose name is free."""
    config = base.get_config()
    config.data.mixture[ANY] = base.mixture_source(maps={ANY: (0, 255)})
    return config


KEYS = leaves(example())
RANGES = flatten(ALLOWED)


def changed(key, value):
    """A plain configuration with one value changed: what a file can make of it, whatever the types."""
    values = example().to_dict()
    *sections, name = key.split(".")
    section = values
    for part in sections:
        section = section[part]
    section[name] = value
    return ConfigDict(values)


def inside(range):
    """Values at the bounds."""
    match range:
        case Interval(low=low, high=high, ends=ends, whole=True):
            return [low, high - (ends[1] == ")")]
        case Interval(low=low, high=high, ends=ends):
            high = min(high, 1e30)
            first = low if ends[0] == "[" else math.nextafter(low, high)
            return [first, high if ends[1] == "]" else math.nextafter(high, low)]
        case OneOf(names=names):
            return list(names)
        case Kind(kind=kind):
            return {bool: [True, False], str: ["", "x"]}.get(kind, [()])
        case Pair(of=of):
            return [tuple(inside(of)[:1] * 2), tuple(inside(of)[-1:] * 2), list(inside(of)[:1] * 2)]
        case Several(of=of):
            return [(), tuple(inside(of)), inside(of)]
        case Names(or_none=or_none):
            return [("depth",), ["depth", "edges"], *[()] * or_none]
        case Either(of=of, other=other):
            return [*inside(of), other]
    raise AssertionError(range)


def outside(range):
    """Values just beyond the bounds, and of other types."""
    match range:
        case Interval(low=low, high=high, ends=ends, whole=True):
            return [low - 1, high + (ends[1] == "]"), low + 0.5, "many", None, True, math.nan, math.inf]
        case Interval(low=low, high=high, ends=ends):
            below = math.nextafter(low, -math.inf) if ends[0] == "[" else low
            above = math.nextafter(high, math.inf) if ends[1] == "]" else high
            return [below, above, "many", None, True, math.nan, math.inf, -math.inf]
        case OneOf():
            return ["no such name", "", 1, None]
        case Kind():
            return [1, None]
        case Pair(of=of, ascending=ascending):
            good = inside(of)[-1]
            falling = [(good, good / 2)] if ascending else []
            return [(), (good,), (good, good, good), 3, None, *((good, bad) for bad in outside(of)), *falling]
        case Several(of=of):
            return [3, None, "many", *((bad,) for bad in outside(of))]
        case Names(or_none=or_none):
            return [*[()] * (not or_none), ("depth", "depth"), (1,), "depth", None]
        case Either(of=of, other=other):
            return [value for value in outside(of) if value != other]
    raise AssertionError(range)


def test_every_key_has_a_range_and_every_range_a_key():
    assert RANGES.keys() == KEYS.keys()


@pytest.mark.parametrize("key", KEYS)
def test_contract_of_a_key(key):
    value, may_be_none = KEYS[key]
    assert value in RANGES[key]
    assert (None in RANGES[key]) == may_be_none
    for good in inside(RANGES[key]):
        check_keys(changed(key, good))
    for bad in outside(RANGES[key]):
        with pytest.raises(ValueError, match=rf"^config\.{re.escape(key)} is .+; it must be .+\.") as caught:
            check_keys(changed(key, bad))
        assert RANGES[key].words in str(caught.value)


def comments():
    """Key -> what configs/base.py says beside it and in the nearest comment above it in its section, or above that."""
    lines = SOURCE.splitlines()

    def beside(line):
        return lines[line].partition("  #")[2]

    def above(line, stop):
        while line > stop and not lines[line].lstrip().startswith("#"):
            if lines[line].strip() == "},":
                return ""  # it is about another section
            line -= 1
        text = []
        while lines[line].lstrip().startswith("#"):
            text.insert(0, lines[line].strip(" #"))
            line -= 1
        return " ".join(text)

    def section(node, prefix, outer=""):
        found = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:  # **changed
                continue
            name, line = f"{prefix}{key.value}", key.lineno - 1
            over = above(line - 1, node.lineno - 1) or outer
            if isinstance(value, ast.Dict) and value.keys:
                found |= section(value, f"{name}.", f"{beside(line)} {above(line - 1, line - 2)}")
            elif name == "data.mixture":
                found |= section(source, f"{name}.{ANY}.")
            elif name == f"data.mixture.{ANY}.maps":
                found[f"{name}.{ANY}"] = f"{beside(line)} {over}"
            elif isinstance(value, ast.Call) and value.func.id == "kem":
                found |= section(kem, f"{name}.")
            else:
                found[name] = f"{beside(line)} {over}"
        return found

    functions = {node.name: node for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef)}
    (kem,) = [node for node in ast.walk(functions["kem"]) if isinstance(node, ast.Dict)]
    (source,) = [node for node in functions["mixture_source"].body if isinstance(node, ast.Return)]
    source = source.value
    whole = next(node for node in ast.walk(functions["get_config"]) if isinstance(node, ast.Dict))
    return section(whole, "")


SAID = comments()


def words(range):
    """The words of a range that a comment must hold."""
    match range:
        case Interval():
            return [range.words]
        case OneOf(names=names):
            return list(names)
        case Pair(of=of) | Several(of=of) | Either(of=of):
            return words(of)
    return []


@pytest.mark.parametrize("key", KEYS)
def test_the_range_of_a_key_is_said_where_it_stands(key):
    missing = [word for word in words(RANGES[key]) if word not in SAID[key]]
    named = re.search(r"\b[A-Z]+(_[A-Z]+)*\b in sgw_jax", SAID[key])  # a family, by its name
    assert not missing or named, f"configs/base.py says of {key}: {SAID[key]!r}"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_every": 3, "checkpoint_every": 2}, "config.eval_every is 3; it must be a multiple of"),
        (
            {"steps": 50, "schedule.warmup_steps": 60},
            "config.schedule.warmup_steps is 60; .* less than config.steps = 50",
        ),
        ({"steps": 50, "profile_after": 50}, "config.profile_after is 50; it must be less than config.steps = 50"),
        (
            {"metric_options.depth.min_depth": 2.0, "metric_options.depth.max_depth": 2.0},
            "min_depth is 2.0; .* less than",
        ),
        ({"weights_ema": 0.5}, "config.weights_ema is 0.5, but config.objective 'equal' .* must be None"),
        ({"gradients": "representation"}, "config.gradients is 'representation', but config.objective 'equal'"),
        (
            {"interactions.kem.num_heads": 3},
            "config.interactions.kem.num_heads is 3; it must divide config.channels = 64",
        ),
        ({"interactions.kem.num_heads": 4, "interactions.kem.slot_dim": 6}, "num_heads is 4; .*kem.slot_dim = 6"),
        (
            {"interactions.kem.etf_vertices": 66},
            r"kem.etf_vertices is 66; it must be at most config.channels \+ 1 = 65",
        ),
        ({"interactions.kem.projection": "learned"}, "projection is 'learned', but etf_vertices is None"),
        ({"backbones.vit.num_heads": 7}, "config.backbones.vit.num_heads is 7; .* config.backbones.vit.width = 384"),
        ({"backbones.vit.depth": 6}, "config.backbones.vit.depth is 6; it must be a multiple of 4"),
        ({"backbones.vit.patch_embed": "conv", "backbones.vit.patch_size": 12}, "patch_size is 12; .* a power of two"),
        ({"mesh.rules": (("[", ()),)}, "is no regular expression"),
        ({"optimizer": None}, "config.optimizer is None; it must be a section with the keys"),
    ],
)
def test_keys_that_do_not_go_together(keys, message):
    config = base.get_config()
    with config.unlocked():
        for key, value in keys.items():
            config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=message):
        check_config(config)


def test_the_shipped_defaults_go_together():
    check_config(base.get_config())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"data.size": (4, 96), "input_scale": 0.1},
            "input_scale 0.1 0 x 10; vit must see a pixel",
        ),
        (
            {"backbone": "dinov3", "backbones.dinov3.num_heads": 192},
            "the width of a head, 384 / 192, must be a multiple of 4",
        ),
        ({"stride": 5}, r"config.stride is 5; it must be one of vit's, \[4, 8, 16, 32\]"),
        ({"scales": (8, 8)}, r"config.scales are \(8, 8\); they must be different strides above"),
        ({"scales": (12,)}, r"config.scales are \(12,\); .* of \[8, 16, 32\]"),
        ({"stride": 8, "scales": (4,)}, r"config.scales are \(4,\); .* of \[16, 32\]"),
    ],
)
def test_sizes_and_strides_that_the_backbone_does_not_know(keys, message):
    config = base.get_config()
    config.update_from_flattened_dict(keys)
    with pytest.raises(InputError, match=message):
        build_model(config, ())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"tasks": ("depth",), "augment.cat_max_ratio": 0.75},
            r"cat_max_ratio is 0.75, but none of the tasks \['depth'\] has classes",
        ),
        (
            {"tasks": ("depth",), "task_weights.depth": 0.0},
            r"config.task_weights are 0 for all of the tasks \['depth'\]",
        ),
        ({"metric_options.depth.clip": True}, "config.metric_options.depth .* clip needs min_depth and max_depth"),
        ({"objectives.stch.mu": 0.0}, "config.objectives.stch.mu is 0.0; it must be positive"),  # though not chosen
        ({"boundary.max_dist": -1.0}, r"config.boundary.max_dist is -1.0; it must be in \[0, 1\), or None"),
    ],
)
def test_the_data_is_not_looked_at_before_the_keys(keys, message):
    config = base.get_config()
    config.update_from_flattened_dict({"data.source": "folder", "data.root": "nowhere", **keys})
    with pytest.raises(InputError, match=message):
        build(config, "nowhere")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("uncertainty", {"learning_rate": 0.0}, "uncertainty: learning_rate is 0.0; it must be positive"),
        ("uw_so", {"temperature": -1.0}, "uw_so: temperature is -1.0; it must be positive"),
        ("dwa", {"temperature": 0.0, "steps_per_epoch": 1}, "dwa: temperature is 0.0; it must be positive"),
        ("stch", {"mu": math.nan}, "stch: mu is nan; it must be positive"),
        ("famo", {"learning_rate": math.inf}, "famo: learning_rate is inf; it must be positive"),
        ("nash_mtl", {"max_norm": 0.0}, "nash_mtl: max_norm is 0.0; it must be positive"),
        ("fairgrad", {"alpha": 0.0}, "fairgrad: alpha is 0.0; it must be positive"),
        ("cagrad", {"c": math.nan}, "cagrad: c is nan; it must not be negative"),
        ("gradvac", {"beta": 7.0}, r"gradvac: beta is 7.0; it must be in \[0, 1\]"),
        ("gradnorm", {"alpha": -1.0}, "gradnorm: alpha is -1.0; it must not be negative"),
        ("gradnorm", {"learning_rate": 0.0}, "gradnorm: learning_rate is 0.0; it must be positive"),
    ],
)
def test_objectives_check_their_own_options(name, options, message):
    def use():
        found = (SCALARIZERS | AGGREGATORS)[name](2, **options)
        if name in AGGREGATORS:  # some look at their options when they first weigh
            found.weighting.apply(jnp.eye(2), found.weighting.init(2), losses=jnp.ones(2))

    with pytest.raises(InputError, match=message):
        use()


def test_a_boundary_and_a_step_check_what_they_are_given():
    for bad in ({"max_dist": -1.0}, {"max_dist": 1.0}, {"max_dist": math.nan}, {"workers": -1}, {"workers": 1.5}):
        with pytest.raises(InputError, match=rf"Boundary: {next(iter(bad))} is "):
            Boundary(**{"max_dist": 0.01, "outline_targets": False, "workers": 0, **bad})
    tasks, model = [TASKS["depth"](weight=0.0), TASKS["normals"](weight=0.0)], nn.Dense(1)
    with pytest.raises(InputError, match=r"the weights of the tasks \['depth', 'normals'\] are all 0"):
        make_train_step(model, tasks, optax.sgd(0.1))
    for decay in (-1, 1, 1.5, math.nan):
        with pytest.raises(InputError, match=rf"ema_decay is {decay}; it must be in \[0, 1\), or None"):
            make_train_step(model, [TASKS["depth"]()], optax.sgd(0.1), ema_decay=decay)
