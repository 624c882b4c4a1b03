"""A model's folder and the hub: what goes out comes back bit by bit, and what is no model of ours is refused."""

import hashlib
import importlib
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
from hub_server import Hub, serving
from PIL import Image
from rich.console import Console

import sgw_jax
from sgw_jax.__main__ import main
from sgw_jax.backbones.tensors import PretrainedError
from sgw_jax.configs import base
from sgw_jax.data_pipelines.atomic import new_directory
from sgw_jax.data_pipelines.errors import MissingPackageError
from sgw_jax.experiment.build import build
from sgw_jax.experiment.data_sets import DATA_SETS
from sgw_jax.export import card, description, folder, shards
from sgw_jax.export.hub import HubError, locate
from sgw_jax.export.space import save_space
from sgw_jax.export.start import starting_point
from sgw_jax.report.record import Results, TaskDescription
from sgw_jax.run.checkpoints import Checkpoints
from sgw_jax.run.state import abstract_state, first_state
from sgw_jax.sharding import make_mesh
from sgw_jax.tasks import TASKS, SemSeg

SIZE = (32, 32)
STEP = 7
QUIET = Console(quiet=True)


def configuration(root: Path):
    config = base.get_config()
    config.tasks, config.interaction = ("semseg", "depth"), "skem"  # which has constants
    config.data.update({"source": "folder", "root": str(root), "size": SIZE, "num_classes": 3, "threads": 1})
    config.data.class_names = ("sky | sea", "road", "<b>car</b>")
    config.backbone_weights = str(root / "weights")
    config.backbones.vit.update({"width": 8, "depth": 4, "num_heads": 2, "patch_size": 16})
    config.interactions.skem.update({"num_slots": 2, "top_k": 4, "etf_vertices": 4})
    config.channels, config.stride = 8, 8
    config.update({"steps": 10, "batch_size": 8, "checkpoint_every": 10, "eval_every": 10, "ema_decay": 0.9})
    return config


def results(step: int, config: Any) -> Results:
    tasks = [
        TaskDescription("semseg", "miou", "%", True, {"miou": "%", "dice": "%"}, {"miou": True, "dice": True}),
        TaskDescription("depth", "rmse", "m", False, {"rmse": "m"}, {"rmse": False}),
    ]
    metrics = {"semseg": {"miou": 41.25, "dice": 55.5}, "depth": {"rmse": math.nan}}
    return Results(
        name="skem on folder",
        step=step,
        protocol="exact",
        split="test",
        tasks=tasks,
        metrics=metrics,
        losses={"semseg": 1.0, "depth": 2.0},
        per_class={},
        references={},
        delta_m={},
        diagnostics=None,
        parameters={"total": 1},
        environment={},
        config={"data.root": config.data.root},
        identity={},
        checkpoint="best",
        speed=None,
    )


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory):
    config = configuration(tmp_path_factory.mktemp("somebodys_data"))
    return build(config, None, mesh=make_mesh({}, jax.devices()[:1]))  # of several, a save takes a part of each array


