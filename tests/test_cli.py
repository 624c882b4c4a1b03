"""The command line: every mistake is one readable message, exit code 1, and nothing written."""

import subprocess
import sys

import jax
import pytest

import sgw_jax
from sgw_jax.__main__ import main
from sgw_jax.commands import plan, session, sources
from sgw_jax.data_pipelines.errors import UserError
from sgw_jax.experiment.config_files import UsageError, read_config

HEAD = "from sgw_jax.configs import base\ndef get_config():\n  c = base.get_config()\n"  # of a configuration file


def everything_below(kind):
    return [kind, *(lower for child in kind.__subclasses__() for lower in everything_below(child))]


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs the command, which must fail without having written anything, and gives its message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "prepare", lambda *_: pytest.fail("what should be refused was begun"))
    before, cache_dir = sorted(tmp_path.rglob("*")), jax.config.jax_compilation_cache_dir

    def run(*arguments):
        assert main([*arguments, f"--cache_dir={tmp_path / 'cache'}"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("error: ")

    yield run
    jax.config.update("jax_compilation_cache_dir", cache_dir)


def override(text):
    return read_config("scenes", ["--config.steps=9", "--config.interactions.kem.top_k=7", f"--config.{text}"])


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("steps=12", "steps", 12),
        ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("data.size=32,64", "data.size", (32, 64)),
        ("data.size=(32, 64)", "data.size", (32, 64)),
        ("augment.scale=1,1.5", "augment.scale", (1.0, 1.5)),
        ("tasks=semseg,depth", "tasks", ("semseg", "depth")),
        ("tasks=('depth',)", "tasks", ("depth",)),
        ("data.class_names=road,traffic light", "data.class_names", ("road", "traffic light")),
        ("tasks=semseg+depth", "tasks", ("semseg", "depth")),
        ("augment.flip=False", "augment.flip", False),
        ("augment.colour=true", "augment.colour", True),
        ("interactions.kem.top_k=None", "interactions.kem.top_k", None),
        ("interactions.kem.top_k=5", "interactions.kem.top_k", 5),
        ("interactions.kem.slot_dim=8", "interactions.kem.slot_dim", 8),  # None by default
        ("ema_decay=0.5", "ema_decay", 0.5),
        ("optimizer.clip_norm=None", "optimizer.clip_norm", None),
        ("data.root=/some where/a=b", "data.root", "/some where/a=b"),
    ],
)
def test_keys_take_values_of_their_type(text, key, value):
    found = override(text)
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step=3", "no key 'step'. Did you mean --config.steps?"),
        ("optimizer.learning_rat=3", "Did you mean --config.optimizer.learning_rate?"),
        ("optimiser.learning_rate=3", "Did you mean --config.optimizer.learning_rate?"),
        ("learning_rate=3", "Did you mean --config.optimizer.learning_rate?"),
        ("interactions.kem.topk=3", "Did you mean --config.interactions.kem.top_k?"),
        ("backbones.vit.widht=3", "Did you mean --config.backbones.vit.width?"),  # None by default
        ("optimizer.lr=3", "That section has optimizer.b1,"),
        ("optimizer=adamw", "It is a section; its keys are optimizer.b1,"),
        ("steps=many", "--config.steps=many: expected a whole number; it is 9 now"),
        ("steps=1.5", "expected a whole number"),
        ("steps=None", "expected a whole number"),
        ("interactions.kem.top_k=x", "expected a whole number or None; it is 7 now"),
        ("optimizer.learning_rate=fast", "expected a number"),
        ("optimizer.learning_rate=nan", "expected a finite number"),
        ("augment.flip=perhaps", "expected true or false"),
        ("data.size=32", "expected 2 numbers with a comma between them"),
        ("data.size=a,b", "expected a whole number"),
    ],
)
def test_a_wrong_override_is_explained(text, message):
    with pytest.raises(UsageError) as caught:
        override(text)
    assert message in str(caught.value)


def test_the_last_of_several_overrides_counts_and_the_result_is_locked():
    config = read_config("scenes", ["--config.steps=1", "--config.steps=2"])
    assert config.steps == 2
    with pytest.raises(AttributeError):
        config.stepz = 3


