"""Functions that the trainers share: seeds, batches, the model in training, the state of a run.

The run itself is in run.py, the optimizer in optimizers.py, the checks of settings in configs.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import random
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .. import models, parallel, sharding
from ..errors import ConfigError, NonFiniteError
from ..packing import why_not_packed
from . import optimizers

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


def start(config, cls: type) -> None:
    """The first line of every trainer: joins the other processes, if there are any, and seeds the random generators.
    ConfigError if the first argument is not the trainer's config (TRL's trainers take the model first), or if the
    config was changed after it was made and is not valid any more."""
    parallel.start(config)
    if not isinstance(config, cls):
        trainer = cls.__name__.replace("Config", "Trainer")
        got = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
        if got == cls.__name__:  # TRL's
            got = f"{type(config).__module__}.{got}"
        raise ConfigError(f"{trainer}({cls.__name__}(...), model, ...) takes the config first, got {got}")
    config.__post_init__()  # checks it again
    set_seed(config.seed)


# --- seeds ------------------------------------------------------------------------------------------------------------


def set_seed(seed: int) -> None:
    """Seeds torch (all devices), numpy and random."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**64)  # seed_apart may pass the end


def seed_apart(seed: int) -> None:
    """Called once every process has built the same model: from here on each process draws its own dropout masks,
    and its rewards draw their own numbers."""
    if parallel.rank():
        set_seed(seed + parallel.rank())


def rng_state() -> dict:
    """The state of every generator that set_seed seeds, in types that torch.load(weights_only=True) accepts."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "random": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["random"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        states = state["cuda"][: torch.cuda.device_count()]  # the run may have begun on a machine with more GPUs
        torch.cuda.set_rng_state_all([s.cpu() for s in states])


@contextmanager
def preserved_rng():
    """Restores the random generators at the end, so that evaluations and samples do not change the run."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


# --- data -------------------------------------------------------------------------------------------------------------


def batch_size(config) -> int:
    """The number of rows that one step learns from, over all processes."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * parallel.size()


def micro_batches(batch: list, tokens: list[int], config) -> list[tuple[list, bool]]:
    """This process's share of a step, balanced by tokens, in micro-batches, each as equally_many returns it."""
    mine, size = parallel.share(batch, tokens), config.per_device_train_batch_size
    return equally_many([mine[k : k + size] for k in range(0, len(mine), size)], batch[-1:], config)


def equally_many(parts: list, spare, config) -> list[tuple]:
    """(micro-batch, True) for each of this process's micro-batches. With fsdp all processes must run equally many, so
    a shorter list is filled up with (spare, False), which runs but does not count."""
    counted = [(part, True) for part in parts]
    return sharding.as_many(counted, (spare, False)) if config.fsdp else counted


def epoch_batches(
    lengths, batch_size: int, *, seed: int | None = None, epoch: int = 0, by_length: bool = True
) -> list[list[int]]:
    """Indices of one epoch in batches; one batch may be smaller, nothing is dropped.

    The result depends only on the arguments, so a checkpoint needs only the number of steps done.
    by_length: examples of similar length share a batch. They are shuffled, sorted by length within each 50 batches, and
    then the batches are shuffled. Without by_length (if nothing is padded) batches are drawn at random.
    seed None: sorted, not shuffled, longest first.
    """

    def split(order: np.ndarray) -> list[list[int]]:
        return [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]

    lengths = np.asarray(lengths)
    if seed is None:
        return split(np.argsort(-lengths, kind="stable"))
    generator = np.random.default_rng([seed % 2**32, epoch])
    order = np.arange(len(lengths))
    generator.shuffle(order)
    if not by_length:
        return split(order)
    batches = []
    for start in range(0, len(order), 50 * batch_size):
        pool = order[start : start + 50 * batch_size]
        batches += split(pool[np.argsort(-lengths[pool], kind="stable")])
    generator.shuffle(batches)
    return batches


