"""The settings of SFTTrainer."""

from __future__ import annotations

from dataclasses import dataclass

from .configs import LR_SCHEDULES, check_config, check_lora


@dataclass
class SFTConfig:
    """A setting that TRL has too has TRL's name. `rlhf-fast sft --help-all` explains every field."""

    output_dir: str = "runs/sft"  # for the log, samples, checkpoints and final model
    seed: int = 0  # of the order of the data, dropout, and new weights
    num_train_epochs: float = 1.0  # passes over the data
    max_steps: int = 0  # optimizer steps; 0: as many as num_train_epochs needs
    per_device_train_batch_size: int = 8  # sequences in one forward pass
    gradient_accumulation_steps: int = 1  # forward passes of each process in one step
    per_device_eval_batch_size: int = 16  # sequences
    learning_rate: float = 1e-5  # 1e-3 suits a model of a million parameters from scratch
    lr_scheduler_type: str = "linear"  # linear and cosine fall to 0 at the end; or constant
    warmup_ratio: float = 0.03  # share of the steps in which the learning rate rises from 0
    weight_decay: float = 0.0  # of matrices, not of norms and biases
    max_grad_norm: float = 1.0  # norm of all gradients together, above which they are scaled down; 0: no clipping
    max_length: int = 1024  # tokens of prompt and response together
    on_overlong: str = "error"  # for longer records; or skip drops, keep_start and keep_end cut them; all are counted
    packing: bool = False  # fill rows with sequences up to max_length; batch sizes then count rows
    lora_r: int = 0  # rank of LoRA adapters; 0: train all weights
    lora_alpha: float = 32.0  # the adapters' product is scaled by lora_alpha / lora_r
    lora_dropout: float = 0.0  # of the adapters' input
    lora_target_modules: list | None = None  # names of linear layers; null: all in the trunk
    gradient_checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third more time
    fsdp: bool = False  # each of several processes keeps its rows of the layers' weights (rlhf_fast/sharding.py)
    bf16: bool = False  # products in bfloat16, weights in float32; refused if the hardware lacks it
    logging_steps: int = 10  # for TensorBoard, printed lines, token accuracy, entropy; train_log.jsonl has every step
    eval_steps: int = 0  # steps between evaluations, with one before the first step; 0: only at the end
    load_best_model_at_end: bool = False  # keep the model of the best evaluation, not the last one
    metric_for_best_model: str = "eval_loss"  # any metric of an evaluation
    greater_is_better: bool | None = None  # null: no for a loss, a perplexity or an ece, else yes
    save_steps: int = 500  # steps between checkpoints; 0: if interrupted, if a step fails, and until the model is saved
    save_total_limit: int = 2  # the newest checkpoints are kept, as is the best one
    max_skipped_steps: int = 10  # the run ends after this many updates in a row were skipped for a NaN or inf
    num_samples: int = 4  # prompts answered at each evaluation, for samples.jsonl
    sample_max_new_tokens: int = 64  # of such an answer

    def __post_init__(self):
        check_config(
            self,
            positive=(
                "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
                "per_device_eval_batch_size", "learning_rate", "max_length", "logging_steps", "save_total_limit",
                "max_skipped_steps", "sample_max_new_tokens", "lora_alpha",
            ),
            non_negative=(
                "max_steps", "weight_decay", "max_grad_norm", "eval_steps", "save_steps", "num_samples", "lora_r",
            ),
            unit=("warmup_ratio", "lora_dropout"),
            choices={
                "lr_scheduler_type": LR_SCHEDULES, "on_overlong": ("error", "skip", "keep_start", "keep_end"),
            },
        )  # fmt: skip
        check_lora(self)
