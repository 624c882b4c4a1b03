"""This library beside PyTorch, the same network with the same parameters, in one run: training step and prediction.

    python benchmarks/speed/pytorch.py [--models scenes vit_s] [--seconds 30]

Needs the extra [parity]. "scenes" is the default configuration's network (ViT of width 96, KEM, three tasks, subpixel
heads and convolutional stem replaced by bilinear heads and patches), "vit_s" ViT-S with 64 task channels. Losses and
predictions of the two sides are compared first (1e-4 relative). Training step: forward, losses, backward, AdamW; calls
take turns in a process that does nothing else (training leaves a heap in which prediction is slower, ours more than
theirs), medians are reported, ratios above 1 mean that ours is faster. Peak memory and the time to the first step (from
the start of a process: imports, compilation) come from further processes; ours with an empty and then with a warm
compilation cache. KEM is timed alone beside torch's dense attention over the same tokens.

MFU: the step's FLOPs (counted from the trace of the forward pass, times three) over what a large float32 matrix product
reaches in the same process. Writes benchmarks/results/pytorch_DEVICE.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import DASH, Results, in_turn, medians, merged
from sgw_jax.experiment.build import build_model, build_tasks
from sgw_jax.experiment.config_files import read_config
from sgw_jax.host import keep_freed_memory
from sgw_jax.interactions import KEM
from sgw_jax.optimizers import make_optimizer
from sgw_jax.plan.cost import multiply_accumulates
from sgw_jax.train_step import init_state, make_train_step

RATE = 1e-4
TASKS = ("semseg", "depth", "normals")
VIT_S = {"width": 384, "depth": 12, "num_heads": 6, "patch_size": 16}
MODELS: dict[str, tuple[int, tuple[int, int], dict[str, Any]]] = {  # batch, image, options
    "scenes": (8, (64, 96), {}),
    "vit_s": (2, (224, 224), {**{f"backbones.vit.{k}": v for k, v in VIT_S.items()}, "channels": 64}),
}


class Side:
    """One model: its network, tasks, batch and initial state."""

    def __init__(self, name: str) -> None:
        rows, size, options = MODELS[name]
        options = {"upsample": "bilinear", "backbones.vit.patch_embed": "patch", **options}
        # The paper's KEM: gates start at 0, and the comparison of predictions would not see it.
        options |= {"data.size": ",".join(map(str, size)), "interactions.kem.task_gate": "false"}
        flags = [f"--config.{key}={value}" for key, value in options.items()]
        config = read_config(f"scenes:interaction=kem,tasks={'+'.join(TASKS)}", flags)
        self.config, self.rows, self.size = config, rows, size
        self.tasks = build_tasks(config)
        self.model = build_model(config, self.tasks)
        rng = np.random.default_rng(0)
        normals = rng.normal(size=(rows, *size, 3))
        self.batch = {
            "image": rng.normal(size=(rows, *size, 3)).astype(np.float32),
            "semseg": rng.integers(0, 12, (rows, *size)).astype(np.int32),
            "depth": rng.uniform(0.5, 5, (rows, *size, 1)).astype(np.float32),
            "normals": (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32),
        }
        self.optimizer = make_optimizer(RATE)
        make = lambda: init_state(self.model, self.optimizer, jnp.zeros((1, *size, 3)))  # noqa: E731
        self.state = jax.jit(make)()

    def ours(self, what: str) -> Callable[[], Any]:
        """A call that trains a step, or predicts."""
        batch = jax.device_put(self.batch)
        if what == "prediction":
            run = jax.jit(self.model.apply)
            variables = self.state.variables
            return lambda: jax.block_until_ready(run(variables, batch["image"]))
        step = jax.jit(make_train_step(self.model, self.tasks, self.optimizer), donate_argnums=0)
        held = [jax.tree.map(jnp.copy, self.state)]

        def call() -> Any:
            held[0], measured = step(held[0], batch)
            return jax.block_until_ready(measured)

        return call

    def theirs(self, what: str, compiled: bool) -> Callable[[], Any]:
        """The same in PyTorch."""
        import torch

        from benchmarks.speed.torch_model import MultiTask, losses

        torch.set_num_threads(os.cpu_count() or 1)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        params = jax.device_get(self.state.params)
        heads, top_k = self.config.backbones.vit.num_heads, self.config.interactions.kem.top_k
        model = MultiTask(params, [task.name for task in self.tasks], heads, top_k).to(device)
        batch = {key: torch.from_numpy(value).to(device) for key, value in self.batch.items()}
        batch["semseg"] = batch["semseg"].long()
        run = torch.compile(model, dynamic=False) if compiled else model
        if what == "prediction":

            def predict() -> Any:
                with torch.inference_mode():
                    found = run(batch["image"])
                return _synchronised(torch, found)

            return predict
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)

        def train() -> Any:
            found = losses(run(batch["image"]), batch)
            optimizer.zero_grad(set_to_none=True)
            sum(found.values()).backward()
            optimizer.step()
            return _synchronised(torch, found)

        return train

    def check(self) -> None:
        """Raises where the two sides do not compute the same."""
        ours, theirs = self.ours("prediction")(), self.theirs("prediction", False)()
        for key, value in ours.items():
            np.testing.assert_allclose(np.asarray(value), theirs[key].cpu().numpy(), rtol=1e-3, atol=1e-4)
        step, other = self.ours("training step"), self.theirs("training step", False)
        # The third loss has two updates behind it, in which Adam makes whole steps of gradients that are rounding.
        for tolerance in (1e-4, None, 1e-2):
            measured, found = step(), other()
            for task in self.tasks if tolerance else ():
                pair = float(measured[f"loss/{task.name}"]), float(found[task.name].detach())
                np.testing.assert_allclose(*pair, rtol=tolerance)


def _synchronised(torch: Any, value: Any) -> Any:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return value


def matmul_peak() -> float:
    """FLOP/s of a float32 product of two 2048 x 2048 matrices, the best of ten."""
    x = jnp.ones((2048, 2048), jnp.float32)
    run = jax.jit(lambda a: a @ a)
    jax.block_until_ready(run(x))
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        jax.block_until_ready(run(x))
        times.append(time.perf_counter() - begun)
    return 2 * 2048**3 / min(times)


def kem_alone(seconds: float) -> list[dict[str, Any]]:
    """KEM beside torch's scaled-dot-product attention of the same tokens (projections included), forward."""
    import torch
    import torch.nn.functional as F

    rows = []
    for tokens in (1024, 4096, 16384):
        value = np.random.default_rng(0).normal(size=(1, tokens, 64)).astype(np.float32)
        module = KEM(16, top_k=32)
        features = {"a": jnp.asarray(value)}
        variables = jax.jit(module.init)(jax.random.key(0), features)
        run = jax.jit(module.apply)
        tensor, dense = torch.from_numpy(value), [torch.nn.Linear(64, 64, bias=False) for _ in range(4)]

        def attend(tensor: Any = tensor, dense: Any = dense) -> Any:
            with torch.inference_mode():
                return tensor + dense[3](F.scaled_dot_product_attention(*(layer(tensor) for layer in dense[:3])))

        calls = {"kem": lambda f=run, v=variables, x=features: jax.block_until_ready(f(v, x)), "torch": attend}
        found = medians(in_turn(calls, seconds))
        rows.append({"tokens": tokens, **found, "ratio": found["torch"] / found["kem"]})
    return rows


