"""One training step and one evaluation step, as pure functions of (state, batch)."""

import inspect
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import flax.errors
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from sgw_jax.data_pipelines.batch_names import SOURCE, TAPS
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.differentiate import (
    GRADIENTS,
    Objective,
    Program,
    Question,
    by_parameters,
    by_representation,
    by_scalar,
    flat,
    initial_objective_state,
    unflat,
)
from sgw_jax.layers.parameter_names import owner
from sgw_jax.model import FEATURES, PRELIMINARY
from sgw_jax.multi_objective import Scalarizer, weighted_sum
from sgw_jax.tasks.base import Task
from sgw_jax.tasks.own_size import at_labels

Batch = Mapping[str, Array]

DROP_PATH = "drop_path"  # the stream that has always been

# Parameters -> a tree of those that learn, each at its path; of a stack of blocks it may hold the last rows alone.
Trained = Callable[[Any], Any]


class Apply(Protocol):
    """How a model is called: (variables {"params", "constants"}, image, train=, rngs={stream: key}) -> predictions."""

    def __call__(
        self, variables: Any, image: Float[Array, "batch height width 3"], /, *, train: bool, rngs: dict[str, Array]
    ) -> Mapping[str, Array]: ...


class TrainState(flax.struct.PyTreeNode):
    """All that a step reads and writes; what a checkpoint holds.

    Attributes:
      step: how many updates have been made (int32).
      seed: of all randomness in training (uint32); part of the state and no constant of the program, so that another
        seed needs no other program.
      params: the model's collection of that name, the frozen ones too.
      constants: likewise; they (the ETF) never change.
      opt_state: the optimiser's, of the trained parameters.
      ema: exponential moving average of the trained parameters, or None.
      objective: the state of the scalariser or aggregator.

    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from sgw_jax import KEM, TASKS, MultiTaskModel, TrainState, init_state
    >>> class Backbone(nn.Module):
    ...     def __call__(self, image, train=False):
    ...         return {4: image[:, ::4, ::4]}
    >>> tasks = [TASKS["depth"](), TASKS["normals"]()]
    >>> model = MultiTaskModel(tasks, Backbone(), KEM(num_slots=2), channels=4)
    >>> state = jax.eval_shape(lambda image: init_state(model, optax.sgd(0.1), image), jnp.ones((1, 8, 8, 3)))
    >>> isinstance(state, TrainState), sorted(state.variables)
    (True, ['constants', 'params'])
    """

    step: Int[Array, ""]
    seed: UInt32[Array, ""]
    params: Any
    constants: Any
    opt_state: Any
    ema: Any
    objective: Any

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables for evaluation: the averaged parameters where there are any."""
        averaged = self.params if self.ema is None else _overlaid(self.ema, self.params)
        return {"params": averaged, "constants": self.constants}


def init_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    image: Float[Array, "batch height width 3"],
    *,
    seed: int | UInt32[Array, ""] = 0,
    ema: bool = False,
    objective: Objective | None = None,
    init: Callable[[Array, Array], Mapping[str, Any]] | None = None,
    trained: Trained | None = None,
) -> TrainState:
    """The state at step 0. Call it under `jax.jit` with out_shardings, so that parameters are born where they live.

    Args:
      model: a linen module that is called with (image, train); any other needs ``init``, and is not looked at.
      optimizer: an Optax transformation.
      image: one batch (batch, H, W, 3), of which the shapes count.
      seed: in [0, 2^32); of the parameters, and of all that is random while training.
      ema: whether the state keeps an average of the parameters.
      objective: as of `make_train_step`.
      init: (key, image) -> {"params": any pytree of arrays, "constants": likewise, or absent}, in place of the model's.
      trained: as of `make_train_step`.

    Returns:
      The state; the parameters are as the model makes them.

    Raises:
      ValueError: a model with running state or other collections; one without an argument ``train`` and no ``init``.

    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from sgw_jax import KEM, TASKS, MultiTaskModel, init_state
    >>> class Backbone(nn.Module):
    ...     def __call__(self, image, train=False):
    ...         return {4: image[:, ::4, ::4]}
    >>> tasks = [TASKS["depth"](), TASKS["normals"]()]
    >>> model = MultiTaskModel(tasks, Backbone(), KEM(num_slots=2), channels=4)
    >>> make = jax.jit(lambda image: init_state(model, optax.sgd(0.1), image, seed=3))
    >>> state = make(jnp.ones((1, 8, 8, 3)))
    >>> int(state.step), int(state.seed), state.ema
    (0, 3, None)
    """
    key = jax.random.key(seed)
    if init is not None:
        variables = init(key, image)
    else:
        _check_call(model, "init_state", "init=lambda key, image: model.init(key, image)")
        variables = model.init({"params": key}, image, train=True)
    if unknown := set(variables) - {"params", "constants"}:
        raise InputError(
            f"The model has collections {sorted(unknown)}; a train step carries `params` and `constants` alone. Use "
            "layers without running state (LayerNorm or GroupNorm, not BatchNorm)."
        )
    params = variables["params"]
    part = params if trained is None else trained(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.array(seed, jnp.uint32),  # a copy: donated buffers must not be shared
        params=params,
        constants=variables.get("constants", {}),
        opt_state=optimizer.init(part),
        ema=jax.tree.map(jnp.copy, part) if ema else None,  # likewise
        objective=initial_objective_state(objective, part),
    )


def make_train_step(
    model: Any,
    tasks: Sequence[Task],
    optimizer: optax.GradientTransformation,
    *,
    objective: Objective | None = None,
    gradients: Literal["parameters", "representation"] = "parameters",
    accumulate: int = 1,
    ema_decay: float | None = None,
    rngs: Sequence[str] = (DROP_PATH,),
    apply: Apply | None = None,
    trained: Trained | None = None,
    sources: Mapping[str, Sequence[str]] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Builds ``step(state, batch) -> (state, metrics)``; jit it with the state donated.

    Losses are sums over all labelled pixels of the global batch divided by their count, per task, times the task's
    weight; a task without labels in the batch has loss 0, no gradient, and no say in how the others are combined.

    Each stream draws by the state's seed, the step, the micro-batch and its name, so a resumed run draws the same
    numbers.

    Args:
      model: a linen module that is called with (image, train); any other needs ``apply``, and is not looked at.
      tasks: what is trained; their names are keys of the batch.
      optimizer: an Optax transformation, of one gradient.
      objective: how losses become one update (multi_objective/): a scalariser, or an aggregator made for the number of
        tasks, whose weights act on the shared parameters, while a task's own take its own gradient
        (`parameter_names.owner` says whose they are). None is the sum.
      gradients: of which an aggregator takes the Gramian: the shared parameters, or the backbone's pyramid, which costs
        one backward pass of the backbone instead of one a task.
      accumulate: k micro-batches, one after another in a scan. Counts and balances are taken over the whole batch
        first, so the gradient equals that of one large batch up to rounding, whatever the objective.
      ema_decay: d in ``ema <- d ema + (1 - d) params``, with d at most (1 + step) / (10 + step) so that the
        random start is forgotten; None keeps no average.
      rngs: the streams that the model draws from in training, such as "dropout".
      apply: how the model is called, see `Apply`; None is ``model.apply(variables, image, train=train, rngs=rngs)``.
      trained: the part of the parameters that learns, see `Trained`; None is all. The rest is frozen: no gradient is
        taken of it (of what lies below all that learns there is no backward pass), and it has no moments, no average,
        no decay and no share in any norm.
      sources: of a mixture its sources' tasks by name, in the order of the numbers in the batch's "source", int32
        (batch,). None: there is no mixture.

    Returns:
      (state, {"image": (batch, H, W, 3), task: target}) -> (state, metrics); with ``taps/NAME`` in the batch too the
      backbone begins at its taps (`taps_of`). Metrics are float32 scalars: "loss" (the weighted sum, whatever the
      objective), "loss/TASK" (unweighted; 0 for a weight of 0), "grad_norm" (of the update), with an aggregator those
      of `gradient_metrics`; of a task that several of the ``sources`` share "loss/TASK/SOURCE" too, the loss on the
      rows of each.

    Raises:
      ValueError: weights of the tasks that are all 0; ``ema_decay`` outside [0, 1); unknown ``gradients``;
        "representation" with a model that has no `encode` and `decode`, or with ``apply``; a model
        without an argument ``train`` and no ``apply``; in the step, a stream that ``rngs`` lacks, an average in the
        state without ``ema_decay`` or the other way round, rows that ``accumulate`` does not divide, a batch without
        the image or a task's target, a model without a task's prediction.

    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from sgw_jax import KEM, TASKS, MultiTaskModel, init_state, make_train_step
    >>> class Backbone(nn.Module):
    ...     def __call__(self, image, train=False):
    ...         return {4: image[:, ::4, ::4]}
    >>> tasks = [TASKS["depth"](), TASKS["normals"]()]
    >>> model = MultiTaskModel(tasks, Backbone(), KEM(num_slots=2), channels=4)
    >>> image = jnp.ones((2, 8, 8, 3))
    >>> batch = {"image": image, "depth": jnp.ones((2, 8, 8)), "normals": image / 3**0.5}
    >>> optimizer = optax.sgd(0.1)
    >>> state = jax.jit(lambda image: init_state(model, optimizer, image))(image)
    >>> step = jax.jit(make_train_step(model, tasks, optimizer), donate_argnums=0)
    >>> state, metrics = step(state, batch)
    >>> int(state.step), sorted(metrics)
    (1, ['grad_norm', 'loss', 'loss/depth', 'loss/normals'])
    """
    objective = weighted_sum([1.0] * len(tasks)) if objective is None else objective
    names = [task.name for task in tasks]
    scale = tuple(float(task.weight) for task in tasks)
    if not any(scale):
        raise InputError(f"train step: the weights of the tasks {names} are all 0; give at least one that is positive.")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise InputError(f"train step: ema_decay is {ema_decay}; it must be in [0, 1), or None for no average.")
    if gradients not in GRADIENTS:
        raise InputError(f"train step: gradients is {gradients!r}; it must be one of {GRADIENTS}.")
    if gradients == "representation" and not (hasattr(model, "encode") and hasattr(model, "decode")):
        raise InputError(
            f"train step: gradients='representation' needs a model with encode and decode; {type(model).__name__} has "
            "none."
        )
    if gradients == "representation" and apply is not None:
        raise InputError("train step: gradients='representation' calls encode and decode, and apply= neither.")
    if isinstance(rngs, str):
        raise InputError(f"train step: rngs is {rngs!r}; give a sequence of names, ({rngs!r},).")
    call = _default_apply(model, "train step") if apply is None else apply
    mixes = getattr(getattr(model, "interaction", None), "mixes_tasks", True)
    shared = _shared_tasks(tasks, sources or {})

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        if (state.ema is None) != (ema_decay is None):
            raise InputError(
                f"train step: ema_decay is {ema_decay}, but the state holds {'no' if state.ema is None else 'an'} "
                "average; give both or neither (init_state(..., ema=True))."
            )
        _check_batch(tasks, batch, "train step")
        statistics = {task.name: task.batch_statistics(batch[task.name]) for task in tasks}
        mask = jnp.stack([statistics[name]["count"] > 0 for name in names])
        counts = {name: task.batch_statistics(only(batch))["count"] for name, task, only in shared}

        def weighted_losses(predictions: Any, part: Batch) -> tuple[list[Array], dict[str, Array]]:
            losses = task_losses(tasks, predictions, part, statistics)
            alone = {}
            for name, task, only in shared:  # balanced as the whole batch is, over the source's own pixels
                (loss,) = task_losses([task], predictions, {task.name: only(part)}, statistics)
                whole = jnp.maximum(statistics[task.name]["count"], 1)
                alone[f"loss/{name}"] = loss * (whole / jnp.maximum(counts[name], 1))
            return [factor * loss for factor, loss in zip(scale, losses, strict=True)], alone

        def variables(params: Any) -> dict[str, Any]:
            return {"params": unflat(params, state.params), "constants": state.constants}

        def options(key: Array) -> dict[str, Any]:
            return {"train": True, "rngs": {stream: _stream_key(key, stream) for stream in rngs}}

        def losses(params: Any, part: Batch, key: Array) -> tuple[list[Array], dict[str, Array]]:
            return weighted_losses(call(variables(params), part["image"], **options(key), **taps_of(part)), part)

        def encode(params: Any, part: Batch, key: Array) -> Any:
            known = taps_of(part)
            return model.apply(variables(params), part["image"], **options(key), **known, method="encode")

        def decode(z: Any, params: Any, part: Batch, key: Array) -> tuple[list[Array], dict[str, Array]]:
            size = part["image"].shape[1:3]
            return weighted_losses(model.apply(variables(params), z, size, **options(key), method="decode"), part)

        program = Program(*(_naming_streams(function, rngs) for function in (losses, encode, decode)))
        first = jax.random.fold_in(jax.random.key(state.seed), state.step)
        keys = jax.vmap(lambda micro: jax.random.fold_in(first, micro))(jnp.arange(accumulate))
        part = state.params if trained is None else trained(state.params)
        params = flat(part)
        own = frozenset(path for path in params if owner(path, names, mixes))
        parts = micro_batches(batch, accumulate)
        asked = Question(program, params, state.objective, parts, keys, mask, names, own)
        if isinstance(objective, Scalarizer):
            found = by_scalar(asked, objective)
        else:
            found = (by_parameters if gradients == "parameters" else by_representation)(asked, objective)
        grads = unflat({name: found.gradients[name] for name in params}, part)

        updates, opt_state = optimizer.update(grads, state.opt_state, part)
        new_part = optax.apply_updates(part, updates)
        metrics = {"loss": jnp.sum(found.losses), "grad_norm": optax.tree.norm(grads), **found.metrics}
        metrics |= {f"loss/{name}": found.losses[i] / (scale[i] or 1.0) for i, name in enumerate(names)}
        new_state = state.replace(
            step=state.step + 1,
            params=unflat(flat(new_part), state.params),
            opt_state=opt_state,
            ema=None if ema_decay is None else _averaged(state.ema, new_part, ema_decay, state.step),
            objective=found.state,
        )
        return new_state, metrics

    return step


