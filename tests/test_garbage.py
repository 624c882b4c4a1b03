"""Random garbage in every file that a command reads and in every option that it takes.

Whatever it is, the command ends within a minute with 0, 1 or 2, says what is wrong once, on standard error and without
a trace of ours, and leaves what was there as it was. What is harmless by chance is read to the end, not computed on.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import test_pretrained
import test_report
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import sgw_jax
from sgw_jax.__main__ import _parser, main
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import _leaves, read_config
from sgw_jax.run.checkpoints import Checkpoints
from sgw_jax.run.logs import MetricsWriter
from sgw_jax.run.state import abstract_state
from sgw_jax.run.workdir import claim_workdir

pytestmark = pytest.mark.slow

SECONDS = 60
NAMES = ("a", "b")
CONFIG = """
from sgw_jax.configs import base

def get_config():
    config = base.get_config()
    config.tasks = ("semseg", "depth")
    config.data.update({"source": "folder", "root": "data", "size": (32, 32), "num_classes": 3, "threads": 1})
    config.augment.colour = False
    config.backbones.vit.update({"width": 8, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0, "class_token": True})
    config.backbones.vit.epsilon = 1e-12
    config.interaction = "none"
    config.channels = 8
    config.update({"steps": 2, "checkpoint_every": 1, "eval_every": 1, "batch_size": 8})
    return config
"""

COMMANDS = {
    "train": ["train", "--config=mine.py", "--workdir=new"],
    "resume": ["train", "--config=mine.py", "--workdir=run"],
    "tune": ["train", "--config=mine.py", "--workdir=new", "--init_from=run"],
    "tune_model": ["train", "--config=mine.py", "--workdir=new", "--init_from=model"],
    "weigh": ["train", "--config=mine.py", "--workdir=new", "--config.backbone_weights=weights"],
    "evaluate": ["evaluate", "--workdir=run", "--split=validation"],
    "export": ["export", "--workdir=run", "--output=new"],
    "predict": ["predict", "--workdir=run", "--output=new", "photos"],
    "score": ["score", "--config=mine.py", "--predictions=predictions", "--split=validation", "--json=score.json"],
    "check": ["check", "--config=mine.py", "--json=data.json", "--html=data.html"],
    "plan": ["plan", "--config=mine.py", "--json=plan.json"],
    "prepare": ["prepare", "mtan_nyuv2", "--source=archive", "--out=new", "--any_size"],
}
READS = {
    "train": ("mine.py", "data/"),
    "resume": ("run/",),
    "tune": ("run/checkpoints/",),
    "tune_model": ("model/",),
    "weigh": ("weights/",),
    "evaluate": ("run/", "data/"),
    "export": ("run/checkpoints/", "run/results.json"),
    "predict": ("run/checkpoints/", "photos/"),
    "score": ("predictions/", "data/"),
    "check": ("data/",),
    "plan": ("mine.py",),
    "prepare": ("archive/",),
}


def zeros(experiment):
    """A state without a program that makes it."""
    return jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), abstract_state(experiment))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with a little of everything that commands read; a run that was saved without having been trained."""
    root, rng, here = tmp_path_factory.mktemp("world"), np.random.default_rng(0), Path.cwd()
    image = rng.integers(0, 256, (32, 32, 3), np.uint8)
    for folder in ("images", "semseg", "depth", "splits"):
        (root / "data" / folder).mkdir(parents=True)
    for name in NAMES:
        Image.fromarray(image).save(root / "data" / "images" / f"{name}.png")
        Image.fromarray(image[..., 0] % 3).save(root / "data" / "semseg" / f"{name}.png")
        np.save(root / "data" / "depth" / f"{name}.npy", np.ones((32, 32), np.float32))
    for split in ("train", "validation"):
        (root / "data" / "splits" / f"{split}.txt").write_text("a\nb\n")
    (root / "photos").mkdir()
    Image.fromarray(image).save(root / "photos" / "photo.jpg")
    Image.fromarray(image).save(root / "photos" / "photo2.png")
    for task in ("semseg", "depth"):
        shutil.copytree(root / "data" / task, root / "predictions" / task)
    for split in ("train", "val"):
        for part, array in (("image", image / 255), ("label", image[..., 0] % 3), ("depth", image[..., :1] / 255)):
            (root / "archive" / split / part).mkdir(parents=True)
            np.save(root / "archive" / split / part / "0.npy", array.astype(np.float32))
        (root / "archive" / split / "normal").mkdir()
        np.save(root / "archive" / split / "normal" / "0.npy", np.ones((32, 32, 3), np.float32))
    test_pretrained.write(root / "weights", "vit")
    (root / "mine.py").write_text(CONFIG)
    os.chdir(root)
    try:
        experiment = build(read_config("mine.py"), root / "cache")
        run = root / "run"
        claim_workdir(run, experiment)
        with Checkpoints(run / "checkpoints") as checkpoints:
            checkpoints.save(1, zeros(experiment), experiment.metadata())
            checkpoints.record(1, 0.5)
        with contextlib.closing(MetricsWriter(run)) as writer:
            writer.write(1, "train", {"loss": 1.0})
            writer.flush()
        shutil.rmtree(run / "tensorboard")
        sgw_jax.load(run).save_pretrained(root / "model")
    finally:
        os.chdir(here)
    (run / "results.json").write_text(json.dumps(test_report.make_record()))
    return root