@pytest.mark.parametrize("name", ["scenes", "configs/scenes.py", "configs/scenes"])
def test_a_shipped_configuration_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config(f"{name}:interaction=none,tasks=semseg+depth")
    assert (config.interaction, config.tasks) == ("none", ("semseg", "depth"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"{HEAD}  c.stepz = 1\n", 'line 4.*"stepz".*"steps"'),
        ("def get_config(:\n", "SyntaxError"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError"),
        ("x = 1\n", "defines no get_config"),
        ("def get_config():\n  raise RuntimeError('broken')\n", "line 2: RuntimeError: broken"),
        ("import ml_collections as m\ndef get_config():\n  return m.ConfigDict({'seed': 1})\n", "lacks the keys"),
        (HEAD, "returns None; it must return the configuration"),
        ("def get_config():\n  return 3\n", "returns 3; it must return the configuration"),
        ("get_config = 3\n", "TypeError: 'int' object is not callable"),
        (
            "import sys\ndef get_config():\n  sys.exit(0)\n",
            r"line 3: SystemExit: sys.exit\(0\); a configuration returns",
        ),
        (
            f"{HEAD}  c.steps = 'many'\n  return c\n",
            "line 4: TypeError: steps is many, of type str; it must be of type int",
        ),
        (f"{HEAD}  c.optimizer = None\n  return c\n", "lacks the keys optimizer.b1"),
        ("x = 1\ndef f(:\n", "line 2: SyntaxError: invalid syntax"),
        ("a\0b", "Error: source code string cannot contain null bytes"),
    ],
)
def test_a_configuration_file_that_fails_is_named(tmp_path, source, message):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(UsageError, match=message) as caught:
        read_config(str(file))
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 2000  # not the dump of everything


def test_the_line_of_a_configuration_is_named_by_a_relative_path_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(f"{HEAD}  raise RuntimeError('two\\nlines')\n")
    with pytest.raises(UsageError, match=r"--config=mine.py: mine.py, line 4: RuntimeError: two lines$"):
        read_config("mine.py")


@pytest.mark.parametrize("name", ["folder", "x" * 300, "nowhere/scenes.py", "a\0b"])
def test_what_is_no_file_is_no_configuration(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"is no file|there is no file"):
        read_config(name)


@pytest.mark.parametrize("made", ["ConfigDict(c.to_dict())", "FrozenConfigDict(c)"])
def test_keys_that_may_be_none_stay_so_however_the_file_makes_its_configuration(tmp_path, made):
    file = tmp_path / "mine:1.py"
    file.write_text(f"import ml_collections as m\n{HEAD}  return m.{made}\n", encoding="utf-8-sig")
    keys = ["--config.ema_decay=0.5", "--config.interactions.kem.top_k=None", "--config.backbones.vit.width=None"]
    config = read_config(str(file), keys)
    assert (config.ema_decay, config.interactions.kem.top_k, config.backbones.vit.width) == (0.5, None, None)


def test_a_file_of_ones_own_works_from_anywhere(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"{HEAD}  c.steps = 77\n  return c\n")
    assert read_config(str(file), ["--config.batch_size=4"]).steps == 77
    with pytest.raises(UsageError, match="takes 0 positional arguments"):
        read_config(f"{file}:key=value")


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ["--config=scens"],
            ["no file 'scens'", "'nyud', 'pascal_context', 'people', 'scenes']", "Did you mean 'scenes'?"],
        ),
        (["--config=scenes:interation=none"], ["'interation=none'", "['interaction', 'tasks']"]),
        (["--config=scenes", "--config.step=1"], ["Did you mean --config.steps?"]),
        (["--config=scenes", "--config.steps", "5"], ["'--config.steps'", "--config.key=value"]),
        (["--config=scenes", "--stepz=5"], ["'--stepz=5'"]),
        (["--config=scenes", "extra"], ["'extra'"]),
        (["--config=scenes:tasks=semsegg"], ["config.tasks is 'semsegg'", "Did you mean 'semseg'?"]),
        (["--config=scenes:tasks=depth+depth"], ["each once"]),
        (
            ["--config=scenes:interaction=kemm"],
            ["config.interaction is 'kemm'", "'kem', 'none', 'shared_workspace', 'skem'"],
        ),
        (["--config=scenes", "--config.backbone=resnet"], ["config.backbone is 'resnet'", "vit"]),
        (["--config=scenes", "--config.dtype=float16"], ["config.dtype is 'float16'", "bfloat16"]),
        (["--config=scenes", "--config.data.source=scene"], ["config.data.source", "Did you mean 'scenes'?"]),
        (["--config=scenes", "--config.data.source=folder"], ["config.data.root is empty"]),
        (["--config=scenes", "--config.mesh.fsdp=3"], ["8 devices do not divide by 3"]),
        (["--config=scenes", "--config.mesh.data=2"], ["need 2 devices, but there are 8"]),
        (["--config=scenes", "--config.batch_size=12"], ["batch_size 12 must divide by 8 devices"]),
        (["--config=scenes", "--config.seed=-1"], ["config.seed is -1; it must be in [0, 2^32)"]),
        (
            ["--config=scenes", "--config.eval_every=3", "--config.checkpoint_every=2"],
            ["config.eval_every is 3; it must be a multiple of config.checkpoint_every = 2"],
        ),
        (["--config=scenes", "--config.steps=0"], ["config.steps is 0; it must be at least 1"]),
        (["--config=scenes", "--config.channels=0"], ["config.channels is 0; it must be in [1, 8192]"]),
        (["--config=scenes", "--config.stride=0"], ["config.stride is 0; it must be in [1, 1024]"]),
        (["--config=scenes", "--config.input_scale=0"], ["config.input_scale is 0.0; it must be in (0, 16]"]),
        (["--config=scenes", "--config.backbones.vit.width=0"], ["config.backbones.vit.width is 0"]),
        (["--config=scenes", "--config.backbones.vit.num_heads=0"], ["config.backbones.vit.num_heads is 0"]),
        (["--config=scenes", "--config.profile_steps=0"], ["profile_steps is 0; it must be at least 1"]),
        (["--config=scenes", "--config.optimizer.name=adam"], ["'adam'", "adamw"]),
        (["--config=scenes", "--config.schedule.name=cos"], ["'cos'", "cosine"]),
        (["--config=scenes", "--config.steps=50"], ["config.schedule.warmup_steps is 60; it must be less than"]),
        (["--config=nyud:swin_xl"], ["'swin_xl'", "backbone of ['swin_t', 'swin_b', 'swin_l', 'vit_b'"]),
        (["--config=scenes", "--init_from=nowhere"], ["no checkpoints in", "nowhere"]),
    ],
)
def test_train_refuses_before_it_writes(refused, arguments, messages):
    message = refused("train", "--workdir=run", *arguments)
    for part in messages:
        assert part in message


