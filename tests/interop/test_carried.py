# SPDX-License-Identifier: Apache-2.0
"""What stands beside the weights decides what runs: stored heads, end tokens, older exports, types
of tensors, fp8 and MXFP4 codes."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from align_jax import export
from align_jax.core.tree import flatten
from align_jax.data.tokenizer import byte_tokenizer, load_tokenizer, tokenizer_digest
from align_jax.inference.generate import stop_tokens
from align_jax.interop import hf, peft
from align_jax.interop.carried import carry, carry_tokenizer
from align_jax.models.lora import LoraConfig
from align_jax.models.model import build

SHAPE = dict(
    vocab_size=272,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    eos_token_id=258,
)


@pytest.fixture
def folder(tmp_path):
    """A tiny checkpoint as people publish them, its files beside it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("llama", **SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    path = tmp_path / "model"
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    said = json.loads((path / "tokenizer_config.json").read_text())
    said["tokenizer_class"] = "PreTrainedTokenizerFast"  # what older programs know
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    (path / "generation_config.json").write_text('{"eos_token_id": [258, 270], "top_p": 0.9}')
    (path / "preprocessor_config.json").write_text('{"size": 3}')
    (path / "modeling_own.py").write_text("# what auto_map names")
    (path / "tekken.json").write_text("{}")
    return path


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change(folder, function):
    tensors = load_file(folder / "model.safetensors")
    function(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def logits(folder):
    config, params = hf.load(str(folder), dtype="float32")
    model = build(config, compute_dtype="float32", remat="none")
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    hidden, _ = model.hidden(params, tokens, jnp.ones_like(tokens), tokens)
    return np.asarray(model.unembed(params, hidden))


def theirs(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits.numpy()


def test_a_stored_head_is_used_whatever_the_flag_says(folder, tmp_path):
    edit(folder, tie_word_embeddings=True)
    np.testing.assert_allclose(logits(folder), theirs(folder), atol=1e-4)
    export.export_model(str(folder), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is (
        False
    )
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(folder))
    change(folder, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].clone()}))
    assert hf.load_config(str(folder)).tied