class ReadToTheEnd(BaseException):
    """Nothing was wrong; what would follow is computed. No Exception, so that no command takes it for an error."""


@pytest.fixture
def reading(monkeypatch):
    """Commands read everything and then stop, before anything is compiled."""

    def batches(experiment, *_):
        with experiment.data.train(0, 1) as found:
            list(found)
        raise ReadToTheEnd

    def split(experiment, state, name, *_):
        with experiment.data.evaluation(name) as found:
            list(found)
        raise ReadToTheEnd

    def pairs(tasks, found, *_, **__):
        list(found([task.name for task in tasks]))
        raise ReadToTheEnd

    def consumed(self, images, options=None):
        list(images)
        raise ReadToTheEnd

    monkeypatch.setattr("sgw_jax.run.state.new_state", zeros)
    monkeypatch.setattr("sgw_jax.train.compiled_steps", batches)
    monkeypatch.setattr("sgw_jax.report.results.evaluate", split)
    monkeypatch.setattr("sgw_jax.commands.score.score", pairs)
    monkeypatch.setattr("sgw_jax.prediction.predictor.Predictor.stream", consumed)


@pytest.fixture(autouse=True)
def as_before():
    """What commands change in the process is put back."""
    here, cache = Path.cwd(), jax.config.jax_compilation_cache_dir
    yield
    os.chdir(here)
    jax.config.update("jax_compilation_cache_dir", cache)


