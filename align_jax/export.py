# SPDX-License-Identifier: Apache-2.0
"""Write a trained policy as a Hugging Face checkpoint: safetensors, config and tokenizer.

python -m align_jax.export --workdir=DIR --output=HF_DIR [--step=latest|best|N]
[--dtype=bfloat16] [--adapter] [--push_to_hub=OWNER/NAME [--private]]
python -m align_jax.export --model=HF_DIR --output=HF_DIR      the round trip through our weights

Beside the weights stands a model card: method, data, config, held-out metrics, versions, base.
"""

from __future__ import annotations

from absl import flags

from align_jax.runs import command


def check_flags() -> None:
    """Refuse flags that do not go together.

    Raises:
        Usage: with what to give instead.
    """
    values = flags.FLAGS
    command.one_of("workdir", "model")
    command.belong(("step", "adapter"), "--workdir", bool(values.workdir))
    command.belong(("dtype",), "a whole checkpoint, not to --adapter", not values.adapter)
    command.belong(("private",), "--push_to_hub", bool(values.push_to_hub))
    command.output_path("output", folder=True)
    command.check_there(values.model, values.workdir)


if __name__ == "__main__":  # here, because what is imported next takes seconds
    flags.DEFINE_string("workdir", None, "Folder of the run to export.")
    flags.DEFINE_string("model", None, "Hugging Face checkpoint to pass through instead of a run.")
    flags.DEFINE_string(
        "output",
        None,
        "Folder to write.  A checkpoint or adapter that lies there is written over: its weights "
        "(model*, adapter_model*, pytorch_model*, consolidated*), index, config, tokenizer and the "
        "*_config.json of generation, processors and quantization.",
        required=True,
    )
    flags.DEFINE_string("step", "latest", "Checkpoint of the run: latest, best or a step.")
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "Type of the stored tensors; default: as the starting checkpoint's (with --model, each as "
        "it was).",
    )
    flags.DEFINE_bool(
        "adapter", False, "Write the low-rank adapter in PEFT's form instead of merging it."
    )
    flags.DEFINE_string(
        "push_to_hub", None, "Publish what is written in this repository of the hub: owner/name."
    )
    flags.DEFINE_bool("private", False, "A repository that --push_to_hub makes is private.")
    arguments = command.read(check=check_flags)

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from align_jax.core.files import writing
from align_jax.core.tree import flatten, unflatten
from align_jax.data.tokenizer import load_tokenizer
from align_jax.interop import hf, hub, peft
from align_jax.interop.carried import carry, carry_tokenizer
from align_jax.models.lora import fold
from align_jax.parallel import compile_cache, distributed
from align_jax.runs import card
from align_jax.runs.trained import Trained, restore


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
        ValueError: ``adapter`` of a run without one; ``output`` is the checkpoint that the run
            began with.
    """
    trained = restore(workdir, step)
    _refuse_same(trained.config.model.path, output, "the run's config.model.path")
    policy, config = trained.resolved.models.policy, trained.resolved.model_config
    lora = policy.options.lora
    if adapter:
        if lora is None:
            raise ValueError(
                f"{workdir} is a full fine-tune (model.lora.rank = 0): it has no adapter to export"
            )
        params, roles = flatten(trained.params), flatten(policy.roles())
        if trained.resolved.new_tokens:  # as PEFT: whoever loads it may have other rows for them
            ends = ("embed/tokens",) if config.tied else ("embed/tokens", "output/kernel")
            kept = [path for path in ends if path in params and path not in lora.whole]
            lora = dataclasses.replace(lora, replaced=tuple(kept))
        apart = {*lora.whole, *lora.replaced}
        leaves = {
            name: leaf for name, leaf in params.items() if roles[name].beside_base or name in apart
        }
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
            beside=trained.config.model.path,
            changes=_classifier(trained) if "score" in policy.options.heads else None,
        )
    if distributed.is_main():
        if adapter and trained.config.model.quantize:
            print(f"note: {card.rounded_base(trained.config.model.quantize)}")
        _write_beside(trained, output)
        record, rows = card.of_run(workdir, trained.step)
        path = trained.config.model.path
        card.write(
            card.Card(
                name=os.path.basename(os.path.normpath(output)),
                base=card.base_of(path) if path else None,
                record=record,
                rows=rows,
                step=trained.step,
                adapter=adapter,
                reward="score" in policy.options.heads,
                note=config.rope_note(),
            ),
            output,
        )
    return trained.step


def _classifier(trained: Trained) -> dict[str, Any]:
    """Return what config.json says of where a process reward model's scores are read."""
    resolved = trained.resolved
    found: dict[str, Any] = {}
    if resolved.kind == "stepwise":
        separator = trained.config.data.step_separator
        found |= {"id2label": {"0": hf.STEP}, "label2id": {hf.STEP: 0}}
        found["step_separator"] = separator
    elif "step_separator" in json.loads(resolved.model_config.hf):  # of what it began with
        found["step_separator"] = None
    return found


def _write_beside(trained: Trained, output: str) -> None:
    """Write what the weights are used with: the tokenizer, the starting checkpoint's settings."""
    config = trained.config
    carry(config.model.path, output)
    tokenizer = trained.resolved.tokenizer
    template = tokenizer.chat_template if config.data.chat_template else ""
    carry_tokenizer(tokenizer, config.tokenizer or config.model.path, output, template=template)


def export_model(model: str, output: str, *, dtype: str | None = None) -> None:
    """Read a Hugging Face checkpoint and write it again: byte for byte the same tensors.

    Args:
        model: folder or hub id.
        output: folder to make; what an older export has left there is replaced.
        dtype: type of the stored tensors; None: each as it was.

    Raises:
        ValueError: they are the same folder.
    """
    _refuse_same(model, output, "--model")
    config, params = hf.load(model)
    hf.save(output, config, params, dtype=dtype, like=hf.locate(model), beside=model)
    if distributed.is_main():
        carry(model, output)
        carry_tokenizer(load_tokenizer(model), model, output)
        name = os.path.basename(os.path.normpath(output))
        card.write(card.Card(name, card.base_of(model)), output)


def _refuse_same(model: str, output: str, what: str) -> None:
    """Refuse to write over what is read, which a failure on the way would lose."""
    if os.path.isdir(model) and os.path.realpath(model) == os.path.realpath(output):
        raise ValueError(
            f"--output={output} is {what}, which the export would write over: give another folder"
        )


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    if values.push_to_hub:
        hub.check(values.push_to_hub)
    distributed.start()
    compile_cache.keep()
    with writing(values.output):
        if values.model:
            export_model(values.model, values.output, dtype=values.dtype)
            what = values.model
        else:
            step = export_run(
                values.workdir,
                values.output,
                step=values.step,
                dtype=values.dtype,
                adapter=values.adapter,
            )
            what = f"{values.workdir}, step {step},"
    if not distributed.is_main():
        return
    print(f"{what} written to {values.output}")
    if os.path.exists(beside := os.path.join(values.output, card.BESIDE)):
        print(f"its {card.CARD} is not an export's, and was left alone; the card is {beside}")
    if values.push_to_hub:
        message = f"align_jax: {card.public(what.strip(','))}"
        url = hub.push(values.output, values.push_to_hub, message=message, private=values.private)
        print(f"published: {url}")


if __name__ == "__main__":
    command.run(main, arguments)
