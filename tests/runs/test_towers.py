# SPDX-License-Identifier: Apache-2.0
"""Text towers from checkpoint to export, and reward models of families that transformers has no
classifier of."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from align_jax import export
from align_jax.core import config as configs
from align_jax.data.tokenizer import byte_tokenizer
from align_jax.interop import hf
from align_jax.runs import loop, setup
from align_jax.runs.config_file import load

TEXT = dict(
    vocab_size=272,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=256,
    bos_token_id=257,
    eos_token_id=258,
    pad_token_id=256,
)
EYES = dict(
    hidden_size=16,
    embed_dim=16,
    out_hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    depth=1,
    num_attention_heads=2,
    num_heads=2,
    image_size=28,
    patch_size=14,
)
TOWERS = {
    "gemma3": dict(mm_tokens_per_image=4),
    "qwen2_vl": dict(rope={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}),
}


def tower(family, folder, rope=None, **more):
    text = TEXT | ({"rope_parameters": rope} if rope else {})
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, text_config=text, vision_config=EYES, **more)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 3}')


@pytest.mark.parametrize("family, rank", [("gemma3", 0), ("qwen2_vl", 2)])
def test_a_run_of_a_text_tower_leaves_its_eyes_byte_for_byte(
    family, rank, tmp_path, quick_compiles
):
    base, out = tmp_path / "base", tmp_path / "out"
    tower(family, base, **TOWERS[family])
    config = load("tiny:sft")
    config.model.path, config.model.lora.rank = str(base), rank
    config.optimizer.learning_rate = 0.1
    config.total_steps, config.batch_size, config.data.eval_fraction = 1, 8, 0.0
    loop.train(config, str(tmp_path / "run"))
    export.export_run(str(tmp_path / "run"), str(out))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert before.keys() == after.keys()
    eyes = {name for name in before if any(part in name for part in ("vis", "multi_modal"))}
    assert len(eyes) > 10
    for name in eyes:
        assert before[name].dtype == after[name].dtype, name
        assert before[name].view(torch.uint8).equal(after[name].view(torch.uint8)), name
    assert any(not before[name].equal(after[name]) for name in before.keys() - eyes)
    assert (out / "preprocessor_config.json").read_bytes() == b'{"size": 3}'
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        out, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_reward_model_that_cannot_be_exported_is_named_in_the_first_lines(tmp_path):
    config = load("tiny:reward")
    pairs = [{"prompt": "a", "chosen": "b" * n, "rejected": "c"} for n in range(1, 9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    config.model.family, config.data.train = "granite", str(tmp_path / "pairs.jsonl")
    config.batch_size, config.total_steps, config.data.eval_fraction = 8, 1, 0.0
    run = setup.prepare(configs.read(config), str(tmp_path / "run"))
    assert "no sequence classifier of granite" in "\n".join(loop.describe(run))
    assert hf.not_exported(hf.config_from({"model_type": "llama"}), ("score",)) == ""
