# SPDX-License-Identifier: Apache-2.0
"""What TRL and transformers' trainers call the keys of the config, for who types one from habit."""

from __future__ import annotations

from collections.abc import Mapping

# name there -> key here, or an argument of ``align_jax.train`` and its flag
ELSEWHERE: Mapping[str, str] = {
    "args": "config",
    "bf16": "config.model.compute_dtype",
    "beta": "config.objective.beta",
    "callback": "on_log",
    "callbacks": "on_log",
    "dataset_name": "data",
    "eval_dataset": "eval_data",
    "eval_steps": "config.eval.every_steps",
    "gradient_accumulation_steps": "config.microbatches",
    "gradient_checkpointing": "config.model.remat",
    "load_best_model_at_end": "config.checkpoint.best_metric",
    "logging_steps": "config.log.every_steps",
    "loss_type": "config.objective.name",
    "lr_scheduler_type": "config.optimizer.schedule",
    "max_completion_length": "config.rollout.max_new_tokens",
    "max_grad_norm": "config.optimizer.clip_norm",
    "max_steps": "config.total_steps",
    "metric_for_best_model": "config.checkpoint.best_metric",
    "model_name_or_path": "model",
    "num_generations": "config.rollout.responses_per_prompt",
    "num_train_epochs": "config.total_epochs",
    "output_dir": "workdir",
    "packing": "config.data.layout",
    "padding_free": "config.data.layout",
    "peft_config": "config.model.lora",
    "per_device_train_batch_size": "config.batch_size",
    "precompute_ref_log_probs": "config.reference.mode",
    "processing_class": "config.tokenizer",
    "ref_model": "config.reference.path",
    "report_to": "config.log",
    "reward_funcs": "config.rewards",
    "reward_weights": "config.rewards",
    "save_steps": "config.checkpoint.every_steps",
    "save_total_limit": "config.checkpoint.keep",
    "sync_ref_model": "config.reference.sync_every_steps",
    "train_dataset": "data",
    "truncation_mode": "config.data.truncation",
    "warmup_ratio": "config.optimizer.warmup_fraction",
}
