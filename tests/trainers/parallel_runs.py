"""Run by torchrun from test_parallel.py: one part of it in every process, each of which leaves what it found."""

import dataclasses
import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from unittest import mock

import torch
from helpers import tiny_model, tiny_tokenizer
from transformers import OPTConfig, OPTForCausalLM

from rlhf_fast import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, parallel, sharding
from rlhf_fast.errors import ConfigError
from rlhf_fast.rollout import generate
from rlhf_fast.trainers import common, optimizers

PROMPTS = [f"say {'the cat ' * (i % 5)}{i}: " for i in range(12)]
ONE_STEP = {  # from each rollout, in three micro-batches; no log-probabilities before it
    "advantage_estimator": "group", "kl_coef": 0.0, "num_ppo_epochs": 1, "minibatch_size": 12, "micro_batch_size": 4,
}  # fmt: skip
STEPS = {"max_steps": 4, "learning_rate": 1e-2, "warmup_ratio": 0.0, "eval_steps": 2, "save_steps": 2}
WORST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}  # step 2


def share_of_letters(prompts, responses, **columns):
    """How much of a response is letters: a number that depends on it alone."""
    return [sum(c.isalpha() for c in text) / (1 + len(text)) for text in responses]


def sft(path, steps=(), word="mat", frozen=None, only=None, examples=12, held_out=5, **model):
    """In each process from other weights, of which the first one's count. frozen: a layer that does not learn. only: a
    linear map whose matrix alone learns, and lies in memory column by column."""
    tokenizer = tiny_tokenizer()
    data = [{"prompt": p, "completion": f"{i} sat on the {word}"} for i, p in enumerate(PROMPTS[:examples])]
    # A step of 8 sequences, in however many processes.
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // size(), "logging_steps": 1}
    config, network = (
        SFTConfig(str(path), **batches, **(STEPS | dict(steps))),
        tiny_model(tokenizer, seed=rank(), **model),
    )
    if frozen is not None:
        network.model.layers[frozen].requires_grad_(False)
    if only is not None:
        weight = network.requires_grad_(False).model.get_submodule(only).weight.requires_grad_(True)
        weight.data = weight.data.t().contiguous().t()
    return SFTTrainer(config, network, train_dataset=data, eval_dataset=data[:held_out], tokenizer=tokenizer)


def reward(path, steps=()):
    tokenizer = tiny_tokenizer()
    data = [{"prompt": p, "chosen": f"{i} the cat", "rejected": f"{i} mat"} for i, p in enumerate(PROMPTS)]
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // size()}
    return RewardTrainer(
        RewardConfig(str(path), **batches, **(STEPS | dict(steps))), tiny_model(tokenizer), train_dataset=data,
        eval_dataset=data[:5], reference_dataset=data[:4], tokenizer=tokenizer,
    )  # fmt: skip


def ppo(path, rewards=share_of_letters, **options):
    tokenizer = tiny_tokenizer()
    options = {
        "batch_size": 12, "minibatch_size": 6, "micro_batch_size": 2, "num_generations": 2, "response_length": 12,
        "num_ppo_epochs": 2, "learning_rate": 1e-3, "total_episodes": 36, "eval_steps": 1, "save_steps": 1,
        "save_total_limit": 9,
    } | options  # fmt: skip
    return PPOTrainer(
        PPOConfig(str(path), **options), tiny_model(tokenizer), reward=rewards, tokenizer=tokenizer,
        train_dataset=[{"prompt": p} for p in PROMPTS], eval_dataset=[{"prompt": p} for p in PROMPTS[:3]],
        eval_rewards={"letters": share_of_letters},
    )  # fmt: skip


def size():
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank():
    return int(os.environ.get("RANK", "0"))


def networks(trainer):
    return [m for m in (getattr(trainer, n, None) for n in ("model", "policy", "value_model")) if m is not None]


