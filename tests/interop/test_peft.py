# SPDX-License-Identifier: Apache-2.0
"""Adapters of every family against the peft package, both ways."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import peft as theirs
import pytest
import safetensors.numpy
import torch
import transformers

from align_jax.core.tree import flatten, unflatten
from align_jax.interop import hf, peft, peft_settings, peft_tensors
from align_jax.models import FAMILIES
from align_jax.models.lora import LoraConfig, fold, merge
from align_jax.models.model import build

V, LENGTH = 67, 7
SHAPE = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
EYES = {  # what sees images, of every family that does
    "vision_config": {
        "hidden_size": 16,
        "embed_dim": 16,
        "out_hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "depth": 1,
        "num_attention_heads": 2,
        "num_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
}
SECTIONS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
WIDE = {
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 8,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": V,
    "hidden_size_per_layer_input": 0,
}
CASES = {  # family -> (what differs from SHAPE, a fused module's name)
    "gemma": ({"head_dim": 12}, ""),
    "gemma2": ({"head_dim": 8}, ""),
    "gemma3_text": ({"head_dim": 8}, ""),
    "gpt2": ({"n_inner": 40}, "c_attn"),
    "gpt_neox": ({}, "query_key_value"),
    "llama": ({}, ""),
    "mistral": ({}, ""),
    "mixtral": ({"num_local_experts": 4, "head_dim": 8}, ""),
    "olmo2": ({}, ""),
    "opt": ({"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.0}, ""),
    "phi3": ({}, "qkv_proj"),
    "qwen2": ({}, ""),
    "qwen3": ({"head_dim": 8}, ""),
    "qwen3_moe": (
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "",
    ),
    "smollm3": ({}, ""),
    "arcee": ({}, ""),
    "cohere2": ({}, ""),
    "cwm": ({"head_dim": 8}, ""),
    "ernie4_5": ({"head_dim": 8}, ""),
    "ernie4_5_moe": ({"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}, ""),
    "exaone4": ({}, ""),
    "glm4": ({"head_dim": 8}, "gate_up_proj"),
    "granite": ({"residual_multiplier": 0.5}, ""),
    "hunyuan_v1_dense": ({"head_dim": 8}, ""),
    "ministral": ({"head_dim": 8}, ""),
    "ministral3": ({"head_dim": 8}, ""),
    "nemotron": ({"head_dim": 8}, ""),
    "olmo3": ({}, ""),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, ""),
    "phi": ({}, ""),
    "seed_oss": ({"head_dim": 8}, ""),
    "starcoder2": ({}, ""),
    "qwen2_moe": (EXPERTS, ""),
    "glm4_moe": (
        {
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        "",
    ),
    "dots1": (
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
        "",
    ),
    "minimax_m2": ({"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, ""),
    "deepseek_v2": (
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 12,
            "q_lora_rank": 20,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 10,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
        "",
    ),
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, ""),
    "gemma4_text": (
        WIDE
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 12,
            "num_kv_shared_layers": 2,
        },
        "",
    ),
    "gemma3n_text": (
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "head_dim": 8,
            "vocab_size_per_layer_input": V,
            "hidden_size_per_layer_input": 12,
            "num_kv_shared_layers": 2,
            "laurel_rank": 6,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        },
        "",
    ),
    "gemma4": (EYES | {"text_config": SHAPE | WIDE, "audio_config": None}, ""),
    "gemma3": (EYES | {"text_config": SHAPE | {"head_dim": 8}}, ""),
    "mistral3": (EYES | {"text_config": SHAPE | {"model_type": "mistral"}}, ""),
    "qwen2_vl": (EYES | {"text_config": SHAPE | SECTIONS}, ""),
    "qwen2_5_vl": (EYES | {"text_config": SHAPE | SECTIONS}, ""),
    "qwen3_vl": (EYES | {"text_config": SHAPE | SECTIONS | {"head_dim": 8}}, ""),
    "qwen3_next": (DELTA | EXPERTS, ""),
    "qwen3_5_text": (DELTA, ""),
    "qwen3_5": (EYES | {"text_config": SHAPE | DELTA}, ""),
}
VARIANTS = {
    "llama": dict(dora=True),
    "gpt2": dict(dora=True),
    "phi3": dict(rank_stabilized=True),
    "gpt_neox": dict(dora=True),
    "qwen3": dict(targets="attention/(query|value)"),
    "opt": dict(targets="attention/output|mlp/up", rank_stabilized=True),
    "mixtral": dict(targets="attention/.*"),
    "qwen3_moe": dict(targets="attention/.*"),
    "olmoe": dict(targets="attention/.*"),
    "qwen2_moe": dict(targets="attention/.*|shared/.*"),
    "minimax_m2": dict(targets="attention/.*"),
    "deepseek_v2": dict(targets="attention/.*"),
    "gpt_oss": dict(targets="attention/.*"),
    "glm4_moe": dict(targets="attention/.*|shared/.*"),
    "dots1": dict(targets="shared/.*"),
    "ernie4_5_moe": dict(targets="attention/.*|shared/.*"),
    "gemma4_text": dict(targets="attention/.*|mlp/.*|token/.*|token_inputs/.*"),
    "gemma3n_text": dict(
        targets="attention/.*|mlp/.*|token/.*|token_inputs/.*|altup/.*|laurel/.*|streams/.*"
    ),
    "qwen3_next": dict(targets="attention/.*|delta/.*|shared/.*"),
    "qwen3_5_text": dict(targets="attention/.*|delta/.*|mlp/.*"),
    "qwen3_5": dict(targets="delta/(output_gate|fade)"),
}


def tiny(family, auto=transformers.AutoModelForCausalLM, **changes):
    torch.manual_seed(1)
    shape = CASES[family][0]
    if "text_config" in shape:
        auto = transformers.AutoModelForImageTextToText
    else:
        shape = SHAPE | shape
    config = transformers.CONFIG_MAPPING[family](**(shape | changes))
    config._attn_implementation = "eager"
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> the folder of a tiny random model."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny(family).save_pretrained(made[family])
        return str(made[family])

    return make


# One of each place that adds an adapter's product, and of each variant: what is computed is
# compared.  Of the others, made of the same parts, the weights with the adapter in them are.
COMPUTED = {
    *("llama", "gpt2", "gpt_neox", "phi3", "opt", "qwen2_moe", "glm4_moe", "deepseek_v2"),
    *("gemma4_text", "gemma3n_text", "qwen3_next", "qwen3_5", "mistral3"),
}


def theirs_in(folder):
    """The model of transformers that a folder holds."""
    (name,) = json.loads((pathlib.Path(folder) / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, attn_implementation="eager")


def tokens():
    return np.random.default_rng(0).integers(3, V, (2, LENGTH)).astype(np.int32)


@functools.cache
def program(config, lora, head):
    model = build(
        config, compute_dtype="float32", remat="none", lora=lora, heads=(head,) if head else ()
    )

    @jax.jit
    def run(params, *fields):
        hidden = model.hidden(params, *fields)[0]
        return model.head(params, head, hidden)[:, -1] if head else model.unembed(params, hidden)

    return run


def ours(config, params, lora=None, head=None):
    rows = tokens()
    fields = (
        rows,
        np.ones_like(rows),
        np.broadcast_to(np.arange(LENGTH, dtype=np.int32), rows.shape),
    )
    return np.asarray(program(config, lora, head)(params, *map(jnp.asarray, fields)))


def peers(model):
    with torch.no_grad():
        return model(torch.tensor(tokens().astype(np.int64))).logits.numpy()


def trained(config, lora, base, seed=0):
    """An adapter that does something."""
    draw = np.random.default_rng(seed)
    model = build(config, compute_dtype="float32", lora=lora)
    return jax.tree.map(
        lambda x: x + jnp.asarray(draw.normal(size=x.shape) * 0.1, x.dtype),
        model.init_adapter(jax.random.key(0), base),
    )


def tensors_in(folder):
    return safetensors.numpy.load_file(pathlib.Path(folder) / "model.safetensors")


def same(one, other):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("family", CASES)
def test_peft_computes_what_we_do_from_our_file(family, saved, tmp_path):
    config, base = hf.load(saved(family), dtype="float32")
    lora = LoraConfig(
        3, **(dict(alpha=5.0, targets="attention/.*|mlp/.*") | VARIANTS.get(family, {}))
    )
    adapter = trained(config, lora, base)
    peft.save(str(tmp_path), config, lora, adapter, base_name="a/base")
    model = theirs.PeftModel.from_pretrained(theirs_in(saved(family)), tmp_path).eval()
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert adapted and not [name for name in adapted if "vis" in name]
    params = merge(base, adapter)
    if family in COMPUTED:
        got, expected = ours(config, params, lora), peers(model)
        with model.disable_adapter():
            assert np.abs(expected - peers(model)).max() > 0.05
        np.testing.assert_allclose(got, expected, atol=1e-4)
    else:
        hf.save(str(tmp_path / "folded"), config, fold(params, lora), beside=saved(family))
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        got, expected, plain = map(
            tensors_in, (tmp_path / "folded", tmp_path / "merged", saved(family))
        )
        same(got, expected)
        moved = [name for name in plain if np.abs(expected[name] - plain[name]).max() > 0.05]
        assert len(moved) == len(adapted)
    again, read = peft.load(str(tmp_path), config)
    assert (again.rank, again.rank_stabilized, again.dora) == (
        lora.rank,
        lora.rank_stabilized,
        lora.dora,
    )
    assert again.scale == pytest.approx(lora.scale)
    same(read, adapter)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "phi3", "gpt_neox", "gemma4_text", "gemma3n_text"]
)
def test_we_compute_what_peft_does_from_its_file(family, saved, tmp_path):
    config, base = hf.load(saved(family), dtype="float32")
    fused = CASES[family][1]
    modules = [fused] if fused else ["q_proj", "down_proj"]
    settings = theirs.LoraConfig(
        r=4,
        lora_alpha=6,
        # there it is not in the layers alone
        target_modules="all-linear" if family.startswith("gemma") else modules,
        use_dora=family != "phi3",
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
        rank_pattern={} if fused else {"down_proj": 2},
        init_lora_weights=False,
        alpha_pattern={} if fused else {"down_proj": 9},
    )
    model = theirs.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(
            saved(family), attn_implementation="eager"
        ),
        settings,
    ).eval()
    model.save_pretrained(tmp_path)
    lora, adapter = peft.load(str(tmp_path), config)
    assert lora.rank == 4 and lora.scale == 1.5
    plain = ours(config, base)
    got = ours(config, merge(base, jax.tree.map(jnp.asarray, adapter)), lora)
    assert np.abs(got - plain).max() > 0.05
    np.testing.assert_allclose(got, peers(model), atol=1e-4)


def test_a_score_head_goes_with_the_adapter(tmp_path, saved):
    config, base = hf.load(saved("llama"), dtype="float32")
    lora = LoraConfig(2, targets="attention/.*")
    adapter = trained(config, lora, base)
    score = jnp.asarray(np.random.default_rng(2).normal(size=(32, 1)), jnp.float32)
    whole = adapter | {"score": {"out": {"kernel": score}}, "value": {"out": {"kernel": score}}}
    peft.save(str(tmp_path), config, lora, whole, base_name="")
    model = theirs.PeftModel.from_pretrained(
        transformers.AutoModelForSequenceClassification.from_pretrained(
            saved("llama"), num_labels=1
        ),
        tmp_path,
    ).eval()
    params = merge(
        {name: base[name] for name in ("embed", "layers", "final_norm")},
        {name: whole[name] for name in ("layers", "score")},
    )
    np.testing.assert_allclose(ours(config, params, lora, "score"), peers(model)[:, 0], atol=1e-4)
    same(peft.load(str(tmp_path), config)[1], {name: whole[name] for name in ("layers", "score")})


def edited(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# a key of adapter_config.json that we do not follow -> a value that changes what is computed
OTHERS = {
    "peft_type": "LOHA",
    "bias": "boft_only",
    "lora_bias": True,
    "init_lora_weights": "lora_ga",
    "layer_replication": [[0, 1], [0, 2]],
    "alora_invocation_tokens": [4, 5],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "megatron_config": {"a": 1},
    "velora_config": {"scale": 1.0},
    "monteclora_config": {"num_samples": 2},
    "kasa_config": {"beta": 0.1},
    "a_key_of_next_year": 0.5,
}


@pytest.mark.parametrize("key", OTHERS)
def test_a_variant_that_we_do_not_compute_is_refused(key, tmp_path, saved):
    config, base = hf.load(saved("llama"), dtype="float32")
    lora = LoraConfig(2, targets="attention/query")
    peft.save(str(tmp_path), config, lora, trained(config, lora, base), base_name="")
    plain = theirs.LoraConfig(target_modules=["q_proj"]).to_dict()
    edited(
        tmp_path,
        **{name: value for name, value in plain.items() if name in OTHERS and name != "peft_type"},
    )
    peft.load(str(tmp_path), config)
    edited(tmp_path, **{key: OTHERS[key]})
    with pytest.raises(ValueError, match=f"not supported: {key} = "):
        peft.load(str(tmp_path), config)


def test_no_variant_of_peft_is_unknown_to_us():
    variants = {
        field.name
        for field in dataclasses.fields(theirs.LoraConfig)
        if field.metadata.get("is_lora_variant")
    }
    assert variants - {"use_dora"} <= peft_settings.PLAIN.keys()
    known = peft_settings.PLAIN.keys() | peft_settings.HARMLESS
    assert {field.name for field in dataclasses.fields(theirs.LoraConfig)} <= known


def test_what_is_not_the_same_adapter_is_refused(tmp_path, saved):
    config = hf.load_config(saved("llama"))
    model = build(config, lora=LoraConfig(2, targets="attention/query"))
    adapter = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), model.shapes(jnp.float32))
    adapter = {
        "layers": {
            "attention": {
                "query": {
                    name: adapter["layers"]["attention"]["query"][name]
                    for name in ("lora_a", "lora_b")
                }
            }
        }
    }
    peft.save(str(tmp_path), config, model.options.lora, adapter, base_name="")
    edited(tmp_path, lora_bias=True, init_lora_weights="pissa")
    with pytest.raises(
        ValueError, match=r"lora_bias = True \(expected False, None\); init_lora_weights = 'pissa'"
    ):
        peft.load(str(tmp_path), config)
    edited(tmp_path, lora_bias=False, init_lora_weights=True)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors.pop(name)
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"(?s)1 missing:.*layers.1.self_attn.q_proj.lora_B.*1 unexpected:.*lm_head",
    ):
        peft.load(str(tmp_path), config)
    with pytest.raises(FileNotFoundError, match="no PEFT adapter in .*it holds a whole model"):
        peft.load(saved("llama"), config)


# adapters on some layers only, as people make them
PARTLY = {
    "a regular expression": dict(
        target_modules=r".*layers\.0\.self_attn\.(q|v)_proj|.*layers\.1\.mlp\.down_proj"
    ),
    "full names, ranks and scales": dict(
        target_modules=["model.layers.0.self_attn.q_proj", "v_proj"],
        rank_pattern={r"layers\.1\.self_attn\.v_proj": 2},
        alpha_pattern={"v_proj": 9},
        use_rslora=True,
    ),
}


# the same, of which only the layers are looked at
LAYERS = {
    "layers_to_transform": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    "one layer by number and pattern": dict(
        target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers"
    ),
    "all-linear without a layer": dict(
        target_modules="all-linear", exclude_modules=r".*layers\.0\..*"
    ),
    "exclude_modules by name": dict(
        target_modules=["q_proj", "k_proj"], exclude_modules=["layers.1.self_attn.q_proj"]
    ),
}


def of_peft(base, **settings):
    """A model with an adapter made by peft that does something."""
    plain = dict(r=4, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = theirs.get_peft_model(model, theirs.LoraConfig(**(plain | settings))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def round_trip(base_path, tmp_path, **settings):
    """Read an adapter of peft's, train it, write it, read it with peft; return the two sets of
    leaves, and its configuration."""
    model = of_peft(base_path, **settings)
    model.save_pretrained(tmp_path / "theirs")
    config = hf.load_config(base_path)
    lora, adapter = peft.load(str(tmp_path / "theirs"), config)
    config = config.untied() if lora.untied else config
    _, base = hf.load(base_path, config=config, dtype="float32")
    step = stepping(config, base, lora)
    got, stepped = step(adapter)
    expected, _ = step(stepped)
    np.testing.assert_allclose(got, peers(model), atol=1e-4)
    assert np.abs(got - ours(config, base)).max() > 0.05
    params = merge(base, stepped)
    np.testing.assert_allclose(ours(config, fold(params, lora)), expected, atol=1e-4)
    peft.save(str(tmp_path / "ours"), config, lora, stepped, base_name="")
    names = [
        set(safetensors.numpy.load_file(tmp_path / one / peft_settings.TENSORS))
        for one in ("ours", "theirs")
    ]
    ends = {peft_tensors.PREFIX + one for one in ("model.embed_tokens.weight", "lm_head.weight")}
    more = ends if lora.untied else set()
    assert names[0] >= names[1] and names[0] - names[1] <= more
    again = theirs.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base_path), tmp_path / "ours"
    ).eval()
    np.testing.assert_allclose(expected, peers(again), atol=1e-4)
    same(peft.load(str(tmp_path / "ours"), hf.load_config(base_path))[1], stepped)
    return flatten(adapter), flatten(stepped), lora


@pytest.mark.parametrize("kind", PARTLY)
def test_an_adapter_on_some_layers_is_read_trained_and_written(kind, tmp_path, saved):
    before, after, _ = round_trip(saved("llama"), tmp_path, **PARTLY[kind])
    for name, leaf in before.items():
        empty = ~leaf.any(axis=tuple(range(1, leaf.ndim)))
        assert not after[name][empty].any() and (after[name] != leaf)[~empty].any(), name


SEEN = sorted(tokens()[:, 0].tolist(), reverse=True)  # each row holds one
HEAD = ["lm_head"]
ENDS = ["embed_tokens", "lm_head"]
# what people train beside the layers' matrices: family -> settings, and what of it is not A and B
WHOLE = {
    "ends and norms saved": (
        "llama",
        dict(modules_to_save=["norm", *ENDS]),
        "embed/tokens output/kernel final_norm/scale layers/attention_norm/scale "
        "layers/mlp_norm/scale",
    ),
    "head adapted, DoRA": (
        "llama",
        dict(target_modules=["q_proj", *HEAD], use_dora=True),
        "output/kernel",
    ),
    "both ends adapted": (
        "llama",
        dict(target_modules=["q_proj", *ENDS], rank_pattern={"lm_head": 2}, use_rslora=True),
        "embed/tokens output/kernel",
    ),
    "rows of both ends": (
        "llama",
        dict(trainable_token_indices={"embed_tokens": SEEN, "lm_head": [4, 3]}),
        "embed/rows output/rows",
    ),
    "all biases": (
        "qwen2",
        dict(bias="all"),
        "layers/attention/query/bias layers/attention/key/bias layers/attention/value/bias",
    ),
    "tied: embedding saved": ("tied", dict(modules_to_save=["embed_tokens"]), "embed/tokens"),
    "tied: both saved as one": (
        "tied",
        dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        "embed/tokens",
    ),
    "tied: head adapted": (
        "tied",
        dict(target_modules=["q_proj", *HEAD]),
        "embed/tokens output/kernel",
    ),
    "tied: both adapted as one": (
        "tied",
        dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
        "embed/tokens",
    ),
    "tied: rows": ("tied", dict(trainable_token_indices=SEEN), "embed/rows"),
    "tied: rows of the head alone": (
        "tied",
        dict(trainable_token_indices={"lm_head": [4, 3]}),
        "output/rows",
    ),
    "fused biases": (
        "gpt2",
        dict(target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True),
        "layers/attention/query/bias layers/attention/key/bias layers/attention/value/bias",
    ),
    "scaled": (
        "gemma",
        dict(target_modules=["embed_tokens", "v_proj"]),
        "embed/tokens output/kernel",
    ),
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The folder of a tiny random model that is tied."""
    path = tmp_path_factory.mktemp("tied")
    tiny("llama", tie_word_embeddings=True).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", WHOLE)