@pytest.fixture(scope="module")
def workdir(experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, whose averages differ from its parameters."""
    place = tmp_path_factory.mktemp("somebodys_run") / "run"
    rng = np.random.default_rng(0)

    def drawn(leaf: jax.ShapeDtypeStruct) -> jax.Array:  # without a program that makes it
        value = rng.normal(0, 0.1, leaf.shape) if leaf.dtype == np.float32 else np.zeros(leaf.shape)
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    state = jax.tree.map(drawn, abstract_state(experiment))
    with Checkpoints(place / "checkpoints") as checkpoints:
        checkpoints.save(STEP, state, experiment.metadata())
    (place / "results.json").write_text(json.dumps(results(STEP, experiment.config).to_dict()))
    Image.new("RGB", (8, 8)).save(place / "examples.png")
    return place


@pytest.fixture(scope="module")
def predictor(workdir: Path):
    return sgw_jax.load(workdir)


@pytest.fixture(scope="module")
def model(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder, by the command."""
    output = tmp_path_factory.mktemp("exported") / "tiny"
    cache = f"--cache_dir={tmp_path_factory.mktemp('cache')}"
    before = jax.config.jax_compilation_cache_dir
    try:
        assert main(["export", f"--workdir={workdir}", f"--output={output}", "--license=apache-2.0", cache]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    return output


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found.variables) == jax.tree.structure(expected.variables)
    for mine, theirs in zip(jax.tree.leaves(found.variables), jax.tree.leaves(expected.variables), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


# --- there and back


def test_a_folder_predicts_what_the_run_does_bit_by_bit(model: Path, predictor) -> None:
    found = sgw_jax.from_pretrained(model)
    assert_same(found, predictor)
    assert (found.tasks, found.size, found.step, found.module) == (predictor.tasks, SIZE, STEP, predictor.module)
    expected = predictor(image())
    for name, values in found(image()).items():
        np.testing.assert_array_equal(values, expected[name])
    raw = found.module.apply(found.variables, np.zeros((1, *SIZE, 3), np.float32))  # for a loop of one's own
    assert raw["semseg"].shape == (1, *SIZE, 3)


@pytest.mark.slow
def test_the_command_writes_programs_that_predict_what_the_run_does(workdir: Path, predictor, tmp_path, capsys) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    expected = predictor(images)
    before = jax.config.jax_compilation_cache_dir
    try:
        for form in ("stablehlo", "onnx"):
            command = ["export", f"--workdir={workdir}", f"--output={tmp_path / form}", f"--format={form}"]
            assert main([*command, f"--cache_dir={tmp_path / 'cache'}"]) == 0
            out, err = capsys.readouterr()
            assert out == f"Step {STEP}: {tmp_path / form}\n"
            assert "uint8 RGB (batch, height, width, 3): any number, 32 x 32" in err
            assert main(command) == 1  # it is there
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    for name, values in sgw_jax.Predictor.from_stablehlo(tmp_path / "stablehlo")(images).items():
        np.testing.assert_array_equal(values, expected[name])
    session = onnxruntime.InferenceSession(tmp_path / "onnx", providers=["CPUExecutionProvider"])
    semseg, depth = session.run(["semseg", "depth"], {"images": images})
    assert (semseg != expected["semseg"]).mean() < 0.01  # where rounding decides
    np.testing.assert_allclose(depth, expected["depth"], rtol=1e-4, atol=1e-4)


def test_a_folder_of_a_folder_is_the_same(model: Path, tmp_path: Path) -> None:
    """Its card, perhaps edited, goes with it."""
    found = sgw_jax.from_pretrained(model)
    again = found.save_pretrained(tmp_path / "again")
    assert {path.name for path in again.iterdir()} == {path.name for path in model.iterdir()}
    for path in model.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match=r"license is 'mit', but the card of .* is kept"):
        found.save_pretrained(tmp_path / "other", license="mit")


def test_nothing_says_where_it_was_made(model: Path, workdir: Path, experiment) -> None:
    for path in model.iterdir():
        content = path.read_bytes()
        for place in (workdir, workdir.parent, experiment.config.data.root, "somebodys"):
            assert str(place).encode() not in content
    held = json.loads((model / "config.json").read_text())["config"]
    assert (held["data"]["root"], held["backbone_weights"], held["data"]["num_classes"]) == ("", "", 3)


def test_shards_and_their_index(predictor, tmp_path: Path) -> None:
    one = folder.save_folder(predictor, tmp_path / "one", pictures=False)
    many = folder.save_folder(predictor, tmp_path / "many", shard_bytes=4000, pictures=False)
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    assert not (many / "model.safetensors").exists()
    index = json.loads((many / "model.safetensors.index.json").read_text())
    whole = safetensors.numpy.load_file(one / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert_same(sgw_jax.from_pretrained(many), predictor)
    (many / files[1]).unlink()
    with pytest.raises(PretrainedError, match=rf"1 are missing: {files[1]}"):
        sgw_jax.from_pretrained(many)


def test_shards_are_as_full_as_they_may_be() -> None:
    sizes = {"a": 3, "b": 2, "c": 9, "d": 4, "e": 1}
    assert list(shards.shards(sizes, 5)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(shards.shards(sizes, 100)) == [list(sizes)]
    assert shards.SHARD == 5e9


class Mine(SemSeg):
    """A user's own task."""

    kind = "mine"


def test_a_users_own_tasks(predictor, tmp_path: Path) -> None:
    fields = {name: value for name, value in predictor.tasks[0].to_dict().items() if name != "kind"}
    tasks = (Mine(**fields), predictor.tasks[1])
    own = sgw_jax.Predictor(
        predictor.module.clone(tasks=tasks), predictor.variables, tasks, SIZE, config=predictor.config, step=STEP
    )
    saved = own.save_pretrained(tmp_path / "own")
    with pytest.raises(PretrainedError, match=r"config\.json describes a network .* Unknown kind of task 'mine'"):
        sgw_jax.from_pretrained(saved)
    assert sgw_jax.from_pretrained(saved, kinds={**TASKS, "mine": Mine}).tasks == tasks


def test_the_snippets_of_deploy_md_run(predictor, tmp_path: Path, monkeypatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "deploy.md").read_text(encoding="utf-8")
    text = page.partition("\n## StableHLO")[0]  # which test_stablehlo.py runs
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sgw_jax, "load", {"runs/scenes": predictor}.__getitem__)
    names: dict[str, Any] = {}
    for snippet in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(snippet, names)
    assert names["maps"]["depth"].shape == (480, 640)
    assert names["raw"]["semseg"].shape == (1, *SIZE, 3)


# --- writing


def test_a_folder_is_whole_or_absent_and_replaces_nothing(predictor, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OSError, match=r"mine holds letter\.txt; a model's folder is written to a new or empty"):
        predictor.save_pretrained(tmp_path / "mine")
    with pytest.raises(OSError, match="is no directory"):
        predictor.save_pretrained(tmp_path / "mine" / "letter.txt")
    with pytest.raises(ValueError, match=r"license is 'Apache 2'; give the hub's identifier"):
        predictor.save_pretrained(tmp_path / "new", license="Apache 2")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "model_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predictor.save_pretrained(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert (predictor.save_pretrained(tmp_path / "empty") / "config.json").exists()


def test_who_comes_second_replaces_nothing(tmp_path: Path) -> None:
    place = tmp_path / "place"

    def write() -> None:
        with new_directory(place) as partial:
            (partial / "mine").touch()
            place.mkdir()
            (place / "theirs").touch()

    with pytest.raises(OSError, match="not empty"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert [path.name for path in place.iterdir()] == ["theirs"]


def test_a_predictor_put_together_by_hand_has_no_configuration(predictor, tmp_path: Path) -> None:
    by_hand = sgw_jax.Predictor(predictor.module, predictor.variables, predictor.tasks, SIZE)
    with pytest.raises(ValueError, match="predictor has no configuration"):
        by_hand.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format=pickle"], "--format is 'pickle'; it must be one of"),
        (["--licence=mit"], "Unknown arguments"),
        (["--license=MIT License"], "license is 'MIT License'"),
        (["--model=org/rooms"], "--model: the format 'folder' has no such option"),
    ],
)
def test_the_command_refuses(arguments, message, workdir: Path, tmp_path: Path, capsys) -> None:
    before = jax.config.jax_compilation_cache_dir
    try:
        cache = f"--cache_dir={tmp_path / 'cache'}"
        assert main(["export", f"--workdir={workdir}", f"--output={tmp_path / 'new'}", cache, *arguments]) == 1
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_space_has_the_folder_inside(predictor, model: Path, tmp_path: Path) -> None:
    found = save_space(predictor, tmp_path / "page", license="apache-2.0")
    assert {path.name for path in found.iterdir()} == {"app.py", "requirements.txt", "README.md", "model"}
    for path in model.iterdir():
        if path.name != "README.md":  # which names the folder
            assert (found / "model" / path.name).read_bytes() == path.read_bytes()
    about = metadata((found / "README.md").read_text())
    assert (about["sdk"], about["app_file"], about["license"]) == ("gradio", "app.py", "apache-2.0")
    assert 'from_pretrained(Path(__file__).parent / "model")' in (found / "app.py").read_text()


# --- the card


def metadata(text: str) -> dict[str, Any]:
    """The YAML at the top, which is made of JSON values."""
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_says_what_a_stranger_needs(model: Path) -> None:
    text = (model / "README.md").read_text()
    found = metadata(text)
    assert (found["library_name"], found["license"], found["pipeline_tag"]) == (
        "sgw_jax",
        "apache-2.0",
        "image-segmentation",
    )
    assert {"jax", "semantic-segmentation", "depth-estimation"} <= set(found["tags"])
    assert "datasets" not in found  # a user's own folder is none of the hub's
    (entry,) = found["model-index"][0]["results"]  # depth's metric is not defined
    assert entry["task"]["name"] == "semseg"
    assert entry["metrics"] == [{"type": "miou", "value": 41.25, "name": "miou %"}]
    assert entry["dataset"] == {"name": "a folder of its maker's own images", "type": "folder", "split": "test"}
    assert "![Images, predictions and labels](examples.png)" in text
    assert (model / "examples.png").exists()
    assert "| semseg | miou % ↑ | 41.25 |" in text
    assert "| depth | rmse m ↓ | – |" in text
    assert "sky \\| sea, road, &lt;b>car&lt;/b>" in text
    assert 'sgw_jax.from_pretrained("tiny")' in text
    assert "pretrained weights of the backbone" in text


def test_the_card_shows_no_scores_of_another_step(workdir: Path, predictor, tmp_path: Path, experiment, capsys) -> None:
    other = SimpleNamespace(**{name: getattr(predictor, name) for name in ("module", "variables", "tasks", "size")})
    other.config, other.step, other.origin = predictor.config, STEP + 1, workdir
    saved = folder.save_folder(other, tmp_path / "other", console=Console())
    text = (saved / "README.md").read_text()
    assert "No results of this checkpoint" in text
    assert "metrics" not in metadata(text)
    assert not (saved / "examples.png").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert f"holds no results.json of step {STEP + 1}" in said
    assert "The card states no licence" in said
    bare = predictor.save_pretrained(tmp_path / "bare", pictures=False)
    assert not (bare / "examples.png").exists()
    assert "examples.png" not in (bare / "README.md").read_text()
    assert "license" not in metadata((bare / "README.md").read_text())


def test_every_data_set_and_task_is_known_to_the_card() -> None:
    assert card.DATA.keys() == DATA_SETS.keys()
    assert card.KINDS.keys() == TASKS.keys()


# --- reading what is not as it should be


def edit(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, **changes}))


