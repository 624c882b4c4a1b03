"""The base install: modules and objectives work on what it brings; what needs [train] says so in one line."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
COMMANDS = (
    ("train", "--config=scenes", "--workdir=run"),
    ("evaluate", "--workdir=run"),
    ("predict", "--workdir=run", "--output=pictures", "photo.jpg"),
    ("export", "--workdir=run", "--output=model"),
    ("demo", "--workdir=run"),
    ("plan", "--config=scenes"),
    ("prepare", "nyud", "--source=archive", "--out=sets"),
)
NAMES = ("Predictor", "boundary", "build", "read_config")  # of sgw_jax, beside `load`, that need [train]
SAYS = re.compile(r'(.+) needs (\w+), which is not installed: pip install "sgw_jax\[train\]"\.')


def base() -> list[str]:
    """What setup.py lists for it."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (found,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "BASE"
    ]
    return ast.literal_eval(found)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: list[str]) -> set[str]:
    """The distributions that these bring, themselves among them."""
    todo, seen = [Requirement(text) for text in requirements], set()
    while todo:
        requirement = todo.pop()
        for extra in ("", *requirement.extras):
            if (canonical(requirement.name), extra) in seen:
                continue
            seen.add((canonical(requirement.name), extra))
            for text in metadata.requires(requirement.name) or []:
                found = Requirement(text)
                if found.marker is None or found.marker.evaluate({"extra": extra}):
                    todo.append(found)
    return {name for name, _ in seen}


def importable() -> set[str]:
    """Top-level modules of the base's distributions, but for orbax, which flax brings and [train] raises."""
    brought = closure(base()) - {"orbax-checkpoint"}
    return {module for module, names in metadata.packages_distributions().items() if {*map(canonical, names)} & brought}


HIDE = """
import sys
from importlib.machinery import PathFinder

class Hide:
    found = list(sys.meta_path)
    find_distributions = staticmethod(PathFinder.find_distributions)

    def find_spec(self, name, path=None, target=None):
        if path is None and name not in {allowed!r} and not name.startswith("_sysconfigdata"):
            return None
        return next((spec for finder in self.found if (spec := finder.find_spec(name, path, target))), None)

sys.meta_path[:] = [Hide()]
"""


def python(code: str, hide: bool = True) -> list[str]:
    """The lines that a fresh interpreter prints; of the base install unless ``hide`` is False."""
    hook = HIDE.format(allowed={*importable(), *sys.stdlib_module_names, "sgw_jax"}) if hide else ""
    done = subprocess.run([sys.executable, "-c", hook + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_base_is_small() -> None:
    brought = closure(base())
    assert len(brought) + 1 <= 35, sorted(brought)
    absent = {"grain", "tensorflow-datasets", "opencv-python-headless", "pillow", "scikit-image", "matplotlib", "chex"}
    assert not brought & absent


USE = """
import importlib, pkgutil
import jax, jax.numpy as jnp, numpy as np, optax
import sgw_jax
from sgw_jax.evaluation import metrics, selection

names = ["differentiate", "heads", "host", "model", "optimizers", "sharding", "train_step"]
for folder in ("backbones", "etf", "functional", "interactions", "layers", "multi_objective", "nnx", "tasks"):
    package = importlib.import_module(f"sgw_jax.{folder}")
    names += [f"{folder}.{found.name}" for found in pkgutil.walk_packages(package.__path__)]
for name in names:
    importlib.import_module(f"sgw_jax.{name}")
for name in set(sgw_jax.__all__) - set({NEEDING}):
    assert getattr(sgw_jax, name) is not None

key = jax.random.key(0)
features = {"semseg": jnp.ones((2, 3, 4, 8)), "depth": jnp.ones((2, 6, 8, 8))}
kem = sgw_jax.KEM(num_slots=2, top_k=3, etf_vertices=5)
fast = {"xla_backend_optimization_level": "0"}
found = jax.jit(lambda x: kem.apply(kem.init(key, x), x), compiler_options=fast)(features)
assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in features.items()}

tasks = [sgw_jax.TASKS["depth"](), sgw_jax.TASKS["saliency"]()]
backbone = sgw_jax.BACKBONES["vit"]("tiny", patch_size=8, width=8, depth=4, num_heads=2, image_size=(32, 32))
model = sgw_jax.MultiTaskModel(tasks, backbone, kem, channels=8, stride=8)
batch = {
    "image": np.zeros((2, 32, 32, 3), np.float32),
    "depth": np.ones((2, 32, 32, 1), np.float32),
    "saliency": np.ones((2, 32, 32, 1), np.float32),
}
start = lambda image: sgw_jax.init_state(model, optax.sgd(0.1), image)
state = jax.jit(start, compiler_options=fast)(batch["image"])
step = sgw_jax.make_train_step(model, tasks, optax.sgd(0.1))
state, values = jax.jit(step, compiler_options=fast)(state, batch)
assert int(state.step) == 1 and np.isfinite(values["loss"])
assert sgw_jax.delta_m({"depth": {"rmse": 1.0}}, {"depth": {"rmse": 2.0}}, tasks[:1]) == 50
print("works")
"""


def test_modules_and_objectives_work() -> None:
    assert python(USE.replace("{NEEDING}", repr(NAMES))) == ["works"]


REFUSED = """
import contextlib, io
import sgw_jax
from sgw_jax.__main__ import main
from sgw_jax.data_pipelines.errors import UserError

for name in {NAMES}:
    try:
        getattr(sgw_jax, name)
    except UserError as error:
        print(f"sgw_jax.{name}", error, sep="|")
try:
    sgw_jax.load("nowhere")
except UserError as error:
    print("sgw_jax.load", error, sep="|")
try:
    sgw_jax.from_pretrained("nowhere")
except UserError as error:
    print("sgw_jax.from_pretrained", error, sep="|")
for command, *rest in {COMMANDS}:
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        assert main([command, *rest]) == 1
    print(f"sgw-jax {command}", errors.getvalue().removeprefix("error: "), sep="|", end="")
from sgw_jax.launch import __main__
"""


def test_what_needs_the_extra_names_it() -> None:
    lines = python(REFUSED.replace("{NAMES}", repr(NAMES)).replace("{COMMANDS}", repr(COMMANDS)))
    asked = [f"sgw_jax.{name}" for name in (*NAMES, "load", "from_pretrained")] + [
        f"sgw-jax {command[0]}" for command in COMMANDS
    ]
    assert [line.partition("|")[0] for line in lines] == asked
    for what, message in (line.split("|") for line in lines):
        assert SAYS.fullmatch(message).group(1) == what


NEW = """
import sys
{first}
before = set(sys.modules)
{then}
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(roots - set(sys.stdlib_module_names)))
"""


def imported(first: str, then: str) -> set[str]:
    """The top-level packages, beyond the standard library, that ``then`` imports after ``first``."""
    (line,) = python(NEW.replace("{first}", first).replace("{then}", then), hide=False)
    return set(line.split())


def test_importing_the_package_imports_nothing_else() -> None:
    assert imported("", "import sgw_jax") == {"sgw_jax"}


def test_a_module_imports_little_beyond_flax_and_optax() -> None:
    little = {"sgw_jax", "jaxtyping"}
    assert imported("import flax, optax", "from sgw_jax import KEM") <= little | {"numpy"}
    assert imported("import flax, optax", "from sgw_jax import make_train_step, MultiTaskModel") <= little | {"numpy"}