def test_what_stands_beside_a_and_b_is_read_trained_and_written(kind, tmp_path, saved, tied):
    family, settings, expected = WHOLE[kind]
    settings = {"target_modules": ["q_proj"]} | settings
    path = tied if family == "tied" else saved(family)
    before, after, lora = round_trip(path, tmp_path, **settings)
    beside = {name for name in before if name.split("/")[-1] not in ("lora_a", "lora_b", "lora_m")}
    assert beside == set(expected.split())
    assert {*lora.whole, *lora.replaced} == {name for name in beside if "rows" not in name}
    trained = before.keys() - set(lora.replaced)
    assert all((after[name] != before[name]).any() for name in trained)


def stepping(config, base, lora):
    """Return the compiled function of an adapter's logits, and of it one step down some loss."""
    model = build(config, compute_dtype="float32", remat="none", lora=lora)
    rows = jnp.asarray(tokens())
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), rows.shape)

    @jax.jit
    def step(adapter, base):
        def loss(adapter):
            params = merge(base, adapter)
            hidden = model.hidden(params, rows, jnp.ones_like(rows), positions)[0]
            logits = model.unembed(params, hidden)
            return jnp.mean(jnp.square(logits[..., :5] - 1)), logits

        slopes, logits = jax.grad(loss, has_aux=True)(adapter)
        return logits, jax.tree.map(lambda x, slope: x - 0.02 * jnp.sign(slope), adapter, slopes)

    def both(adapter):
        given = flatten(jax.tree.map(jnp.asarray, adapter))
        logits, stepped = step(unflatten(given), base)
        kept = {path: given[path] for path in lora.replaced}
        return np.asarray(logits), unflatten(flatten(stepped) | kept)

    return both


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layers_of_an_adapter_are_those_that_peft_adapts(kind, tmp_path, saved):
    model = of_peft(saved("llama"), **LAYERS[kind])
    model.save_pretrained(tmp_path / "theirs")
    config = hf.load_config(saved("llama"))
    lora, adapter = peft.load(str(tmp_path / "theirs"), config)
    peft.save(str(tmp_path / "ours"), config, lora, adapter, base_name="")
    one, other = (
        safetensors.numpy.load_file(tmp_path / by / peft_settings.TENSORS)
        for by in ("ours", "theirs")
    )
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in other)