def retensor(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DEPTH = "params/head_depth/"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json cannot be read: No such file"),
    "cut config": (lambda d: cut(d / "config.json"), r"config\.json is damaged: it is no JSON"),
    "another library": (
        lambda d: edit(d / "config.json", model_type="vit"),
        r"config\.json: model_type is 'vit'; it must be 'sgw_jax'",
    ),
    "a later release": (
        lambda d: edit(d / "config.json", format_version=2, sgw_jax_version="9.1"),
        r"is of sgw_jax 9\.1: format_version is 2, and .* reads up to 1\. Install a newer one",
    ),
    "odd version": (
        lambda d: edit(d / "config.json", format_version="1"),
        "format_version is '1'; it must be at least 1",
    ),
    "lost key": (lambda d: edit(d / "config.json", tasks=None), "tasks is None where a list belongs"),
    "odd task": (lambda d: edit(d / "config.json", tasks=[3]), r"does not describe a network of this package"),
    "odd configuration": (lambda d: edit(d / "config.json", config={}), r"does not describe a network of this package"),
    "other pixels": (
        lambda d: edit(d / "config.json", preprocessing={**description.preprocessing(SIZE), "mean": [0.5, 0.5, 0.5]}),
        r"preprocessing\.mean is \[0\.5, 0\.5, 0\.5\]; this release does \[0\.485",
    ),
    "no tensors": (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors does not exist"),
    "a pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        r"pytorch_model\.bin is not read",
    ),
    "cut tensors": (lambda d: cut(d / "model.safetensors"), r"model\.safetensors is truncated"),
    "one bit": (lambda d: flip(d / "model.safetensors"), r"model\.safetensors: the SHA-256 is .* a file was altered"),
    "fewer tasks": (
        lambda d: edit(d / "config.json", tasks=json.loads((d / "config.json").read_text())["tasks"][:1]),
        r"that the network has no use for: params/head_depth/",
    ),
    "more classes": (
        lambda d: edit(
            d / "config.json",
            tasks=[{"kind": "semseg", "num_classes": 5}, *json.loads((d / "config.json").read_text())["tasks"][1:]],
        ),
        r"of another shape: params/head_semseg/.*\(.*3\), not \(.*5\)\)",
    ),
    "lost tensor": (
        lambda d: retensor(d, lambda t: [t.pop(name) for name in list(t) if name.startswith(DEPTH)]),
        r"missing: params/head_depth/",
    ),
    "strange tensor": (
        lambda d: retensor(d, lambda t: t.update(more=np.zeros(3, np.float32))),
        "1 that the network has no use for: more",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_as_it_should_be_is_refused(fault: str, copy: Path) -> None:
    spoil, message = FAULTS[fault]
    spoil(copy)
    with pytest.raises(PretrainedError, match=message):
        sgw_jax.from_pretrained(copy)


def test_half_precision_is_another_type(copy: Path) -> None:
    """Even with a checksum that fits: a network is not rounded unasked."""
    retensor(copy, lambda t: t.update({name: value.astype(np.float16) for name, value in t.items()}))
    content = (copy / "model.safetensors").read_bytes()
    edit(copy / "config.json", sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(PretrainedError, match=r"of another type: .*\(float16, not float32\)"):
        sgw_jax.from_pretrained(copy)


def test_what_is_no_folder_says_what_it_is(workdir: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match=r"is a run's directory, no model's folder: sgw_jax\.load reads it"):
        sgw_jax.from_pretrained(workdir)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a model's folder"):
        sgw_jax.from_pretrained("nowhere")
    with pytest.raises(ValueError, match=r"revision is 'main', but .* is a directory here"):
        sgw_jax.from_pretrained(model, revision="main")


def test_a_mistyped_path_asks_no_hub(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="runs/scenes does not exist, but runs is a directory here"):
        locate("runs/scenes")


# --- training from one


def test_training_begins_from_a_folder(experiment, model: Path, predictor) -> None:
    said = Console(file=io.StringIO(), width=200)
    with starting_point(model) as start:
        state = first_state(experiment, start, said)
    text = said.file.getvalue()  # type: ignore[attr-defined]
    assert f"parameters from {model}, step {STEP}." in text
    count = len(jax.tree.leaves(state.params))
    assert f"Initialised {count} of {count}" in text
    jax.tree.map(np.testing.assert_array_equal, state.params, dict(predictor.variables["params"]))
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)


# --- the hub


TOKEN = "hf_ours"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serving(Hub(TOKEN)) as found:
        yield found


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch) -> Iterator[Callable[..., None]]:
    """Makes huggingface_hub read its variables anew, as at the start of a process."""

    def start(**variables: str) -> None:
        settings = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
        }
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        for name, value in {**settings, "HF_HUB_OFFLINE": "", **variables}.items():
            monkeypatch.setenv(name, value)
        forget()
        importlib.import_module("huggingface_hub")

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]

    start()
    yield start
    forget()