def held(optimizer):
    """Bytes of the state that this process keeps."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values())


def digest(trainer):
    with trainer.gathered():
        return common.digest(p.detach().clone().numpy() for network in networks(trainer) for p in network.parameters())


def leave(path, **what):
    Path(path, f"found-{parallel.rank()}.json").write_text(json.dumps(what))


def with_dropout(path, resume="", fsdp=""):
    trainer = sft(path / "run", steps={"save_steps": 1, "fsdp": bool(fsdp)}, attention_dropout=0.2)
    trainer.train(resume=bool(resume))
    leave(path, digest=digest(trainer))


def killed(path, fsdp=""):
    """Dies, all processes of it, in the fourth step."""
    trainer = sft(path / "run", steps={"save_steps": 1, "fsdp": bool(fsdp)}, attention_dropout=0.2)
    step = trainer._train_step
    trainer._train_step = lambda rows: os.kill(os.getpid(), 9) if trainer.step == 3 else step(rows)
    trainer.train()


def killed_alone(path):
    """The second process dies in the fourth step, and with it its share of the optimizer's state."""
    trainer = sft(path / "run")
    step = trainer._train_step
    trainer._train_step = lambda rows: os.kill(os.getpid(), 9) if rank() and trainer.step == 3 else step(rows)
    trainer.train()


def resumed(path, fsdp=""):
    trainer = sft(path / "run", steps={"fsdp": bool(fsdp)})
    trainer.train(resume=True)
    leave(path, digest=digest(trainer), state=held(trainer.optimizer))


def sharded(path, fsdp=""):
    """A run of each trainer, and of SFT with each layer computed again in the backward. There a step has a single
    example, and PPO's minibatches have three micro-batches, so that the processes have different numbers of them."""
    on, found, step = {"fsdp": bool(fsdp)}, {}, optimizers.optimizer_step

    def measured(optimizer, *arguments, **named):
        """Of the layers: bytes of their weights, gradients and state."""
        ours = {p for m in networks(trainer) for p in m.modules() if type(p).__name__.endswith("DecoderLayer")}
        ours = {id(p) for layer in ours for p in layer.parameters()}
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        learned = [p for p in learned if id(getattr(p, "weight", p)) in ours]
        sizes = [sum(x.nbytes for x in tensors) for tensors in (learned, sharding.gradients(learned))]
        norm = step(optimizer, *arguments, **named)
        kept.append([*sizes, sum(x.nbytes for p in learned for x in optimizer.state.get(p, {}).values())])
        return norm

    for name, make in {
        "sft": lambda path: sft(path, on),
        "again": lambda path: sft(path, {**on, "gradient_checkpointing": True, "eval_steps": 0}, examples=9),
        "reward": lambda path: reward(path, on | WORST),
        "ppo": lambda path: ppo(path, **on),
        "shared": lambda path: ppo(path, share_trunk=True, critic_warmup_steps=1, **on),
        "one_step": lambda path: ppo(path, **ONE_STEP, **on),
    }.items():
        trainer, kept, freed = make(path / name), [], set()
        if on["fsdp"] and name in ("sft", "again"):
            first, last = trainer.model.model.layers
            last.register_forward_pre_hook(
                lambda *_, first=first, freed=freed: freed.add(sharding.is_sharded(first)) if first.training else None
            )
        with mock.patch.object(optimizers, "optimizer_step", measured):
            result = trainer.train()
        found[name] = {"digest": digest(trainer), "kept": kept[-1], "freed": [*freed], **dataclasses.asdict(result)}
    leave(path, found=found)
    if fsdp:
        sharding._let_go()
        parallel._leave()
        threads = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
        assert not any("gloo" in name for name in threads), threads


