"""The settings of PPOTrainer. docs/ppo.md gives the reason for each option, and its name in TRL, verl and OpenRLHF."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import ConfigError
from ..monitors import LIMITS
from .configs import LR_SCHEDULES, check_config, check_lora


@dataclass
class PPOConfig:
    """A setting that TRL has too has TRL's name. Sizes count responses unless they say tokens. `rlhf-fast ppo
    --help-all` explains every field."""

    output_dir: str = "runs/ppo"  # for the log, samples, checkpoints and final model
    seed: int = 0  # of the sampling, the order of the prompts, and new weights

    # --- responses
    total_episodes: int | None = None  # responses sampled in all, rounded up to whole batches; null: one epoch
    batch_size: int = 512  # responses per iteration (rollout)
    num_generations: int = 1  # responses to each prompt, in consecutive rows; divides batch_size
    generation_batch_size: int = 128  # responses sampled at once; bounds memory
    response_length: int = 53  # tokens at most, eos included
    max_prompt_length: int = 512  # tokens
    on_overlong: str = "error"  # refuses longer prompts; skip drops and names them
    temperature: float = 0.7  # of sampling, and so of every log-probability

    # --- from scores to advantages
    scale_scores: bool = False  # divide scores by the running standard deviation of all scores so far
    reward_clip_range: list | tuple | None = None  # [low, high] for the score, before the penalties
    missing_eos_penalty: float | None = None  # subtracted from the score of a response that was cut off
    length_penalty: float = 0.0  # subtracted from the score for each token beyond length_budget
    length_budget: int = 0  # tokens
    kl_coef: float = 0.05  # weight of the KL to the reference, token by token; 0: no reference, unless one is given
    kl_estimator: str = "k1"  # of the KL to the reference: k1, k2 or k3 (docs/ppo.md)
    kl_in_loss: bool = False  # the KL term is in the loss instead of in the rewards; then kl_estimator k2 or k3
    kl_target: float | None = None  # nats per response, as in objective/kl; null: kl_coef is fixed
    kl_horizon: float = 10_000.0  # responses over which the adaptive kl_coef reacts (KLController)
    whiten_rewards: bool = False  # scale the per-token rewards to variance 1 and keep their mean
    advantage_estimator: str = "gae"  # or without a critic: reinforce (batch mean), rloo (leave-one-out), group (mean)
    gamma: float = 1.0  # discount per token; gae only
    lam: float = 0.95  # lambda of GAE; gae only
    scale_advantages: str = "batch"  # to variance 1; group: within the responses to a prompt (GRPO); or none

    # --- update
    minibatch_size: int = 64  # responses per optimizer step; divides batch_size
    micro_batch_size: int | None = None  # responses per forward and backward; null: all; changes memory, not the result
    micro_batch_tokens: int | None = None  # the same in tokens, as they are packed or padded; null: no limit
    num_ppo_epochs: int = 4  # passes over each rollout
    bf16: bool = False  # sampling, scoring and update multiply in bfloat16; weights stay in float32
    learning_rate: float = 3e-6  # of the policy, and by default of the critic
    value_learning_rate: float | None = None  # of a separate value model; null: learning_rate
    lr_scheduler_type: str = "linear"  # linear and cosine fall to 0 over the iterations; or constant
    warmup_ratio: float = 0.0  # share of the iterations in which the learning rate rises from 0
    weight_decay: float = 0.0  # of matrices, not of norms and biases
    max_grad_norm: float = 1.0  # norm of all gradients together, above which they are scaled down; 0: no clipping
    cliprange: float = 0.2  # the ratio is clipped to [1 - cliprange, 1 + cliprange_high]
    cliprange_high: float | None = None  # null: cliprange
    dual_clip: float | None = None  # bounds the loss of a token with A < 0 by -dual_clip A; verl has 3
    target_kl: float | None = None  # nats per token (k3) from the old policy to the new one; beyond it the update stops
    entropy_coef: float = 0.0  # weight of the entropy per token, which the update then raises
    loss_agg_mode: str = "token-mean"  # or a sequence mode of rlhf_fast.ppo_loss; seq-mean-token-sum: grad J itself
    importance_cap: float | None = None  # with a rollout_func: weights min(p_train / p_rollout, cap) on the tokens

    # --- critic
    cliprange_value: float | None = 0.2  # values may move by this much from the old ones; null: no clipping
    vf_coef: float = 0.1  # with share_trunk and scale_advantages: of the value loss over its size before the update
    share_trunk: bool = False  # the value head sits on the policy's own trunk: one forward and backward for both
    detach_values: bool = False  # with share_trunk: the value loss trains the head and not the trunk
    critic_warmup_steps: int = 0  # iterations that train the critic alone, before the policy moves

    # --- adapters; with new ones the policy is its own reference
    lora_r: int = 0  # rank of LoRA adapters on the policy; 0: train all weights
    lora_alpha: float = 32.0  # the adapters' product is scaled by lora_alpha / lora_r
    lora_target_modules: list | None = None  # names of linear layers; null: all in the trunk

    # --- the run
    logging_steps: int = 1  # iterations between rows of TensorBoard and printed lines; train_log.jsonl has every one
    eval_steps: int = 0  # iterations between evaluations, with one before the first; 0: only at the end
    save_steps: int = 50  # between checkpoints; 0: if interrupted, if a reward fails, and until the model is saved
    save_total_limit: int = 2  # the newest checkpoints are kept
    num_samples: int = 8  # answers written to samples.jsonl at every evaluation
    max_skipped_steps: int = 10  # the run ends after this many updates in a row were skipped for a NaN or inf
    fsdp: bool = False  # each of several processes keeps its rows of the layers' weights (rlhf_fast/sharding.py)
    monitors: dict = field(default_factory=dict)  # {name: limit, or null to switch it off}, see rlhf_fast/monitors.py
    stop_on: list = field(default_factory=list)  # names of monitors whose alarm ends the run, with a checkpoint

    def __post_init__(self):
        check_config(
            self,
            positive=(
                "total_episodes", "batch_size", "num_generations", "generation_batch_size", "response_length",
                "max_prompt_length", "temperature", "kl_target", "kl_horizon", "minibatch_size", "micro_batch_size",
                "micro_batch_tokens", "num_ppo_epochs", "learning_rate", "value_learning_rate", "cliprange",
                "cliprange_high", "target_kl", "importance_cap", "cliprange_value", "lora_alpha", "logging_steps",
                "save_total_limit", "max_skipped_steps",
            ),
            non_negative=(
                "missing_eos_penalty", "length_penalty", "length_budget", "kl_coef", "weight_decay", "max_grad_norm",
                "entropy_coef", "vf_coef", "lora_r", "critic_warmup_steps", "eval_steps", "save_steps", "num_samples",
            ),
            unit=("gamma", "lam", "warmup_ratio"),
            choices={
                "lr_scheduler_type": LR_SCHEDULES, "kl_estimator": ("k1", "k2", "k3"),
                "on_overlong": ("error", "skip"), "advantage_estimator": ("gae", "reinforce", "rloo", "group"),
                "scale_advantages": ("batch", "group", "none"),
                "loss_agg_mode": (
                    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm",
                ),
            },
        )  # fmt: skip
        check_lora(self)
        if refusal := self._refusal():
            raise ConfigError(f"PPOConfig: {refusal}")

    def _refusal(self) -> str | None:
        """Why the settings do not fit together (the first reason, in the order of the fields); None if they do."""
        has_critic = self.advantage_estimator == "gae"
        if self.batch_size % self.num_generations:
            return f"batch_size = {self.batch_size} must be a multiple of num_generations = {self.num_generations}"
        if self.reward_clip_range is not None and not _is_range(self.reward_clip_range):
            return (
                f"reward_clip_range = {self.reward_clip_range!r} must be [low, high], two numbers, the first the lower"
            )
        if self.kl_in_loss and self.kl_estimator == "k1":
            return (
                "kl_in_loss with kl_estimator k1 has a gradient of expectation 0: use k2 (the gradient of the KL) or k3"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            return "kl_target moves kl_coef by factors, so kl_coef must start above 0"
        if self.kl_target is not None and self.kl_horizon <= 0.2 * self.batch_size:
            return (
                f"kl_horizon = {self.kl_horizon} must be above a fifth of batch_size = {self.batch_size}: one batch "
                "could take kl_coef to 0 or below"
            )
        if self.advantage_estimator in ("rloo", "group") and self.num_generations < 2:
            return (
                f"advantage_estimator = {self.advantage_estimator!r} compares answers to one prompt, so "
                "num_generations must be 2 or more"
            )
        if self.advantage_estimator == "reinforce" and self.batch_size < 2:
            return (
                "advantage_estimator = 'reinforce' compares the answers of a batch, and with batch_size = 1 every "
                "advantage is 0: batch_size must be 2 or more"
            )
        if self.scale_advantages == "group" and (has_critic or self.num_generations < 2):
            return "scale_advantages = 'group' needs num_generations >= 2, and an advantage_estimator without a critic"
        if self.batch_size % self.minibatch_size:
            return f"batch_size = {self.batch_size} must be a multiple of minibatch_size = {self.minibatch_size}"
        if self.dual_clip is not None and self.dual_clip <= 1:
            return f"dual_clip = {self.dual_clip} must be above 1"
        of_critic = self.share_trunk, self.detach_values, self.critic_warmup_steps, self.value_learning_rate
        if not has_critic and any(of_critic):
            return (
                f"advantage_estimator = {self.advantage_estimator!r} has no critic, so share_trunk, detach_values, "
                "critic_warmup_steps and value_learning_rate have no meaning"
            )
        if self.share_trunk and self.value_learning_rate:
            return (
                "value_learning_rate is for a separate value model, and with share_trunk there is none: leave it out "
                "(vf_coef weights the value loss)"
            )
        if self.detach_values and not self.share_trunk:
            return "detach_values is about a shared trunk: set share_trunk too"
        if {*self.monitors, *self.stop_on} - {*LIMITS}:
            return f"monitors and stop_on know {', '.join(LIMITS)}"
        limits = {name: limit for name, limit in self.monitors.items() if limit is not None}
        if any(not _is_number(limit) or not limit > (name == "length") for name, limit in limits.items()):
            return f"monitors = {self.monitors!r} must be numbers above 0 (length: above 1), or null to switch one off"
        if off := [name for name in self.stop_on if self.monitors.get(name, 0) is None]:
            return f"stop_on names {', '.join(off)}, which monitors switches off"
        return None

    @property
    def kl_in_rewards(self) -> bool:
        return bool(self.kl_coef) and not self.kl_in_loss

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the log-probabilities of a rollout are needed before the update: for its rewards or weights, or for a
        second step from it, or because they come with the values. Those of the first step are the old ones, because
        nothing has moved the policy."""
        steps = self.num_ppo_epochs * (self.batch_size // self.minibatch_size)
        weighted = self.importance_cap is not None
        return steps > 1 or self.kl_in_rewards or weighted or self.share_trunk

    @property
    def shapes_scores(self) -> bool:
        """Whether the scores that PPO trains on may differ from those that the reward returns."""
        return bool(self.scale_scores or self.reward_clip_range or self.missing_eos_penalty or self.length_penalty)

    def iterations(self, num_prompts: int) -> int:
        """The number of iterations of a run over num_prompts prompts. ConfigError if the policy would move in none."""
        iterations = -(-(self.total_episodes or num_prompts * self.num_generations) // self.batch_size)
        if self.critic_warmup_steps >= iterations:
            raise ConfigError(
                f"PPOConfig: critic_warmup_steps = {self.critic_warmup_steps} of {iterations} iterations in all: the "
                "policy would never move. Lower it, or raise total_episodes"
            )
        return iterations


def check_eval_rewards(config: PPOConfig, eval_rewards: dict | None, eval_dataset) -> None:
    """ConfigError if eval_rewards is not a dict, has names that the log or samples.jsonl already uses, or would never
    be read, or if a monitor in stop_on would have nothing to read."""
    if not isinstance(eval_rewards, dict | None):
        raise ConfigError(f"PPOTrainer: eval_rewards must be {{name: reward, ...}}, got {type(eval_rewards).__name__}")
    logged = {"scores", "kl", "prompt", "response", "step"}

    def is_taken(name: str) -> bool:
        return name in logged or name.endswith("_stderr") or name.startswith(("response/", "response_length/"))

    if taken := [name for name in eval_rewards or () if is_taken(str(name))]:
        raise ConfigError(
            f"PPOTrainer: eval_rewards may not be called {taken[0]!r}, a name that the run itself logs (as "
            f"eval_{taken[0]}, or in samples.jsonl): rename it"
        )
    if eval_rewards and eval_dataset is None:
        raise ConfigError("PPOTrainer: eval_rewards are read on held-out prompts: give an eval_dataset (eval_data)")
    if "overoptimization" in config.stop_on and not (eval_rewards and config.eval_steps):
        raise ConfigError(
            "PPOTrainer: stop_on overoptimization looks at eval_rewards every eval_steps, and would never end the run: "
            "give both"
        )


def _is_number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _is_range(x: list | tuple) -> bool:
    return len(x) == 2 and all(map(_is_number, x)) and x[0] < x[1]