def test_what_is_not_refused_fails_these_tests(refused):
    with pytest.raises(pytest.fail.Exception, match="what should be refused was begun"):
        refused("train", "--workdir=run", "--config=scenes:tasks=depth,interaction=none")


@pytest.fixture
def plain(capsys):
    """Runs the command, which must fail, and gives what it says on stderr."""
    cache_dir = jax.config.jax_compilation_cache_dir

    def run(*arguments):
        assert main([*arguments]) == 1
        return capsys.readouterr().err

    yield run
    jax.config.update("jax_compilation_cache_dir", cache_dir)


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, RuntimeError, KeyError])
def test_a_fault_of_a_library_shows_its_trace(plain, monkeypatch, tmp_path, kind):
    def broken(*_, **__):
        raise kind("shapes do not broadcast")

    monkeypatch.setattr(jax.numpy, "zeros", broken)
    said = plain("plan", "--config=scenes", f"--cache_dir={tmp_path}")
    assert said.startswith("Traceback")
    assert "in broken" in said
    assert "error: " not in said


@pytest.mark.parametrize("kind", everything_below(UserError))
def test_every_error_meant_for_users_is_one_line(plain, monkeypatch, tmp_path, kind):
    def refuse(*_, **__):
        raise kind("what was found; what is allowed")

    monkeypatch.setattr(plan, "plan", refuse)
    monkeypatch.setattr(session, "leave", lambda code, at_once=False: code)  # a full disk ends the process at once
    said = plain("plan", "--config=scenes", f"--cache_dir={tmp_path}")
    assert said == "error: what was found; what is allowed\n"
    assert "in refuse" in plain("plan", "--config=scenes", f"--cache_dir={tmp_path}", "--traceback")


def test_files_that_cannot_be_used_are_named(plain, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"\xff\xfe")
    cache = f"--cache_dir={tmp_path / 'cache'}"
    said = plain("plan", "--config=scenes:tasks=depth", cache, f"--json={file / 'plan.json'}")
    assert said.startswith(f"error: --json={file / 'plan.json'}: Not a directory ({file / 'plan.json'}")
    said = plain("train", "--config=scenes:tasks=depth", f"--workdir={tmp_path / 'run'}", f"--cache_dir={file / 'in'}")
    assert said.splitlines()[-1].startswith(f"error: --cache_dir={file / 'in'}: {file} is no directory")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.txt").write_bytes(file.read_bytes())
    folder = ["--config.data.source=folder", f"--config.data.root={tmp_path}"]
    said = plain("train", "--config=scenes:tasks=depth", f"--workdir={tmp_path / 'run'}", cache, *folder)
    assert said.startswith(f"error: {tmp_path / 'splits' / 'train.txt'}, list of ids: it is no UTF-8 text")
    assert "Traceback" not in said


def test_compiled_programs_are_kept_where_jax_itself_is_told_to(plain, monkeypatch, tmp_path):
    before, command = jax.config.jax_compilation_cache_dir, ("plan", "--config=nothing", f"--cache_dir={tmp_path}")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/programs")
    assert "nothing" in plain(*command)
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    plain(*command)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")