def of_own_process(name: str, child: str, what: str, *flags: str) -> dict[str, float]:
    """What a `CHILDREN` returns in a new process."""
    flags = (f"--models={name}", f"--child={child}", f"--what={what}", f"--started={time.time()}", *flags)
    done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def in_turns(side: Side, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a call of ours, of eager and of compiled PyTorch; "peak": FLOP/s of a large matrix product."""
    what, peak = arguments.what, matmul_peak()
    calls = {"ours": side.ours(what), "eager": side.theirs(what, False), "compiled": side.theirs(what, True)}
    return {**medians(in_turn(calls, arguments.seconds)), "peak": peak}


def first_call(call: Callable[[], Any], arguments: argparse.Namespace) -> dict[str, float]:
    """{"first_call": seconds from the start of the process, "peak_MiB": of resident memory during a later call}."""
    call()
    first = time.time() - arguments.started  # imports included
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (Linux)
    call()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]
    return {"first_call": first, "peak_MiB": peak}


def check(side: Side, arguments: argparse.Namespace) -> dict[str, float]:
    """{"macs": of the forward pass}, after both sides were found to compute the same."""
    side.check()
    image = jax.ShapeDtypeStruct((side.rows, *side.size, 3), jnp.float32)
    counted = multiply_accumulates(side.model.apply, jax.eval_shape(lambda: side.state.variables), image)
    return {"macs": sum(counted.values())}


CHILDREN: dict[str, Callable[[Side, argparse.Namespace], dict[str, float]]] = {
    "check": check,
    "turns": in_turns,
    "ours": lambda side, arguments: first_call(side.ours(arguments.what), arguments),
    "theirs": lambda side, arguments: first_call(side.theirs(arguments.what, False), arguments),
}


def measure(name: str, seconds: float) -> list[dict[str, Any]]:
    """A model's rows."""
    flops = 2 * of_own_process(name, "check", "")["macs"]
    rows = []
    for what, times in (("training step", 3), ("prediction", 1)):
        median = of_own_process(name, "turns", what, f"--seconds={seconds}")
        peak = median.pop("peak")
        row: dict[str, Any] = {"model": name, "what": what, "batch": MODELS[name][0], "seconds": median, "peak": peak}
        row["mfu"] = times * flops / median["ours"] / peak
        if jax.devices()[0].platform == "cpu":
            with tempfile.TemporaryDirectory() as cache:
                row["cold"] = of_own_process(name, "ours", what, f"--cache={cache}")
                row["warm"] = of_own_process(name, "ours", what, f"--cache={cache}")
            row["torch"] = of_own_process(name, "theirs", what)
        rows.append(row)
    return rows


def table(found: dict[str, Any]) -> list[str]:
    """Markdown."""
    lines = [
        "| network | | ours images/s | torch eager | ratio | torch.compile | ratio | MFU | peak MiB ours, torch "
        "| first call s: cold, warm cache, torch eager |",
        "|" + "---|" * 10,
    ]
    for row in found["rows"]:
        seconds = row["seconds"]
        cells = [row["model"], row["what"], f"{row['batch'] / seconds['ours']:.1f}"]
        for other in ("eager", "compiled"):
            cells += [f"{row['batch'] / seconds[other]:.1f}", f"{seconds[other] / seconds['ours']:.2f}"]
        cells.append(f"{row['mfu']:.0%}")
        if "cold" not in row:  # not on a CPU
            cells += [DASH, DASH]
        else:
            cells.append(f"{row['cold']['peak_MiB']:.0f}, {row['torch']['peak_MiB']:.0f}")
            cells.append(", ".join(f"{row[key]['first_call']:.1f}" for key in ("cold", "warm", "torch")))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| tokens | KEM ms | torch attention ms | ratio |", "|---|---|---|---|"]
    for row in found["kem"]:
        lines.append(f"| {row['tokens']:,} | {1e3 * row['kem']:.2f} | {1e3 * row['torch']:.2f} | {row['ratio']:.1f} |")
    return lines


def main() -> None:
    """Measures and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=30.0, help="per comparison")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    parser.add_argument("--cache", default="", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.child:
        if arguments.cache:
            jax.config.update("jax_compilation_cache_dir", arguments.cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        print(json.dumps(CHILDREN[arguments.child](Side(arguments.models[0]), arguments)))
        return

    import torch

    device = jax.devices()[0]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a GPU's memory
    results = Results(f"pytorch_{device.platform}", arguments.output, torch=torch.__version__)
    rows = [row for name in arguments.models for row in measure(name, arguments.seconds)]
    found = results.update(rows=merged(results.rows(), rows, "model"), kem=kem_alone(arguments.seconds / 6))
    Console().print("\n".join(table(found)), soft_wrap=True)


if __name__ == "__main__":
    main()