def opt(path, fsdp=""):
    """A model that calls its trunk's decoder, and not its trunk."""
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "dropout": 0.0}
    ids = {name: tokenizer.eos_token_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = OPTConfig(vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=256, **sizes, **ids)
    torch.manual_seed(0)
    trainer = SFTTrainer(
        SFTConfig(str(path / "run"), per_device_train_batch_size=8 // size(), fsdp=bool(fsdp), **STEPS),
        OPTForCausalLM(config), train_dataset=[{"prompt": p, "completion": "the cat"} for p in PROMPTS],
        tokenizer=tokenizer,
    )  # fmt: skip
    trainer.train()
    leave(path, digest=digest(trainer))


def failing_layer(path):
    """A layer fails in one process, in the third step, while the other waits to gather it."""
    trainer = sft(path / "run", {"fsdp": True, "save_steps": 1})

    def fails(module, arguments):
        if parallel.rank() == 1 and trainer.step == 2 and module.training:
            raise OSError("the layer fails")

    trainer.model.model.layers[1].register_forward_pre_hook(fails)
    try:
        trainer.train()
    except SystemExit:  # not an error that the other process would have to be told of
        leave(path, ended=True)
        raise


def failing_before_layers(path):
    """The second process fails where the first goes on to gather the layers, for an evaluation and in a step."""
    raised = {}
    for name in ("evaluate", "_train_step"):
        trainer = sft(path / name, {"fsdp": True})
        before = getattr(trainer, name)

        def fails(*arguments, trainer=trainer, before=before, name=name):
            if parallel.rank() == 1 and trainer.step == 2:
                raise OSError(f"{name} fails")
            return before(*arguments)

        with mock.patch.object(trainer, name, fails):
            try:
                trainer.train()
            except Exception as error:
                raised[name] = str(error)
    leave(path, raised=raised)


def failing_reward(path):
    """What fails in one process, in places that others do not pass, and at last a reward, which ends the script."""
    raised = {}

    def fails_in(rank, owner, name, step):
        """Puts a function that fails in one process, once so many steps are done, in the place of owner.name."""

        def function(*arguments, **named):
            if parallel.rank() == rank and trainer.step == step:
                raise OSError(f"{name} fails")
            return before(*arguments, **named)

        before = getattr(owner, name)
        return mock.patch.object(owner, name, function)

    clip = "clip_grads_with_norm_"
    places = ("evaluate", "step", "zeros_like", clip, "state_of", "state_dict")
    for rank, name in ((0, "save_model"), *((1, place) for place in places)):
        trainer = sft(path / name)
        if name == "zeros_like":  # the first parameter learns nothing in this process, and there is no room for zeros
            first = trainer.optimizer.param_groups[0]["params"][0]
            first.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None if parallel.rank() else p.grad))
        owner = {
            "step": trainer.optimizer, "zeros_like": torch, clip: torch.nn.utils, "state_of": common,
            "state_dict": trainer.scheduler,
        }.get(name, trainer)  # fmt: skip
        try:
            with fails_in(rank, owner, name, step=2):
                deque(trainer, 0) if name == clip else trainer.train()
        except Exception as error:
            raised[name] = str(error)
    trainer = ppo(path / "rollout_func")
    trainer.rollout_func = lambda prompts, trainer: (prompt for prompt in prompts)  # cannot be sent
    try:
        trainer.train()
    except Exception as error:
        raised["rollout_func"] = str(error)
    leave(path, raised=raised)

    def rewards(prompts, responses, **columns):
        if parallel.rank() == 1 and trainer.step == 1:
            raise ValueError("the judge is gone")
        return share_of_letters(prompts, responses)

    trainer = ppo(path / "run", rewards)
    trainer.train()


def stopped(path):
    """Two runs that take their time, so that a signal falls into a step of each."""
    ended = []
    Path(path, f"process-{rank()}").write_text(str(os.getpid()))
    for name in ("one", "all"):
        trainer = sft(path / name, steps={"max_steps": 400, "eval_steps": 0})
        step = trainer._train_step
        trainer._train_step = lambda rows, step=step: (time.sleep(0.1), step(rows))[1]
        result = trainer.train()
        ended.append([result.step, result.interrupted])
    leave(path, ended=ended)