def test_the_head_of_a_tied_model_is_its_embedding_where_that_is_not_stored(folder, tmp_path):
    """As programs write it that keep one name of what is shared, the first by the alphabet."""
    expected = logits(folder)
    change(folder, lambda x: x.update({"lm_head.weight": x.pop("model.embed_tokens.weight")}))
    with pytest.raises(ValueError, match="model.embed_tokens.weight"):
        hf.load(str(folder))
    edit(folder, tie_word_embeddings=True)
    np.testing.assert_allclose(logits(folder), theirs(folder), atol=1e-4)
    export.export_model(str(folder), str(tmp_path / "out"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in written
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(folder))
    assert np.abs(logits(folder) - expected).max() > 0.1  # of another head
    edit(folder, tie_word_embeddings=False)
    change(folder, lambda x: x.update({"model.embed_tokens.weight": x.pop("lm_head.weight")}))
    with pytest.raises(ValueError, match="(?s)lm_head.weight.*says so: tie_word_embeddings true"):
        hf.load(str(folder))


@pytest.mark.parametrize(
    "config, generation, expected",
    [
        (258, [258, 270], (258, 270)),
        ([258, 271], None, (258, 271)),
        ([258, 271], 270, (258, 270, 271)),
        (None, None, (258,)),
    ],
)
def test_end_tokens_are_those_of_every_file(folder, config, generation, expected):
    edit(folder, eos_token_id=config)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    own = hf.load_config(str(folder)).end_tokens
    assert stop_tokens(byte_tokenizer(), own) == expected


def test_files_beside_the_weights_are_carried_byte_for_byte(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "vocab.json").write_text("{}")  # of an older export's tokenizer
    export.export_model(str(folder), str(out))
    others = ("hf_quant_config.json", "mine.py")  # of codes that are no more, the user's own
    for name in others:
        (folder / name).write_text("{}")
    export.export_model(str(folder), str(out))
    for name in others:
        (folder / name).unlink()
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"README.md"}
    for name in names - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize(
    "source, template",
    [("model", "{{ messages[0]['content'] }}"), ("model/tokenizer.json", ""), ("byte", "")],
)
def test_a_tokenizer_is_written_as_older_programs_know_it(
    folder, monkeypatch, source, template, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (folder / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    stale = tmp_path / "out" / "additional_chat_templates" / "tools.jinja"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an older export")
    tokenizer = load_tokenizer(source, chat_template=template or None)
    carry_tokenizer(tokenizer, source, "out", template=template)
    assert not stale.exists() and not (tmp_path / "out" / "chat_template.json").exists()
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    if template:
        own = json.loads((folder / "tokenizer_config.json").read_text())
        assert said == own | {"chat_template": template}
    assert tokenizer_digest(load_tokenizer("out")) == tokenizer_digest(tokenizer)


def test_an_export_replaces_whatever_was_there(folder, tmp_path):
    config, params = hf.load(str(folder))
    out = tmp_path / "out"
    zero = jax.tree.map(lambda x: x * 0, params)
    lora = LoraConfig(2, targets="attention/query")
    adapter = build(config, lora=lora).init_adapter(jax.random.key(1), params)

    def names():
        return sorted(path.name for path in out.iterdir())

    hf.save(str(out), config, params, shard_bytes=3_000)
    many = names()
    hf.save(str(out), config, params, shard_bytes=10_000)
    assert len(names()) < len(many)
    hf.save(str(out), config, zero)
    assert names() == ["config.json", "model.safetensors"]
    assert np.abs(logits(out)).max() == 0 == np.abs(theirs(out)).max()
    peft.save(str(out), config, lora, adapter, base_name=str(folder))
    assert names() == ["adapter_config.json", "adapter_model.safetensors"]
    kept = ["notes.bin", "params.json"]
    stale = "model.fp16.safetensors model.safetensors.index.fp16.json pytorch_model.bin.index.json"
    stale += " consolidated.00.pth consolidated-00001-of-00002.safetensors"
    for name in (*kept, *stale.split()):
        (out / name).touch()
    hf.save(str(out), config, params)
    assert names() == ["config.json", "model.safetensors", *kept]
    (out / "mine.safetensors").touch()
    with pytest.raises(ValueError, match="mine.safetensors, which servers read .* take it away"):
        hf.save(str(out), config, zero)
    assert np.abs(logits(out)).max() > 0


def test_settings_of_what_lay_there_go_though_the_run_began_with_none(tmp_path):
    for name in ("generation_config.json", "hf_quant_config.json", "my_config.json"):
        (tmp_path / name).touch()
    carry("", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["my_config.json"]


def test_shards_beside_a_whole_file_are_refused(folder):
    """transformers reads the one, vLLM all, as the latter takes whatever no index leaves out."""
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="both model.safetensors and model-00001-of-00002.safe"):
        hf.load(str(folder))


def test_an_export_over_what_it_reads_is_refused(folder):
    with pytest.raises(ValueError, match="give another folder"):
        export.export_model(str(folder), str(folder))


def test_the_round_trip_keeps_each_tensor_s_type(folder, tmp_path):
    def mixed(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
        name = "model.layers.1.input_layernorm.weight"
        tensors[name] = tensors[name].float() + 1e-6

    change(folder, mixed)
    export.export_model(str(folder), str(tmp_path / "out"))
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


BLOCKS = {"quant_method": "fp8", "weight_block_size": [8, 8]}
ONE = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
ROWS = {"quant_method": "compressed-tensors", "format": "float-quantized"}
EXPONENTS = torch.float8_e8m0fnu


@pytest.mark.parametrize(
    "said, block, dtype",
    [
        (BLOCKS, (8, 8), torch.float32),
        (BLOCKS, (8, 8), EXPONENTS),
        (ONE, (), torch.bfloat16),
        (ROWS, (1, 99), torch.float32),
    ],
)
def test_fp8_is_read_as_what_it_stands_for(folder, tmp_path, said, block, dtype):
    expected = {}
    ends = ("_scale", "input_scale") if said is ROWS else ("_scale_inv", "activation_scale")

    def quantized(tensors):
        for name in [name for name in tensors if "_proj" in name]:
            codes = (tensors[name].float() * 40).to(torch.float8_e4m3fn)
            blocks = [-(-size // step) for size, step in zip(codes.shape, block)]
            scales = (torch.rand(blocks) + 0.5).to(dtype)
            tensors[name], tensors[f"{name}{ends[0]}"] = codes, scales
            if said is not BLOCKS:
                tensors[name.removesuffix("weight") + ends[1]] = torch.ones(())
            whole = scales.float()
            for axis, step in enumerate(block):
                whole = whole.repeat_interleave(step, axis).narrow(axis, 0, codes.shape[axis])
            expected[name] = codes.float() * whole

    change(folder, quantized)
    edit(folder, quantization_config=said)
    exact = logits(folder)  # in float32 without a rounding between
    export.export_model(str(folder), str(tmp_path / "out"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(after[name], tensor.bfloat16()), name
    change(folder, lambda tensors: [tensors.pop(name) for name in [*tensors] if "scale" in name])
    change(folder, lambda tensors: tensors.update(expected))
    edit(folder, quantization_config=None)
    np.testing.assert_array_equal(logits(folder), exact)
    _, params = hf.load(str(tmp_path / "out"))
    assert {leaf.dtype for leaf in flatten(params).values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_mxfp4_is_read_as_what_it_stands_for(tmp_path):
    config = transformers.GptOssConfig(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=32,
        head_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        dtype="bfloat16",
    )
    model = transformers.GptOssForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "codes")
    byte_tokenizer().save_pretrained(tmp_path / "codes")
    tensors = load_file(tmp_path / "codes" / "model.safetensors")
    torch.manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(110, 130, blocks.shape[:3], dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, tmp_path / "codes" / "model.safetensors")
    edit(tmp_path / "codes", quantization_config={"quant_method": "mxfp4"})
    export.export_model(str(tmp_path / "codes"), str(tmp_path / "out"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_blocks")]:
        name = name.removesuffix("_blocks")
        parts = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        assert torch.equal(after[name], convert_moe_packed_tensors(*parts)), name
    again = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "said, names",
    [
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "as pack-quantized"),
        ({"load_in_8bit": True}, "an unnamed method"),
        ("fp8", "expected an object, got 'fp8'"),
    ],
)
def test_other_quantized_weights_are_refused_in_a_line(folder, said, names):
    edit(folder, quantization_config=said)
    with pytest.raises(ValueError, match=f"quantization_config: .*{names}") as error:
        hf.load(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind, more, said",
    [
        ("lama", {}, "did you mean 'llama'"),
        ("qwen_3", {}, "did you mean 'qwen3'"),
        ("jamba", {}, "known: "),
        ("qwen4", {}, "known: "),
        ("olmo", {}, "known: "),
        ("mistral3", {"text_config": {"model_type": "mistral4"}}, r"expected .*; got 'mistral4'$"),
        ("llama4", {"vision_config": {}, "text_config": {"model_type": "llama4_text"}}, "multimod"),
    ],
)
def test_a_family_is_suggested_for_a_near_spelling_alone(kind, more, said):
    with pytest.raises(ValueError, match=said):
        hf.config_from({"model_type": kind, **more})
