"""The commands that have keys, except those of cai (cai_keys.py). This module does not import torch.

The keys of a training command are the fields of two dataclasses: its job (which models and data) and the trainer's
config. jobs.py holds the functions that take them.
"""

from dataclasses import dataclass, field

from .commands import Checked, Command, checked_options
from .errors import ConfigError
from .trainers.configs import check_config
from .trainers.ppo_config import PPOConfig
from .trainers.reward_config import RewardConfig
from .trainers.sft_config import SFTConfig

# -- training ----------------------------------------------------------------------------------------------------------


@dataclass
class Scratch:
    """The options in `scratch`: the size of a new Llama."""

    vocab_size: int = 4096  # of a byte-level BPE, trained on train_data
    hidden: int = 128
    layers: int = 4
    initializer_range: float | None = 0.02  # null: 1 / sqrt(hidden)

    def __post_init__(self):
        check_config(self, positive=("vocab_size", "hidden", "layers", "initializer_range"))
        if self.hidden % 8:
            raise ConfigError(f"scratch: hidden = {self.hidden} must be a multiple of 8 (four heads of an even width)")


@dataclass
class SFTJob(Checked):
    """Which model and data `rlhf-fast sft` trains on."""

    train_data: str  # a file in a TRL format, hh-rlhf transcripts, or a dataset's name, with a split: "name:split"
    eval_data: str | None = None  # held-out data, in the same forms
    model: str | None = None  # directory or name; without it, a new model from `scratch`
    scratch: dict = field(default_factory=dict)  # vocab_size, hidden, layers, initializer_range of a new Llama

    def __post_init__(self):
        super().__post_init__()
        if (self.model is None) == (not self.scratch):
            raise ConfigError("sft: give either model, or scratch to start from random weights")
        Scratch(**checked_options(Scratch, self.scratch, "sft: scratch"))


@dataclass
class RewardJob(Checked):
    """Which model and data `rlhf-fast reward` trains on."""

    model: str  # the SFT model (its trunk gets a new head), or a reward model to train further
    train_data: str  # preferences: a file in a TRL format, hh-rlhf transcripts, or a dataset's name ("name:split")
    eval_data: str | None = None  # held-out preferences, in the same forms
    reference_data: str | None = None  # responses whose rewards get mean 0 and deviation 1 when the model is used


@dataclass
class PPOJob(Checked):
    """Which models, rewards and prompts `rlhf-fast ppo` trains with."""

    model: str  # the initial policy
    train_data: str  # rows with a prompt
    reward: str | list  # a reward model's directory, file.py:function, or a list of [either, weight]
    eval_data: str | None = None  # prompts that the policy never trains on
    eval_rewards: dict = field(default_factory=dict)  # {name: reward} that the policy never trains on
    ref_model: str | None = None  # the reference; null: a frozen copy of model, or with kl_coef 0 none
    value_model: str | None = None  # reward model whose trunk the values start from; null: the policy's trunk
    rollout_func: str | None = None  # file.py:function(prompts, trainer) that samples in place of our own sampling
    rollout_server: str | None = None  # or the URL of a vLLM or SGLang server (http://.../v1) that samples
    rollout_options: dict = field(default_factory=dict)  # of RolloutServer: weights_dir, concurrency, timeout, ...


# Settings of TRL that have another name here, by the table in the documentation that explains them.
TRL_NAMES = {
    "model_name_or_path": "model",
    "dataset_name": "train_data",
    "dtype": "left out, because a model given by name is loaded in float32; bf16 multiplies in bfloat16",
    "torch_dtype": "left out, because a model given by name is loaded in float32; bf16 multiplies in bfloat16",
    "eos_token": "left out, because it is the tokenizer's: set it there",
    "chat_template_path": "left out, because it is the tokenizer's: set it there",
    "resume_from_checkpoint": "left out, because it is a flag: --resume",
    "report_to": "left out, because TensorBoard, if it is installed, and report.html are always written",
    "warmup_steps": "warmup_ratio, a share of the steps",
    "eval_strategy": "eval_steps",
    "truncation_mode": "on_overlong",
    "assistant_only_loss": "left out, because only the assistant's turns are learned",
    "peft_config": "lora_r",
    "use_peft": "lora_r",
    "deepspeed": "fsdp",
}
TRL_PPO_NAMES = {
    "per_device_train_batch_size": "batch_size (responses per iteration; micro_batch_size only bounds memory)",
    "gradient_accumulation_steps": "batch_size (responses per iteration)",
    "num_mini_batches": "minibatch_size = batch_size / num_mini_batches",
    "local_rollout_forward_batch_size": "generation_batch_size",
    "num_train_epochs": "total_episodes (null is one epoch)",
    "max_steps": "total_episodes (responses in all)",
    "gradient_checkpointing": "micro_batch_size or micro_batch_tokens, which bound memory",
    "stop_token": "left out, because the tokenizer's eos always ends a response",
    "stop_token_id": "left out, because the tokenizer's eos always ends a response",
    "sft_model_path": "model",
    "reward_model_path": "reward",
    "num_sample_generations": "num_samples, answered every eval_steps",
}
TRL_GRPO_NAMES = {
    "beta": "kl_coef",
    "epsilon": "cliprange",
    "epsilon_high": "cliprange_high",
    "delta": "dual_clip",
    "num_iterations": "num_ppo_epochs",
    "steps_per_generation": "batch_size (responses per iteration)",
    "max_completion_length": "response_length",
    "reward_funcs": "reward",
    "reward_weights": "reward",
    "scale_rewards": "scale_advantages",
    "normalize_advantages": "scale_advantages",
    "loss_type": "loss_agg_mode",
    "use_vllm": "rollout_server",
    "vllm_mode": "rollout_server",
    "vllm_server_base_url": "rollout_server",
    **dict.fromkeys(
        ("top_p", "top_k", "min_p", "repetition_penalty"),
        "left out, because answers must be drawn from the policy itself",
    ),
}


