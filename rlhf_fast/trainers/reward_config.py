"""The settings of RewardTrainer."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from .configs import LR_SCHEDULES, check_config, check_lora


@dataclass
class RewardConfig:
    """Names are TRL's where TRL has the same setting. `rlhf-fast reward --help-all` says what each field means."""

    output_dir: str = "runs/reward"  # log, samples, checkpoints, and in the end the model
    seed: int = 0  # of the order of the data, dropout, and new weights
    num_train_epochs: float = 1.0  # passes over the data
    max_steps: int = 0  # optimizer steps; 0: num_train_epochs decides
    per_device_train_batch_size: int = 8  # prompts, with all their responses, in one forward pass
    gradient_accumulation_steps: int = 1  # forward passes of each process in one step
    per_device_eval_batch_size: int = 16  # prompts
    learning_rate: float = 1e-5  # 1e-3 for a million parameters from scratch, or with a frozen trunk
    lr_scheduler_type: str = "linear"  # to 0 at the end; or "cosine", or "constant"
    warmup_ratio: float = 0.03  # of the steps, in which the rate rises from 0
    weight_decay: float = 0.0  # of matrices, not of norms and biases
    max_grad_norm: float = 1.0  # of all gradients together; 0: no clipping
    freeze_trunk: bool = False  # learn the head alone
    train_last_layers: int = 0  # of the trunk, beside the head; 0: all of them
    lora_r: int = 0  # rank of LoRA adapters of the trunk, beside the head; 0: all weights learn
    lora_alpha: float = 32.0  # the adapters' product is scaled by lora_alpha / lora_r
    lora_dropout: float = 0.0  # of the adapters' input
    lora_target_modules: list | None = None  # names of linear layers; null: all of the trunk
    gradient_checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third more time
    fsdp: bool = False  # of several processes each keeps its rows of the layers' weights (rlhf_fast/sharding.py)
    bf16: bool = False  # products in bfloat16, weights in float32; refused where the hardware lacks it
    center_rewards_coefficient: float = 0.0  # 0.01 keeps rewards near 0 (Eisenstein et al. 2023)
    max_length: int = 1024  # tokens of prompt and response together
    on_overlong: str = "error"  # a longer response: "skip" its prompt, or "keep_end" of both; all are counted
    logging_steps: int = 10  # TensorBoard: these and evaluations; train_log.jsonl has every step
    eval_steps: int = 0  # evaluate before the first step and every so many; 0: only at the end
    load_best_model_at_end: bool = False  # keep the model of the best evaluation, not the last
    metric_for_best_model: str = "eval_loss"  # any metric of an evaluation
    greater_is_better: bool | None = None  # null: not for a loss or an ece
    save_steps: int = 500  # a checkpoint every so many; 0: when interrupted, and at the end till the model is saved
    save_total_limit: int = 2  # newest checkpoints kept, beside the best
    max_skipped_steps: int = 10  # updates in a row skipped for a NaN or inf, after which the run ends
    num_samples: int = 4  # prompts whose responses and rewards go to samples.jsonl at each evaluation

    def __post_init__(self):
        check_config(
            self,
            positive=(
                "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
                "per_device_eval_batch_size", "learning_rate", "max_length", "logging_steps", "save_total_limit",
                "lora_alpha", "max_skipped_steps",
            ),
            non_negative=(
                "max_steps", "weight_decay", "max_grad_norm", "center_rewards_coefficient", "eval_steps", "save_steps",
                "num_samples", "train_last_layers", "lora_r",
            ),
            unit=("warmup_ratio", "lora_dropout"),
            choices={"lr_scheduler_type": LR_SCHEDULES, "on_overlong": ("error", "skip", "keep_end")},
        )  # fmt: skip
        check_lora(self)
        if self.freeze_trunk + bool(self.train_last_layers) + bool(self.lora_r) > 1:
            raise ConfigError("RewardConfig: choose one of freeze_trunk, train_last_layers and lora_r")