def task_losses(
    tasks: Sequence[Task], predictions: Mapping[str, Array], batch: Batch, statistics: Mapping[str, Any]
) -> list[Float[Array, ""]]:
    """Loss of every task: final prediction plus, where the model gives one, the preliminary one at weight 1 (InvPT),
    plus the task's own term on its features, if it has one."""

    _check_predictions(tasks, predictions, "train step")

    def loss(task: Task) -> Array:
        known = statistics[task.name]
        total = jnp.zeros((), jnp.float32)
        for key in (task.name, PRELIMINARY + task.name):
            if key in predictions:
                total += task.loss_terms(predictions[key], batch[task.name], known)[0]
        if FEATURES + task.name in predictions:
            total += task.feature_loss_sum(predictions[FEATURES + task.name], batch[task.name])
        return total / jnp.maximum(known["count"], 1)

    return [loss(task) for task in tasks]


def taps_of(batch: Batch) -> dict[str, Any]:
    """What a call of the model is told of the batch's taps, ``taps/NAME`` each: of a frozen backbone, read from a cache
    (data_pipelines/tap_cache.py), bfloat16 as its 16 bits. Nothing where there are none."""
    found = {name.removeprefix(TAPS): value for name, value in batch.items() if name.startswith(TAPS)}
    typed = {
        name: jax.lax.bitcast_convert_type(value, jnp.bfloat16) if value.dtype == jnp.uint16 else value
        for name, value in found.items()
    }
    return {"taps": typed} if typed else {}