# how the tensors of one adapter are called by those who write them
SPELLINGS = {
    "the adapter's name": lambda name: name.replace("lora_A", "lora_A.default").replace(
        "lora_B", "lora_B.default"
    ),
    "a tower's": lambda name: name.replace(
        "model.model.layers", "model.model.language_model.layers"
    ),
    "an older tower's": lambda name: name.replace(
        "model.model.layers", "model.language_model.model.layers"
    ),
    "a bare decoder's": lambda name: name.replace("model.model.layers", "model.layers"),
    "without PEFT's prefix": lambda name: name.removeprefix("base_model.model."),
}


def test_an_adapter_is_read_however_its_tensors_are_called(tmp_path, saved):
    config = hf.load_config(saved("llama"))
    of_peft(saved("llama"), **PARTLY["a regular expression"]).save_pretrained(tmp_path)
    file = tmp_path / peft_settings.TENSORS
    tensors, expected = safetensors.numpy.load_file(file), peft.load(str(tmp_path), config)
    for spelling, renamed in SPELLINGS.items():
        safetensors.numpy.save_file({renamed(name): x for name, x in tensors.items()}, file)
        lora, adapter = peft.load(str(tmp_path), config)
        assert lora == expected[0], spelling
        same(adapter, expected[1])
    both = {SPELLINGS["the adapter's name"](name): x for name, x in tensors.items()}
    safetensors.numpy.save_file(both | tensors, file)
    same(peft.load(str(tmp_path), config)[1], expected[1])
    safetensors.numpy.save_file(both | {name: x + 1 for name, x in tensors.items()}, file)
    with pytest.raises(ValueError, match=r"6 of one module \(several adapters in one file"):
        peft.load(str(tmp_path), config)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    safetensors.numpy.save_file({one: x for one, x in tensors.items() if one != name}, file)
    with pytest.raises(ValueError, match=r"1 missing:\n +layers.1.mlp.down_proj.lora_A.weight$"):
        peft.load(str(tmp_path), config)
    # a layer is missing altogether that the settings name
    cut = {one: x for one, x in tensors.items() if "down_proj" not in one}
    safetensors.numpy.save_file(cut, file)
    with pytest.raises(ValueError, match="2 missing:"):
        peft.load(str(tmp_path), config)