def digest(root):
    """Path -> what is there."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else path.lstat().st_mode
        for path in root.rglob("*")
    }


@contextlib.contextmanager
def copied(world):
    """A copy of the world as the working directory."""
    place = world.with_name("copy")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world, place)
    os.chdir(place)
    yield place


def run(arguments):
    """Exit code and standard error; None if everything was read."""

    def late(*_):
        raise TimeoutError(f"{arguments} took more than {SECONDS} s")

    out, err, before = io.StringIO(), io.StringIO(), signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    except ReadToTheEnd:
        code = None
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return code, err.getvalue()


def check(arguments, place):
    """Runs the command in the place and checks what is promised of it; what is new may be anywhere but in the way."""
    before = digest(place)
    code, said = run([*arguments, *([] if arguments[0] == "prepare" else [f"--cache_dir={place.with_name('cache')}"])])
    about = f"{arguments}: {code}\n{said}"
    assert code in (None, 0, 1, 2), about
    assert "Traceback" not in said, about
    errors = [line for line in said.splitlines() if line.startswith(("error: ", "sgw-jax"))]
    if code in (1, 2):
        assert sum(": error: " in line or line.startswith("error: ") for line in errors) == 1, about
        after = digest(place)
        changed = {name for name, found in before.items() if after.get(name) != found}
        assert not changed, about
    elif code == 0:
        assert not errors, about
    return code, said


def files(world, command):
    return sorted(
        str(path.relative_to(world))
        for path in world.rglob("*")
        if path.is_file() and str(path.relative_to(world)).startswith(READS[command])
    )


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
OTHERS = st.sampled_from(
    [b"", b"\n", b"\0" * 64, b"\xff\xfea\0", b"\xef\xbb\xbfa\n", b"../a\n", b"a\na\n", b"[" * 2000, b"{}", b"[bold]\n"]
)


@st.composite
def garbage(draw, original):
    """Noise, something of another kind, or the original with a part cut out, inserted, replaced or changed."""
    kind = draw(st.sampled_from(["noise", "other", "json", "text", "cut", "flip", "insert", "double"]))
    place = draw(st.integers(0, max(len(original) - 1, 0)))
    match kind:
        case "noise":
            return draw(st.binary(max_size=200))
        case "other":
            return draw(OTHERS)
        case "json":
            return json.dumps(draw(JSONS)).encode()
        case "text":
            return draw(st.text(st.characters(codec="utf-8"), max_size=60)).encode()
        case "cut":
            return original[:place]
        case "flip":
            return original[:place] + bytes([draw(st.integers(0, 255))]) + original[place + 1 :]
        case "insert":
            return original[:place] + draw(st.binary(min_size=1, max_size=20)) + original[place:]
    return original + original


def folder(path):
    path.mkdir()


def pipe(path):
    os.mkfifo(path)


def circle(path):
    path.symlink_to(path)


def nothing(path):
    pass


def a_file(path):
    path.write_bytes(b"x")


# Of each command; GARBAGE_EXAMPLES=150 is worth half an hour after a change of what is read.
MANY = int(os.environ.get("GARBAGE_EXAMPLES", "4"))


def settled(examples):
    suppressed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples,
        phases=[Phase.generate],  # an example takes a second or two: failures are not made smaller
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=suppressed,
    )


def spoil(data, world, command):
    """One file is other content, or something else than a file; or a folder on its way is."""
    name = Path(data.draw(st.sampled_from(files(world, command)), label="file"))
    if data.draw(st.integers(0, 3)):
        content = data.draw(garbage((world / name).read_bytes()), label="content")
        assume(content != (world / name).read_bytes())
        with copied(world) as place:
            (place / name).write_bytes(content)
            check(COMMANDS[command], place)
        return
    name = data.draw(st.sampled_from([name, *list(name.parents)[:-1]]), label="place")
    make = data.draw(st.sampled_from([folder, pipe, circle, nothing, a_file]), label="is")
    with copied(world) as place:
        (place / name).unlink() if (place / name).is_file() else shutil.rmtree(place / name)
        make(place / name)
        check(COMMANDS[command], place)


@pytest.mark.parametrize("command", COMMANDS)
@given(data=st.data())
@settled(MANY)
def test_much_garbage_in_a_file(world, reading, command, data):
    spoil(data, world, command)


def options(command):
    """The options of a command, from its parser."""
    (subparsers,) = [action for action in _parser()._actions if hasattr(action, "choices") and action.dest == "command"]
    found = [string for action in subparsers.choices[command]._actions for string in action.option_strings]
    return [option for option in found if option.startswith("--") and option not in ("--help", "--traceback")]


KEYS = _leaves(read_config("scenes"))
NUMBERS = st.sampled_from(
    ["0", "-1", "1", "2", "3", "0.5", "-0.5", "1e-30", "1e30", "nan", "inf", "1e400", "None", "7" * 40]
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), max_size=12)
VALUES = (
    NUMBERS
    | TEXTS
    | st.sampled_from(["", "True", "1,2", "(0, 0)", "semseg", "[bold]", "[/x]", "%s", "{}", ":", "a:b=c"])
)


def misuse(data, world, command):
    arguments = list(COMMANDS[command])
    if data.draw(st.booleans()):
        option = data.draw(st.sampled_from(options(arguments[0])), label="option")
    else:
        option = f"--config.{data.draw(st.sampled_from(KEYS), label='key')}"
    value = data.draw(VALUES, label="value")
    assume(value.strip() not in (".", "..") and not value.strip().startswith(("~", "$")))
    with copied(world) as place:
        check([*arguments, f"{option}={value}"], place)


TAKE_OPTIONS = [name for name in COMMANDS if name not in ("prepare", "resume", "weigh")]


@pytest.mark.parametrize("command", TAKE_OPTIONS)
@given(data=st.data())
@settled(MANY)
def test_much_garbage_in_an_option(world, reading, command, data):
    misuse(data, world, command)


@pytest.mark.parametrize("command", COMMANDS)
def test_without_garbage_everything_is_read(world, reading, command):
    with copied(world) as place:
        code, said = check(COMMANDS[command], place)
    assert code in (None, 0), said