def run_batches(lengths, batch_size: int, *, seed: int, start: int, stop: int, by_length: bool = True):
    """Yields (epochs done after the step, indices) for the steps from start to stop - 1."""
    per_epoch = math.ceil(len(lengths) / batch_size)
    while start < stop:
        batches = epoch_batches(lengths, batch_size, seed=seed, epoch=start // per_epoch, by_length=by_length)
        for indices in batches[start % per_epoch :]:
            if start == stop:
                return
            start += 1
            yield start / per_epoch, indices


def read_datasets(read, train_dataset, eval_dataset, tokenizer, **options) -> tuple[list, list, list]:
    """Reads both datasets with a function of data/formats.py -> the examples, the held-out examples ([] if there are
    none) and the Reports."""
    examples, report = read(train_dataset, tokenizer, **options)
    if eval_dataset is None:
        return examples, [], [report]
    held_out, second = read(eval_dataset, tokenizer, **options, name="eval_dataset")
    return examples, held_out, [report, second]


def digest(arrays: Iterable) -> str:
    """A hash of the content of the arrays (tokens, masks, labels), in order."""
    content = hashlib.blake2b(digest_size=16)
    for array in arrays:
        content.update(np.ascontiguousarray(array))
    return content.hexdigest()


def check_same_data(state: dict, lengths: list[int], data: str, tokenizer) -> None:
    """Raises ConfigError if a checkpoint was trained on other data: its lengths or its digest differ from those of the
    data now, as the tokenizer encodes it."""
    before = state["lengths"].tolist()
    if before != lengths or state["data"] != data:
        differs = "in content" if before == lengths else f"{len(before)} examples, now {len(lengths)}, or other lengths"
        dated = (
            " (its chat template writes today's date by strftime_now: put the day on which the run began there)"
            if "strftime_now" in str(tokenizer.chat_template)
            else ""
        )
        raise ConfigError(
            f"the checkpoint was trained on other data ({differs}): resume with the same dataset, tokenizer{dated} and "
            "maximum length, or start a new run from that model"
        )


def steps_in_run(num_examples: int, config) -> int:
    """Optimizer steps of a run: max_steps if it is > 0, else num_train_epochs over the data."""
    if config.max_steps > 0:
        return config.max_steps
    per_epoch = math.ceil(num_examples / batch_size(config))
    return math.ceil(per_epoch * config.num_train_epochs)


# --- the model in training --------------------------------------------------------------------------------------------


def check_best(config, eval_dataset) -> None:
    """Raises ConfigError if load_best_model_at_end has no evaluations to compare."""
    if config.load_best_model_at_end and (eval_dataset is None or not config.eval_steps):
        raise ConfigError("load_best_model_at_end needs an eval_dataset (eval_data) and eval_steps")


def prepare(model, config, given):
    """The model with the adapters (lora_*) and gradient_checkpointing that the config asks for. Checks that it can be
    trained, and that the device has bf16 if the config asks for it."""
    model = with_adapters(model, config, given)
    if config.gradient_checkpointing:
        models.checkpoint_activations(model)
    check_bf16(config.bf16, model.device)
    check_learns(model, "the model")
    return model


def with_adapters(model, config, given):
    """The model with the adapters that lora_* ask for. given: the trainer's argument that `model` was loaded from."""
    models.check_adapters(model)
    if not config.lora_r:
        return model
    if not models.has_adapters(model):  # with adapters add_lora refuses it
        models.check_base_is_saved(given)
    return models.add_lora(
        model, r=config.lora_r, alpha=config.lora_alpha, dropout=getattr(config, "lora_dropout", 0.0),
        target_modules=config.lora_target_modules,
    )  # fmt: skip


def check_learns(model, name: str) -> None:
    """Raises ConfigError if no parameter is trainable, or if one is in 16 bits.

    AdamW moves a weight by about the learning rate. A bfloat16 has 8 significant bits, so a step below 1/512 of the
    weight rounds to nothing, and at the usual rates most steps are smaller than that.
    """
    learning = {p.dtype for p in model.parameters() if p.requires_grad}
    if not learning:
        advice = "call its requires_grad_(True) (for example, peft's merge_and_unload returns a frozen model)"
        if models.has_adapters(model):
            advice = (
                "load adapters that are to learn with peft.PeftModel.from_pretrained(base, path, is_trainable=True), "
                "or give their path"
            )
        raise ConfigError(f"{name} has nothing that requires grad: {advice}")
    if half := learning & {torch.bfloat16, torch.float16}:
        raise ConfigError(
            f"{name} would learn in {str(half.pop()).removeprefix('torch.')}, where most of AdamW's steps round to "
            "nothing: load it with dtype=torch.float32, or give its path (with bf16: true it still multiplies in "
            "bfloat16), or train float32 adapters on it (lora_r; in PPO with share_trunk)"
        )


def bf16_supported(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def check_bf16(wanted: bool, device: torch.device) -> None:
    if wanted and not bf16_supported(device):
        raise ConfigError(f"bf16: {device.type} has no bfloat16 instructions here, so it would only be slower")


def packing_if_possible(model, longest: int, bf16: bool, required: bool = False) -> bool:
    """Whether the model can train on rows without padding (packing.py), if no sequence has more than `longest` tokens.
    If it cannot, this warns, or raises ConfigError if packing is required."""
    reason = why_not_packed(model, longest, bf16)
    if reason and required:
        raise ConfigError(f"packing: {reason}; set packing to false")
    if reason:
        warnings.warn(f"batches are padded, within buckets of similar length: {reason}", stacklevel=3)
    return not reason


def share_out(networks: list, config, data: str, held_out: list) -> None:
    """Called after the models are made and before their optimizer is. All processes get the first one's weights
    (ConfigError if they read different data). With fsdp each process then keeps only its rows of the layers."""
    settings = vars(config) | {"output_dir": None}  # only the first process writes, so this may contain the time of day
    parallel.begin_equal(networks, config=settings, data=data, eval_dataset=len(held_out))
    if config.fsdp:
        sharding.shard(*networks)


def learning_together(config):
    """A context for the micro-batches of a step: if one process fails inside, all fail."""
    return parallel.exit_all() if config.fsdp else parallel.raise_in_all()


@contextmanager
def freed_memory_kept(model):
    """Inside, on the CPU, glibc's malloc keeps the memory that is freed: it would return a large block to the system,
    and each step would fault in the pages of its gradients again. At the end the memory is returned. This works in the
    main thread; in others malloc does as always."""
    libc = ctypes.CDLL(None) if model.device.type == "cpu" else None
    if not hasattr(libc, "mallopt"):  # not glibc
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:  # to what glibc itself has arrived at by then: it raises both limits with the blocks that it sees freed
        libc.mallopt(M_MMAP_MAX, 65_536)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)


def autocast(model, bf16: bool):
    """A context in which matrix products are in bfloat16 if bf16 is true, those of the linear losses too; weights and
    sums stay in float32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)


def take_step(trainer, examples: list, num_tokens: int) -> dict:
    """Steps the optimizer with the gradient that the examples have left, and counts the step and its tokens -> its
    metrics. trainer.whole is False from here on; the trainer sets it again once nothing of its step can fail any more.
    """
    learning_rate = trainer.scheduler.get_last_lr()[0]
    trainer.whole = False
    grad_norm = optimizers.optimizer_step(trainer.optimizer, trainer.scheduler, trainer.config.max_grad_norm)
    finite, last = bool(grad_norm.isfinite()), trainer.step + 1 == trainer.total_steps
    trainer.guard.check(finite, "the gradient", lambda: [vars(x) for x in examples], last)
    trainer.step += 1
    trainer.num_tokens += num_tokens
    return {"grad_norm": grad_norm, "learning_rate": learning_rate, "num_tokens": trainer.num_tokens}


# --- updates that are not finite --------------------------------------------------------------------------------------


class NonFiniteGuard:
    """Counts the updates that are skipped because something is not finite, and ends the run after `limit` in a row, or
    at its end if it has skipped all of them."""

    def __init__(self, limit: int, output_dir: str):
        self.limit, self.output_dir, self.taken, self.skipped, self.in_a_row = limit, output_dir, 0, 0, 0

    def check(self, finite: bool, what: str, batch: Callable[[], object], last: bool = False) -> bool:
        """Returns `finite`. If it is False: counts and warns, and where the run ends saves batch() and raises
        NonFiniteError. last: whether this is the last update of the run."""
        if finite:
            self.taken, self.in_a_row = self.taken + 1, 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        message = f"{what} is not finite: this update is skipped, number {self.skipped} of the run"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        all_skipped = last and not self.taken
        if self.in_a_row >= self.limit or all_skipped:
            path = Path(self.output_dir) / "non_finite_batch.pt"
            if parallel.rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(_with_tensors(batch()), path)
            those = f"{self.in_a_row} updates in a row" + (", all of the run" if all_skipped else "")
            raise NonFiniteError(
                f"{what} was not finite in {those}, so the run ends; the last batch is in {str(path)!r} (torch.load). "
                "Check that first, then the learning rate and the dtype"
            )
        return False


def _with_tensors(x):
    """The same nested lists and dicts, with tensors instead of numpy arrays, for torch.load(weights_only=True)."""
    if isinstance(x, dict):
        return {key: _with_tensors(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_with_tensors(value) for value in x]
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


# --- the state of SFTTrainer and RewardTrainer ------------------------------------------------------------------------


def state_of(trainer) -> dict:
    """What SFTTrainer and RewardTrainer save in a checkpoint. Their batches depend only on seed and step."""
    return {
        "step": trainer.step,
        "num_tokens": trainer.num_tokens,
        "lengths": torch.tensor(trainer.lengths),
        "data": trainer.data,
        "model": models.trained_state(trainer.model),
        "optimizer": optimizers.optimizer_state(trainer.optimizer),
        "scheduler": trainer.scheduler.state_dict(),
    }


def load_state(trainer, state: dict) -> None:
    """Restores a state that state_of returned."""
    check_same_data(state, trainer.lengths, trainer.data, trainer.tokenizer)
    models.load_trained_state(trainer.model, state["model"])
    optimizers.load_optimizer(trainer.optimizer, trainer.scheduler, state["optimizer"], state["scheduler"])
    trainer.step, trainer.num_tokens = state["step"], state["num_tokens"]  # last: what is refused moves no step