def test_a_bucket_is_no_working_directory(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config=scenes", "--workdir=gs://bucket/run"])
    assert caught.value.code == 2
    assert "--workdir: gs://bucket/run is no directory: mount the bucket" in " ".join(capsys.readouterr().err.split())


def test_evaluate_and_predict_refuse_what_they_do_not_know(refused, tmp_path):
    assert "no checkpoints in" in refused("evaluate", "--workdir=nowhere")
    unknown = refused("predict", "--workdir=nowhere", "--output=pictures", "a.jpg", "--sise=3", "b.jpg")
    assert "'--sise=3'" in unknown
    assert "a.jpg" not in unknown


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--help"], ["train", "evaluate", "predict", "prepare", "launch", "--config=scenes", "--config.steps=200"]),
        (["--version"], [f"sgw-jax {sgw_jax.__version__}"]),
        (["train", "--help"], ["--workdir", "--config", "--init_from", "--cache_dir", "--config.steps=200"]),
        (["evaluate", "--help"], ["--split", "--checkpoint"]),
        (["predict", "--help"], ["--output", "files of images or videos"]),
        (["demo", "--help"], ["--workdir", "--model", "--host", "--port", "--step"]),
        (["export", "--help"], ["--output", "--format", "--license", "--no_pictures", "--step"]),
        (["score", "--help"], ["--predictions", "DIR/NAME.npz", "--config", "--split", "--json"]),
        (["prepare", "--help"], ["usage: sgw-jax prepare", "sgw-jax prepare nyud --source=", "--workers"]),
        (["launch", "--help"], ["usage: sgw-jax launch local | tpu-vm | gke | slurm"]),
        (["launch", "tpu-vm", "--help"], ["usage: sgw-jax launch tpu-vm", "sgw-jax launch tpu-vm create --name="]),
        (["launch", "tpu-vm", "create", "--help"], ["usage: sgw-jax launch tpu-vm create", "--zone"]),
    ],
)
def test_help_helps(arguments, parts, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train", "--config=scenes"],
        ["score", "--config=scenes"],
        ["evaluate", "--workdir=run", "--checkpoint=worst"],
        ["evaluate", "--workdir=run", "--mesh=round"],
        ["prepare"],
        ["launch"],
        ["launch", "nowhere"],
        ["launch", "slurm"],
    ],
)
def test_a_wrong_use_is_exit_code_2_as_everywhere(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_arguments_are_those_given_not_those_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--config.steps=5"])
    assert read_config("scenes").steps != 5


LIGHT = """
import sys
from sgw_jax.__main__ import main
try:
    code = main({arguments!r})
except SystemExit as stop:
    code = stop.code
assert code == {code}, code
roots = {{name.partition(".")[0] for name in sys.modules}}
assert not roots & {heavy!r}, roots & {heavy!r}
"""
JAX = {"jax", "flax", "optax", "orbax", "tensorflow"}
THIRD_PARTY = JAX | {"numpy", "rich", "absl", "ml_collections", "tensorflow_datasets"}


@pytest.mark.parametrize(
    ("arguments", "code", "heavy"),
    [
        (["--help"], 0, THIRD_PARTY),
        (["--version"], 0, THIRD_PARTY),
        (["train", "--help"], 0, THIRD_PARTY),
        (["train"], 2, THIRD_PARTY),
        (["launch", "--help"], 0, THIRD_PARTY),
        (["launch", "slurm", "--time=1:00", "--dry-run", "--", "train"], 0, THIRD_PARTY),
        (["launch", "local", "--processes=0"], 2, THIRD_PARTY),
        (["prepare", "--help"], 0, JAX),
        (["prepare", "nyud", "--source=nowhere", "--out=out"], 1, JAX),
    ],
)
def test_a_command_imports_what_it_needs(arguments, code, heavy, tmp_path):
    script = LIGHT.format(arguments=arguments, code=code, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_exit_codes_pass_through(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "slurm", "--time=1:00", "--", "train"]) == 127
    assert main(["prepare", "nyud", "--source=nowhere", "--out=out"]) == 1
    assert capsys.readouterr().err.startswith("sbatch found nowhere on PATH")


@pytest.mark.parametrize("problem", [RuntimeError("Unable to initialize backend 'tpu': no libtpu"), AssertionError()])
def test_a_device_that_is_not_there_is_one_line(plain, monkeypatch, tmp_path, problem):
    def devices(*_):
        raise problem

    monkeypatch.setattr(jax, "devices", devices)
    said = plain("plan", "--config=scenes", f"--cache_dir={tmp_path}")
    assert said.startswith("error: JAX finds no device (JAX_PLATFORMS=cpu): ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("problem", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_memory_that_is_not_enough_is_one_line(plain, monkeypatch, tmp_path, problem):
    def large(*_, **__):
        raise problem

    monkeypatch.setattr(plan, "plan", large)
    said = plain("plan", "--config=scenes", f"--cache_dir={tmp_path}")
    assert said.startswith("error: Out of memory (")
    assert "a smaller config.batch_size" in said
    assert len(said.splitlines()) == 1