# what is refused, and what to do instead
REFUSED = {
    "one norm of several": (
        dict(modules_to_save=["layers.1.input_layernorm"]),
        "layers.{layer}.input_layernorm.weight whole in some layers only, .*merge_and_unload",
    ),
    "a token that is none": (
        dict(trainable_token_indices=[5], edited=dict(trainable_token_indices=[V])),
        f"trainable_token_indices: {V} is no token of a vocabulary of {V}",
    ),
    "a token twice": (
        dict(edited=dict(trainable_token_indices=[4, 4])),
        "trainable_token_indices: expected a list of unlike tokens' ids",
    ),
    "bin": (dict(), "adapter_model.bin beside it is not read: convert it, python -c"),
    "dora on some layers": (
        dict(LAYERS["layers_to_transform"], use_dora=True),
        "DoRA on some layers only of model.layers.{layer}.self_attn.q_proj, .*merge_and_unload",
    ),
    "pissa": (
        dict(init_lora_weights="pissa"),
        "init_lora_weights = 'pissa' .*merge_and_unload.*config.model.path",
    ),
    "another kind": (
        dict(edited=dict(peft_type="IA3", r=None, lora_alpha=None, feedforward_modules=["x"])),
        r"not supported: peft_type = 'IA3' \(expected 'LORA'\); .*merge_and_unload",
    ),
    "a pattern": (
        dict(target_modules=["q_proj"], edited=dict(target_modules="(q_proj")),
        r"adapter_config.json: target_modules: '\(q_proj' is no regular expression",
    ),
    "a layer's number": (
        dict(edited=dict(layers_to_transform=["1"])),
        "layers_to_transform: expected a layer's number, a list of them, or null",
    ),
    "no module of ours": (
        dict(edited=dict(target_modules=["w_proj"])),
        "(?s)of which these can be adapted: .*lm_head, self_attn.q_proj.*4 unexpected",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_says_what_to_do(kind, tmp_path, saved):
    settings, words = REFUSED[kind]
    settings = {"target_modules": ["q_proj"]} | settings
    changes = settings.pop("edited", {})
    of_peft(saved("llama"), **settings).save_pretrained(tmp_path, safe_serialization=kind != "bin")
    edited(tmp_path, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        peft.load(str(tmp_path), hf.load_config(saved("llama")))


def test_the_hint_for_a_pickle_converts_it(tmp_path, saved, monkeypatch):
    config = hf.load_config(saved("llama"))
    model = of_peft(saved("llama"), target_modules=["q_proj"])
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(FileNotFoundError) as raised:
        peft.load(str(tmp_path), config)
    monkeypatch.chdir(tmp_path)
    exec(str(raised.value).split('python -c "')[1].rstrip('"'))
    assert peft.load(str(tmp_path), config)[0].targets == "attention/query"


def test_dora_on_a_part_of_a_fused_module_is_refused(tmp_path):
    config = hf.config_from({"model_type": "phi3", "sliding_window": None} | SHAPE)
    lora = LoraConfig(2, targets="attention/query", dora=True)
    shapes = build(config, lora=lora).shapes(jnp.float32)["layers"]["attention"]["query"]
    adapter = {
        "layers": {
            "attention": {
                "query": {
                    name: np.zeros(x.shape) for name, x in shapes.items() if name.startswith("lora")
                }
            }
        }
    }
    with pytest.raises(
        ValueError,
        match="DoRA on layers/attention/query alone cannot be written: PEFT's .*qkv_proj",
    ):
        peft.save(str(tmp_path), config, lora, adapter, base_name="")


def test_shared_experts_go_by_their_weights_and_without_dora(tmp_path, saved):
    config, base = hf.load(saved("glm4_moe"), dtype="float32")
    lora = LoraConfig(2, targets="shared/.*", dropout=0.1)
    peft.save(str(tmp_path), config, lora, trained(config, lora, base), base_name="")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    names = [f"shared_experts.{part}_proj.weight" for part in ("down", "gate", "up")]
    assert (said["target_parameters"], said["target_modules"], said["lora_dropout"]) == (
        names,
        [],
        0,
    )
    edited(tmp_path, target_parameters=[*names, "experts.down_proj"])
    with pytest.raises(ValueError, match="no such module's weight:\n +experts.down_proj"):
        peft.load(str(tmp_path), config)
    lora = dataclasses.replace(lora, dora=True)
    with pytest.raises(ValueError, match="PEFT has no DoRA on glm4_moe's shared/"):
        peft.save(str(tmp_path), config, lora, trained(config, lora, base), base_name="")


def test_every_family_is_compared():
    # those left out have the modules of deepseek_v2, of glm4_moe, of qwen3_5 with qwen2_moe,
    # and of gemma3n_text where gemma4 has its own
    out = {"deepseek_v3", "glm4_moe_lite", "kimi_k2", "solar_open", "gemma3n"}
    assert set(CASES) == set(FAMILIES) - out - {"qwen3_5_moe", "qwen3_5_moe_text"}