def _hints(names: dict[str, str], title: str, page: str) -> dict[str, str]:
    """What is said when TRL's setting is given under its TRL name."""
    return {name: f'TRL\'s {name} is here {ours}: see "{title}" in docs/{page}' for name, ours in names.items()}


_FROM_TRL = _hints(TRL_NAMES, "Coming from TRL", "sft_reward.md")
_FROM_TRLS_PPO = {
    **{name: hint for name, hint in _FROM_TRL.items() if name not in ("truncation_mode", "assistant_only_loss")},
    **_hints(TRL_PPO_NAMES, "Coming from TRL's PPO", "ppo.md"),
    **_hints(TRL_GRPO_NAMES, "Coming from TRL's GRPO or RLOO", "ppo.md"),
}


STAGES = {
    command.name: command
    for command in (
        Command(
            "sft", "Supervised fine-tuning on demonstrations or chosen replies.", (SFTJob, SFTConfig), "jobs.run_sft",
            resumes=True,
            hints=_FROM_TRL,
            usual=("eval_data", "model", "output_dir", "num_train_epochs", "per_device_train_batch_size",
                   "learning_rate", "max_length"),
        ),
        Command(
            "reward", "A reward model from preferences.", (RewardJob, RewardConfig), "jobs.run_reward",
            resumes=True,
            hints=_FROM_TRL,
            usual=("eval_data", "output_dir", "num_train_epochs", "per_device_train_batch_size", "learning_rate",
                   "max_length"),
        ),
        Command(
            "ppo", "PPO against a reward model or a Python function.", (PPOJob, PPOConfig), "jobs.run_ppo",
            resumes=True,
            hints=_FROM_TRLS_PPO,
            usual=("eval_data", "output_dir", "total_episodes", "batch_size", "response_length", "kl_coef",
                   "minibatch_size", "learning_rate"),
        ),
    )
}  # fmt: skip


# -- reading a model ---------------------------------------------------------------------------------------------------


@dataclass
class GenerateJob:
    """What `rlhf-fast generate` answers, and how."""

    model: str  # run directory, or any transformers causal language model
    system: str | None = None  # system message, for a tokenizer with a chat template
    input: str | None = None  # file of records with a prompt, as for PPO; each gets a response
    output: str = "-"  # file for the answers to --input, readable by rlhf-fast score; - is standard output
    max_new_tokens: int = 128  # of an answer
    temperature: float = 0.7  # 0 takes the most likely token
    top_p: float = 1.0  # sample from the fewest tokens whose probabilities add up to this
    bf16: bool = False  # products in bfloat16, weights in float32; refused if the hardware lacks it
    seed: int = 0  # of the sampling

    def __post_init__(self):
        check_config(self, positive=("max_new_tokens", "top_p"), non_negative=("temperature",), unit=("top_p",))


@dataclass
class ScoreJob:
    """What `rlhf-fast score` scores, and with which reward model."""

    model: str  # run directory of rlhf-fast reward, or any reward model
    input: str = "-"  # file of records with a prompt and a response, or of pairs; - is standard input
    output: str = "-"  # file for the scored records; - is standard output
    batch_size: int = 64  # responses in one forward pass

    def __post_init__(self):
        check_config(self, positive=("batch_size",))


READ_COMMANDS = {
    command.name: command
    for command in (
        Command("generate", "Answers prompts with a model, on standard output.", (GenerateJob,)),
        Command("score", "Adds the score of a reward model to each record of a JSONL file.", (ScoreJob,)),
    )
}