def everything(path):
    """The steps of every trainer by hand (of PPO also with an engine whose answers are always the same), a whole run of
    each, and what is refused."""
    asked, found = [], {}

    def answers(prompts, trainer):
        asked.append(len(prompts))
        generate(trainer.policy, trainer.tokenizer, trainer.prompts[:3], max_new_tokens=2)  # shared out elsewhere
        rows = [trainer.tokenizer(f"the cat {i} sat" + " mat" * (i % 4))["input_ids"] for i in range(len(prompts))]
        return {"completion_ids": [[*row, trainer.tokenizer.eos_token_id] for row in rows]}

    for stage, make in {"sft": sft, "reward": reward, "ppo": ppo, "engine": ppo}.items():
        trainer = make(path / stage)
        if stage == "engine":
            trainer.rollout_func = answers
        drawn = float(torch.rand(1))
        metrics = [{k: float(v) for k, v in m.items()} for m in trainer]
        evaluation = {k: float(v) for k, v in trainer.evaluate().items()}
        found[stage] = {"digest": digest(trainer), "metrics": metrics, "evaluation": evaluation, "drawn": drawn}
        found[stage]["state"] = [held(o) for o in getattr(trainer, "optimizers", None) or [trainer.optimizer]]
        if parallel.rank() == 0:
            torch.save([p.detach() for n in networks(trainer) for p in n.parameters()], path / f"{stage}.pt")
    for make, options in ((sft, {}), (reward, {"steps": WORST}), (ppo, {})):
        result = (trainer := make(path / "runs" / make.__name__, **options)).train()
        found[f"run of {make.__name__}"] = {"digest": digest(trainer), **dataclasses.asdict(result)}
    with mock.patch.object(parallel, "leave_to_others"):  # every process steps all, and keeps all of the state
        deque(whole := sft(path / f"whole {rank()}"), 0)  # only the first process would write there
    found["whole"] = {"digest": digest(whole), "state": [held(whole.optimizer)]}
    one_matrix = sft(path / "one_matrix", only="layers.0.mlp.up_proj")
    deque(one_matrix, 0)
    state = one_matrix.state_dict()["optimizer"]["state"]
    found["one matrix"] = {
        "digest": digest(one_matrix), "state": [held(one_matrix.optimizer)],
        "weight": one_matrix.model.model.layers[0].mlp.up_proj.weight.tolist(),
        "saved": {place: {name: t.tolist() for name, t in tensors.items()} for place, tensors in state.items()},
    }  # fmt: skip
    # Of the first process, of both, of nobody, of both in float64; at most two of these in one sum.
    summed = [torch.nn.Parameter(x) for x in (torch.zeros(3, 2).t(), *torch.zeros(2, 3), torch.zeros(2).double())]
    if parallel.rank() == 0:
        summed[0].grad = torch.arange(6.0).view(2, 3)
    summed[1].grad, summed[3].grad = torch.ones(3) / size(), torch.ones(2).double() / size()
    with mock.patch.object(parallel, "BUCKET", 36):
        parallel.sum_gradients(summed)
    refused = []
    for make in (
        lambda: sft(path / "runs/sft").train(),
        lambda: sft(path / "other", word=str(parallel.rank())),
        lambda: sft(path / "other", steps={"max_steps": 2 + parallel.rank()}),
        lambda: sft(path / "other", frozen=parallel.rank()),
        lambda: sft(path / "other", held_out=4 + parallel.rank()),
    ):
        try:
            make()
        except ConfigError as error:
            refused.append(str(error))
    gradients = [p.grad is not None and p.grad.tolist() for p in summed]
    leave(path, asked=asked, found=found, refused=refused, gradients=gradients)


if __name__ == "__main__":
    torch.set_num_threads(1)
    part, path, *arguments = sys.argv[1:]
    globals()[part](Path(path), *arguments)