def files(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


# By its client, where huggingface_hub uploads without Xet.
uploads = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@uploads
def test_there_and_back_by_the_hub(hub: Hub, client, predictor, workdir: Path) -> None:
    client(HF_TOKEN=TOKEN)
    address = predictor.push_to_hub("us/tiny", license="apache-2.0", private=True, message="First")
    assert address.startswith(f"{hub.address}/us/tiny/commit/")
    assert "us/tiny" in hub.private
    assert len(hub.objects) == 2  # tensors and pictures, by LFS
    assert_same(sgw_jax.from_pretrained("us/tiny"), predictor)
    client()
    with pytest.raises(HubError, match=r"us/secret is neither a directory here nor a model of .*HF_TOKEN"):
        sgw_jax.from_pretrained("us/secret")


@uploads
def test_a_later_version_has_no_tensors_of_an_earlier_one(hub: Hub, client, predictor, tmp_path: Path) -> None:
    client(HF_TOKEN=TOKEN)
    many = folder.save_folder(predictor, tmp_path / "many", shard_bytes=4000)
    first = hub.publish("us/tiny", {".gitattributes": b"", "notes.txt": b"mine", **files(many)})
    predictor.push_to_hub("us/tiny")
    last = hub.versions["us/tiny"][-1]
    assert [name for name in last if name.startswith("model")] == ["model.safetensors"]
    assert last["notes.txt"] == b"mine"
    assert_same(sgw_jax.from_pretrained("us/tiny"), predictor)
    assert locate("us/tiny", first).name == first
    assert_same(sgw_jax.from_pretrained("us/tiny", revision=first), predictor)


def test_the_cache_serves_without_a_connection(hub: Hub, client, model: Path, predictor) -> None:
    hub.publish("us/tiny", files(model))
    with starting_point("us/tiny") as start:
        assert start is not None
        assert start.title == f"us/tiny, step {STEP}"
    hub.asked.clear()
    sgw_jax.from_pretrained("us/tiny")
    assert not [line for line in hub.asked if "/resolve/" in line]  # all there already
    client(HF_HUB_OFFLINE="1")
    hub.asked.clear()
    assert_same(sgw_jax.from_pretrained("us/tiny"), predictor)
    assert not hub.asked
    with pytest.raises(HubError, match=r"us/other is not, or not whole, in the hub's cache .*HF_HUB_OFFLINE is set"):
        sgw_jax.from_pretrained("us/other")


def test_what_the_hub_does_not_give(hub: Hub, client, model: Path) -> None:
    hub.publish("them/vit", {"config.json": b'{"model_type": "vit"}', "model.safetensors": b"0" * 1000})
    hub.publish("them/text", {"README.md": b"hello"})
    hub.publish("us/tiny", files(model))
    hub.publish("us/gated", files(model))
    hub.gated.add("us/gated")
    for name, revision, error, message in (
        ("them/none", None, HubError, "them/none is neither a directory here nor a model of"),
        ("them/vit", None, PretrainedError, r"model_type is 'vit'; it must be 'sgw_jax'"),
        ("them/text", None, HubError, r"has no config\.json"),
        ("us/tiny", "v2", HubError, r"us/tiny of the hub has no revision 'v2'"),
        ("us/gated", None, HubError, "grant access one by one"),
        ("us/-tiny", None, HubError, "is no name of a model on the hub"),
    ):
        with pytest.raises(error, match=message):
            sgw_jax.from_pretrained(name, revision=revision)
    assert not [line for line in hub.asked if "them/" in line and line.endswith(".safetensors")]
    client(HF_ENDPOINT="http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"them/new is not, .*http://127\.0\.0\.1:9 does not answer"):
        sgw_jax.from_pretrained("them/new")


@uploads
def test_what_the_hub_does_not_take(hub: Hub, client, predictor) -> None:
    with pytest.raises(HubError, match=r"us/tiny: .* refuses: .*HF_TOKEN|us/tiny is neither"):
        predictor.push_to_hub("us/tiny")
    client(HF_TOKEN=TOKEN)
    theirs = {"config.json": b'{"model_type": "vit"}', "model.safetensors": b"0" * 1000}
    hub.publish("us/vit", theirs)
    hub.publish("us/data", {"table.csv": b"1"})
    for name in ("us/vit", "us/data"):
        with pytest.raises(HubError, match=f"{name} of the hub is no model of this library"):
            predictor.push_to_hub(name)
    assert hub.versions["us/vit"] == [theirs]
    hub.publish("us/tiny", {".gitattributes": b""})
    hub.full = True
    with pytest.raises(HubError, match=r"us/tiny: Error while uploading .*Nothing was published"):
        predictor.push_to_hub("us/tiny")
    assert hub.versions["us/tiny"] == [{".gitattributes": b""}]
    with pytest.raises(ValueError, match="'tiny' is no name of a model on the hub; give org/name"):
        predictor.push_to_hub("tiny")


def test_without_the_extra_it_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r'The model us/tiny needs huggingface_hub, .*"sgw_jax\[hub\]"'):
        sgw_jax.from_pretrained("us/tiny")
