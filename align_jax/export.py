# SPDX-License-Identifier: Apache-2.0
"""Write a trained policy as a Hugging Face checkpoint: safetensors, config and tokenizer.

python -m align_jax.export --workdir=DIR --output=HF_DIR [--step=latest|best|N]
[--dtype=bfloat16] [--adapter]
python -m align_jax.export --model=HF_DIR --output=HF_DIR      the round trip through our weights
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from align_jax.core.tree import flatten, unflatten
from align_jax.data.tokenizer import load_tokenizer
from align_jax.interop import hf, peft
from align_jax.models.lora import fold
from align_jax.parallel import distributed
from align_jax.runs import command
from align_jax.runs.trained import restore


def export_run(
    workdir: str,
    output: str,
    *,
    step: str = "latest",
    dtype: str | None = None,
    adapter: bool = False,
) -> int:
    """Export a run's policy; adapters are merged unless asked for.

    The run's lock is not asked for: a checkpoint is whole once it has its name, and is read before
    anything is written, so a run that goes on disturbs nothing; one that it deletes meanwhile
    (``checkpoint.keep``) ends the export before it has written.

    Args:
        workdir: the run's folder.
        output: folder to make.
        step: "latest", "best" or a step.
        dtype: type of the stored tensors; None: the starting checkpoint's.
        adapter: write the adapter alone, in PEFT's form.

    Returns:
        The exported checkpoint's step.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: ``adapter`` of a run without one.
    """
    trained = restore(workdir, step)
    policy, config = trained.resolved.models.policy, trained.resolved.model_config
    lora = policy.options.lora
    if adapter:
        if lora is None:
            raise ValueError(
                f"{workdir} is a full fine-tune (model.lora.rank = 0): it has no adapter to export"
            )
        params, roles = flatten(trained.params), flatten(policy.roles())
        leaves = {name: leaf for name, leaf in params.items() if roles[name].beside_base}
        peft.save(output, config, lora, unflatten(leaves), base_name=trained.config.model.path)
    else:
        params = fold(trained.params, lora) if lora is not None else trained.params
        hf.save(
            output,
            config,
            params,
            dtype=dtype,
            heads=policy.options.heads,
            unembed=policy.options.unembed,
        )
    trained.resolved.tokenizer.save_pretrained(output)
    return trained.step


def export_model(model: str, output: str, *, dtype: str | None = None) -> None:
    """Read a Hugging Face checkpoint and write it again: byte for byte the same tensors."""
    config, params = hf.load(model)
    hf.save(output, config, params, dtype=dtype)
    load_tokenizer(model).save_pretrained(output)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    if bool(values.workdir) == bool(values.model):
        raise command.Usage("give one of --workdir and --model")
    command.belong(("step", "adapter"), "--workdir", bool(values.workdir))
    command.belong(("dtype",), "a whole checkpoint, not to --adapter", not values.adapter)
    command.output_path("output", folder=True)
    distributed.start()
    if values.model:
        export_model(values.model, values.output, dtype=values.dtype)
        print(f"{values.model} written to {values.output}")
        return
    step = export_run(
        values.workdir, values.output, step=values.step, dtype=values.dtype, adapter=values.adapter
    )
    if distributed.is_main():
        print(f"{values.workdir}, step {step}, written to {values.output}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run to export.")
    flags.DEFINE_string("model", None, "Hugging Face checkpoint to pass through instead of a run.")
    flags.DEFINE_string("output", None, "Folder to write.", required=True)
    flags.DEFINE_string("step", "latest", "Checkpoint of the run: latest, best or a step.")
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "Type of the stored tensors; default: as the starting checkpoint's.",
    )
    flags.DEFINE_bool(
        "adapter", False, "Write the low-rank adapter in PEFT's form instead of merging it."
    )
    command.run(main)