def _shared_tasks(
    tasks: Sequence[Task], sources: Mapping[str, Sequence[str]]
) -> list[tuple[str, Task, Callable[[Batch], Array]]]:
    """("TASK/SOURCE", task, batch -> its target with the rows of that source alone) of tasks that several sources have.

    The loss of a task that one source has is that source's.
    """

    def rows_of(place: int, task: Task) -> Callable[[Batch], Array]:
        def only(batch: Batch) -> Array:
            target = batch[task.name]
            rows = (batch[SOURCE] == place).reshape(-1, *(1,) * (target.ndim - 1))
            return jnp.where(rows, target, jnp.asarray(task.target["fill"], target.dtype))

        return only

    return [
        (f"{task.name}/{name}", task, rows_of(place, task))
        for task in tasks
        if sum(task.name in own for own in sources.values()) > 1
        for place, (name, own) in enumerate(sources.items())
        if task.name in own
    ]


def micro_batches(batch: Batch, parts: int) -> dict[str, Array]:
    """(B, ...) -> (parts, B / parts, ...): row r goes to micro-batch r mod parts, so that no row leaves its device."""
    for name, value in batch.items():
        if value.shape[0] % parts:
            raise InputError(f"accumulate: {name} has {value.shape[0]} rows, not a multiple of {parts} micro-batches.")
    return {k: jnp.swapaxes(v.reshape(v.shape[0] // parts, parts, *v.shape[1:]), 0, 1) for k, v in batch.items()}


def _overlaid(part: Any, params: Any) -> Any:
    """The parameters, with those of a part in their place; of a whole no copy is made."""
    whole = [leaf.shape for leaf in jax.tree.leaves(part)] == [leaf.shape for leaf in jax.tree.leaves(params)]
    return part if whole else _joined(part, params)


@jax.jit
def _joined(part: Any, params: Any) -> Any:
    return unflat(flat(part), params)


def _averaged(ema: Any, params: Any, decay: float, step: Array) -> Any:
    known = step.astype(jnp.float32)
    rate = 1.0 - jnp.minimum(decay, (1.0 + known) / (10.0 + known))
    return jax.tree.map(lambda old, new: old + rate * (new - old), ema, params)


def make_eval_step(
    model: Any, tasks: Sequence[Task], *, apply: Apply | None = None
) -> Callable[[Any, Batch], dict[str, Any]]:
    """Builds ``step(variables, batch) -> {task: {"metrics": sums, "loss": sum, "count": n}}``, all additive.

    Rows of padding hold only ignored labels and add nothing. Predictions are scored where labels are: at each image's
    own size, if the batch says where in the network's frame it lies (`at_labels`).

    Args:
      model: as of `make_train_step`.
      tasks: what is measured.
      apply: as of `make_train_step`; it is called with ``train=False`` and no rngs.

    Returns:
      (variables, {"image": (batch, H, W, 3), task: target}) -> sums by task; add them with `metrics.add_sums`.

    Raises:
      ValueError: a model without an argument ``train`` and no ``apply``; in the step, a batch without the image or a
        task's target, a model without a task's prediction.

    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax import KEM, TASKS, MultiTaskModel, make_eval_step
    >>> class Backbone(nn.Module):
    ...     def __call__(self, image, train=False):
    ...         return {4: image[:, ::4, ::4]}
    >>> tasks = [TASKS["depth"](), TASKS["normals"]()]
    >>> model = MultiTaskModel(tasks, Backbone(), KEM(num_slots=2), channels=4)
    >>> image = jnp.ones((2, 8, 8, 3))
    >>> batch = {"image": image, "depth": jnp.ones((2, 8, 8)), "normals": image / 3**0.5}
    >>> variables = jax.jit(model.init)(jax.random.key(0), image)
    >>> sums = jax.jit(make_eval_step(model, tasks))(variables, batch)
    >>> int(sums["depth"]["count"]), sorted(sums["depth"])
    (128, ['count', 'loss', 'metrics'])
    """
    call = _naming_streams(_default_apply(model, "evaluation step") if apply is None else apply, None)

    def step(variables: Any, batch: Batch) -> dict[str, Any]:
        _check_batch(tasks, batch, "evaluation step")
        predictions: Any = call(variables, batch["image"], train=False, rngs={}, **taps_of(batch))
        _check_predictions(tasks, predictions, "evaluation step")
        predictions = at_labels(tasks, predictions, batch)
        sums = {}
        for task in tasks:
            prediction, target = predictions[task.name], batch[task.name]
            loss, count = task.loss_terms(prediction, target)
            sums[task.name] = {"metrics": task.metric_sums(prediction, target), "loss": loss, "count": count}
        return sums

    return step


def _check_batch(tasks: Sequence[Task], batch: Batch, what: str) -> None:
    """Raises a ValueError unless the batch has the image and every task's target."""
    missing = [name for name in ("image", *(task.name for task in tasks)) if name not in batch]
    if missing:
        raise InputError(
            f"{what}: the batch lacks {', '.join(missing)}; its keys are {sorted(batch)}. It needs 'image' and every "
            "task's target under the task's name; of a task without labels, one full of what the task ignores."
        )


def _check_predictions(tasks: Sequence[Task], predictions: Mapping[str, Array], what: str) -> None:
    """Raises a ValueError unless the model predicts every task: what is not predicted would have the loss 0."""
    missing = [task.name for task in tasks if task.name not in predictions]
    if missing:
        raise InputError(
            f"{what}: the model predicts no {', '.join(missing)}, only {sorted(predictions)}; it must return a mapping "
            "with every task's prediction under the task's name."
        )


def _stream_key(key: Array, stream: str) -> Array:
    """Of a micro-batch's key, one for each stream; drop path's is the key itself."""
    return key if stream == DROP_PATH else jax.random.fold_in(key, zlib.crc32(stream.encode()))


def _default_apply(model: Any, what: str) -> Apply:
    _check_call(model, what, "apply=lambda variables, image, *, train, rngs: model.apply(variables, image, rngs=rngs)")

    def apply(variables: Any, image: Array, /, *, train: bool, rngs: dict[str, Array], **known: Any) -> Any:
        return model.apply(variables, image, train=train, rngs=rngs, **known)

    return apply


def _check_call(model: Any, what: str, remedy: str) -> None:
    """Raises a ValueError unless the model is a linen module whose call takes ``train``."""
    if not isinstance(model, nn.Module):
        raise InputError(f"{what}: {type(model).__name__} is no linen module; say how it is called, such as {remedy}.")
    parameters = inspect.signature(type(model).__call__).parameters.values()
    if not any(p.name == "train" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise InputError(
            f"{what}: the call of {type(model).__name__} has no argument train; say how it is called, such as {remedy}."
        )


def _naming_streams(function: Callable[..., Any], rngs: Sequence[str] | None) -> Callable[..., Any]:
    """The function, whose demand for a stream of randomness that was not named becomes an error that says how to."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except flax.errors.InvalidRngError as error:
            found = re.search(r'PRNG for "(\w+)"', str(error))
            if found is None:
                raise
            if rngs is None:
                raise InputError(
                    f"evaluation step: the model draws from the stream {found[1]!r} with train=False; give apply= that "
                    "calls it so that it draws nothing (deterministic=True)."
                ) from error
            raise InputError(
                f"train step: the model draws from the stream {found[1]!r}, but the step has {tuple(rngs)}; name it: "
                f"make_train_step(..., rngs={(*rngs, found[1])})."
            ) from error

    return call
