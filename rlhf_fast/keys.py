"""The commands that have keys, but for those of cai (cai_keys.py). Imports no torch.

The keys of a training command are the fields of two dataclasses: its job (which models, which data) and the trainer's
config. jobs.py has what is done with them.
"""

from dataclasses import dataclass, field

from .commands import Checked, Command
from .errors import ConfigError
from .trainers.configs import check_config, config_from_dict
from .trainers.ppo_config import PPOConfig
from .trainers.reward_config import RewardConfig
from .trainers.sft_config import SFTConfig

# -- training ----------------------------------------------------------------------------------------------------------


@dataclass
class Scratch:
    """The keys of `scratch`."""

    vocab_size: int = 4096  # of a byte-level BPE that learns train_data
    hidden: int = 128
    layers: int = 4
    initializer_range: float | None = 0.02  # null: 1 / sqrt(hidden)

    def __post_init__(self):
        check_config(self, positive=("vocab_size", "hidden", "layers", "initializer_range"))
        if self.hidden % 8:
            raise ConfigError(f"scratch: hidden = {self.hidden} must be a multiple of 8 (four heads of an even width)")


@dataclass
class SFTJob(Checked):
    train_data: str  # a file in a TRL format, hh-rlhf transcripts, or a dataset's name, "name:split" for a split
    eval_data: str | None = None  # held out, in the same forms
    model: str | None = None  # directory or name; without it, a new model from `scratch`
    scratch: dict = field(default_factory=dict)  # vocab_size, hidden, layers, initializer_range of a new Llama

    def __post_init__(self):
        super().__post_init__()
        if (self.model is None) == (not self.scratch):
            raise ConfigError("sft: give either model, or scratch to start from random weights")
        names = vars(Scratch())
        if unknown := set(self.scratch) - set(names):
            raise ConfigError(f"sft: scratch takes {', '.join(names)}; got {', '.join(map(str, unknown))}")
        config_from_dict(Scratch, self.scratch)


@dataclass
class RewardJob(Checked):
    model: str  # the SFT model (its trunk gets a new head), or a reward model to go on from
    train_data: str  # preferences: a file in a TRL format, hh-rlhf transcripts, or a dataset's name ("name:split")
    eval_data: str | None = None  # held out, in the same forms
    reference_data: str | None = None  # responses whose rewards get mean 0 and deviation 1 where the model is used


@dataclass
class PPOJob(Checked):
    model: str  # the policy to start from; a frozen copy is the reference
    train_data: str  # rows with a prompt
    reward: str | list  # reward model directory, file.py:function, or a list of [either, weight]
    eval_data: str | None = None  # prompts that the policy never trains on
    eval_rewards: dict = field(default_factory=dict)  # name: reward that the policy never trains on
    value_model: str | None = None  # reward model to start the values from; without it, the policy's trunk
    rollout_func: str | None = None  # file.py:function(prompts, trainer), another engine in place of our sampling
    rollout_server: str | None = None  # or the URL of a vLLM or SGLang server (http://.../v1) that samples
    rollout_options: dict = field(default_factory=dict)  # of RolloutServer: weights_dir, concurrency, timeout, ...


STAGES = {
    command.name: command
    for command in (
        Command(
            "sft", "Supervised fine-tuning on demonstrations or chosen replies.", (SFTJob, SFTConfig), "jobs.run_sft",
            usual=("eval_data", "model", "output_dir", "num_train_epochs", "per_device_train_batch_size",
                   "learning_rate", "max_length"),
        ),
        Command(
            "reward", "A reward model from preferences.", (RewardJob, RewardConfig), "jobs.run_reward",
            usual=("eval_data", "output_dir", "num_train_epochs", "per_device_train_batch_size", "learning_rate",
                   "max_length"),
        ),
        Command(
            "ppo", "PPO against a reward model or a Python function.", (PPOJob, PPOConfig), "jobs.run_ppo",
            usual=("eval_data", "output_dir", "total_episodes", "batch_size", "response_length", "kl_coef",
                   "minibatch_size", "learning_rate"),
        ),
    )
}  # fmt: skip


# -- looking -----------------------------------------------------------------------------------------------------------


@dataclass
class GenerateJob:
    model: str  # run directory, or any transformers causal language model
    system: str | None = None  # system message, for a tokenizer with a chat template
    input: str | None = None  # records with a prompt, as PPO reads them; each gets a response
    output: str = "-"  # of input, for rlhf-fast score; - writes to standard output
    max_new_tokens: int = 128
    temperature: float = 0.7  # 0 takes the most likely token
    top_p: float = 1.0
    bf16: bool = False  # products in bfloat16, weights in float32; refused where the hardware lacks it
    seed: int = 0

    def __post_init__(self):
        check_config(self, positive=("max_new_tokens", "top_p"), non_negative=("temperature",), unit=("top_p",))


@dataclass
class ScoreJob:
    model: str  # run directory of rlhf-fast reward, or any reward model
    input: str = "-"  # records with a prompt and a response, or pairs; - reads stdin
    output: str = "-"  # - writes to standard output
    batch_size: int = 64

    def __post_init__(self):
        check_config(self, positive=("batch_size",))


LOOK = {
    command.name: command
    for command in (
        Command("generate", "Answers prompts with a model, on standard output.", (GenerateJob,)),
        Command("score", "The records of a JSONL file, each with the score of a reward model.", (ScoreJob,)),
    )
}
