# SPDX-License-Identifier: Apache-2.0
"""A damaged model folder is refused in one message that names the file, whatever the damage."""

import json
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from align_jax.core.tree import flatten
from align_jax.data.tokenizer import byte_tokenizer, load_tokenizer
from align_jax.inference.generate import stop_tokens
from align_jax.interop import hf, peft, tensor_files
from align_jax.models.lora import LoraConfig
from align_jax.models.model import build

CONFIG, INDEX, SHARD = "config.json", tensor_files.INDEX, "model-00002-of-00003.safetensors"
TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIALS = "special_tokens_map.json"
ADAPTER, WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
MODEL = hf.config_from(
    dict(
        model_type="llama",
        vocab_size=272,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A model in three shards with a byte tokenizer and an adapter."""
    folder = tmp_path_factory.mktemp("sound")
    params = build(MODEL).init(jax.random.key(0))
    hf.save(str(folder), MODEL, params, shard_bytes=20_000)
    byte_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 257]}')
    lora = LoraConfig(2, targets="attention/query")
    adapter = build(MODEL, lora=lora).init_adapter(jax.random.key(1), params)
    peft.save(str(folder / "adapter"), MODEL, lora, adapter, base_name="")
    return folder


def read(folder):
    """All that a program reads of a folder."""
    config, params = hf.load(str(folder))
    tokenizer = load_tokenizer(str(folder))
    stops = stop_tokens(tokenizer, config.end_tokens)
    peft.load(str(folder / "adapter"), config)
    return config, flatten(params), stops


def cut(data):
    return data[: len(data) // 2]


def header(change):
    """The same tensors under another header."""

    def damage(data):
        size = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + size])
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return damage


def tensors(change):
    """Other tensors, in a sound file."""

    def damage(data):
        found = safetensors.numpy.load(data)
        name = sorted(found)[0]
        return safetensors.numpy.save(change(name, found))

    return damage


def fields(**changes):
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


def without(key):
    return lambda data: json.dumps({k: v for k, v in json.loads(data).items() if k != key}).encode()


def poisoned(name, found):
    found[name][0] = np.nan
    found[name].flat[-1] = -np.inf
    return found


def within(*keys, to):
    """A field inside of others."""

    def damage(data):
        whole = inner = json.loads(data)
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        return json.dumps(whole).encode()

    return damage


def ends(index):
    """A tokenizer that puts <|bos|> before a text."""
    special = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    single = [special, {"Sequence": {"id": "A", "type_id": 0}}]
    token = {"id": "<|bos|>", "ids": [index], "tokens": ["<|bos|>"]}
    made = {"type": "TemplateProcessing", "single": single, "pair": []}
    made["special_tokens"] = {"<|bos|>": token} if index else {}
    return fields(post_processor=made)


def index(change):
    return lambda data: json.dumps({"weight_map": change(json.loads(data)["weight_map"])}).encode()


NAN = float("nan")
CASES = [  # file, what becomes of its bytes (None: it is taken away), what is said
    (CONFIG, b"", "expected a JSON object, got an empty file"),
    (CONFIG, POINTER, "a git-lfs pointer.*git lfs pull"),
    (CONFIG, PAGE, "an HTML page"),
    (CONFIG, b"[1, 2]", "expected a JSON object, got a list of 2"),
    (CONFIG, cut, r":\d+: malformed JSON"),
    (CONFIG, None, "there is no"),
    (CONFIG, b'{"config": {}, "versions": {}}', "got a run's: .*export --workdir="),
    (CONFIG, without("model_type"), "model_type: expected one of .*gemma, .* got null"),
    (CONFIG, fields(model_type=["llama"]), "model_type: expected one of .* got a list of 1"),
    (CONFIG, fields(hidden_size="64"), "hidden_size: expected a positive integer, got '64'"),
    (CONFIG, fields(hidden_size=64.0), "hidden_size: expected a positive integer, got 64.0"),
    (CONFIG, fields(hidden_size=None), "hidden_size: expected a positive integer, got null"),
    (CONFIG, fields(hidden_size=17), r"hidden size \(17\) is not a multiple of .* heads \(2\)"),
    (CONFIG, fields(num_attention_heads=0), "num_attention_heads: .*, got 0"),
    (CONFIG, fields(num_attention_heads=-2), "num_attention_heads: .*, got -2"),
    (CONFIG, fields(num_key_value_heads=3), "num_key_value_heads: expected a divisor .* got 3"),
    (CONFIG, fields(num_hidden_layers=10**12), "num_hidden_layers: .* from 1 to 10000, got"),
    (CONFIG, fields(rms_norm_eps=NAN), "rms_norm_eps: expected a number between .* got NaN"),
    (CONFIG, fields(hidden_act="swish2"), "hidden_act = 'swish2' is unknown; known: gelu"),
    (
        CONFIG,
        fields(rope_scaling="linear"),
        "rope_scaling: expected an object or null, got 'linear'",
    ),
    (
        CONFIG,
        fields(rope_parameters={"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0}),
        "rope_parameters.*llama3.*low_freq_factor",
    ),
    (
        CONFIG,
        fields(rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": "2"}),
        "rope_parameters.factor: expected a number above 0 or null, got '2'",
    ),
    (CONFIG, fields(tie_word_embeddings="true"), "tie_word_embeddings: expected true or false"),
    (CONFIG, fields(rms_norm_epz=1e-6), "rms_norm_epz is no field; did you mean rms_norm_eps"),
    (CONFIG, fields(dtype="float13"), "dtype: expected 'float32', .* got 'float13'"),
    (CONFIG, fields(use_cache=[]), "transformers refuses .*use_cache"),
    (CONFIG, fields(quantization_config={"quant_method": "awq"}), "quantized by awq"),
    (
        CONFIG,
        fields(quantization_config={"quant_method": "fp8", "weight_block_size": [8]}),
        r"weight_block_size: expected two positive integers or null, got \[8\]",
    ),
    ("adapter_config.json", b"{}", "beside it is adapter_config.json, .* config.model.lora.path"),
    (CONFIG, fields(vocab_size=300), r"embed_tokens.weight: expected \(300, 16\), got \(272, 16\)"),
    (SHARD, b"", "not a whole safetensors file: it is an empty file"),
    (SHARD, POINTER, "git-lfs pointer"),
    (SHARD, PAGE, "an HTML page"),
    (SHARD, bytes(5000), "nothing but zero bytes"),
    (SHARD, b"\x80\x02}q\x00." * 50, "a Python pickle"),
    (SHARD, cut, "its header tells of [0-9,]+ bytes of tensors, and it has [0-9,]+ .*broken off"),
    (SHARD, lambda data: data[:300], "header of [0-9,]+ bytes, and it has 300 in all"),
    (SHARD, lambda data: b"\xff" * 8 + data[8:], "header of [0-9,]+ bytes, and it has"),
    (SHARD, header(lambda text: text.replace(b":", b";")), "not a whole safetensors file"),
    (SHARD, header(lambda text: text.replace(b"F32", b"F33")), "not a whole safetensors file"),
    (SHARD, header(lambda text: text.replace(b"[0,", b"[4,")), "not a whole safetensors file"),
    (SHARD, None, "names 1 files that are not there: .*00002-of-00003"),
    (SHARD, tensors(poisoned), r"(?s)weights that .*1 not finite:.*\w: 17 of \d+ NaN or infinite"),
    (
        SHARD,
        tensors(lambda name, found: found | {name: found[name].astype(np.int8)}),
        r"(?s)1 of a type that is no weight's \(F64, F32, F16, BF16.*: I8",
    ),
    (
        SHARD,
        tensors(lambda name, found: found | {name: found[name][1:]}),
        r"(?s)1 mis-shaped:.*: expected \(\d+, \d+\), got",
    ),
    (SHARD, tensors(lambda name, found: found | {"what": found[name]}), "(?s)1 unexpected:.*what"),
    (
        SHARD,
        tensors(lambda name, found: found | {"model.embed_tokens.weight": found[name]}),
        "(?s)1 in several files, with other numbers:.*embed_tokens",
    ),
    (
        SHARD,
        tensors(lambda name, found: {k: v for k, v in found.items() if k != name}),
        "(?s)1 in the index, not in its file:",
    ),
    (INDEX, cut, "malformed JSON"),
    (INDEX, index(lambda where: list(where)), "weight_map: expected an object .* got a list of"),
    (INDEX, index(lambda where: {}), "weight_map: expected an object"),
    (INDEX, index(lambda where: dict.fromkeys(where, "../x")), "weight_map: .*beside it"),
    (
        INDEX,
        index(lambda where: where | {"w": SHARD}),
        r"(?s)1 in the index, not in its file:.*w \(",
    ),
    (INDEX, None, "expected model.safetensors or .*model-00001-of-.* is there, and no .*index"),
    (tensor_files.SINGLE, POINTER, "holds both model.safetensors and"),
    (TOKENIZER, b"", "got an empty file|malformed"),
    (TOKENIZER, POINTER, "git-lfs pointer"),
    (TOKENIZER, PAGE, "an HTML page"),
    (TOKENIZER, cut, "malformed JSON"),
    (TOKENIZER, fields(model={"type": "BPP"}), "not a tokenizer"),
    (TOKENIZER, ends(0), "'<.bos.>' is not among its special_tokens, of which it has none"),
    (TOKENIZER, ends(9999), "'<.bos.>' has the id 9999 there, and 257 in the vocabulary"),
    (TOKENIZER, within("added_tokens", 3, "content", to="a"), "added_tokens: .*renamed in both"),
    (TOKENIZER, within("added_tokens", 2, "id", to=100), "'<.end.>' is to have the id 100, and"),
    (TOKENIZER, within("model", "dropout", to=0.1), "its model.s dropout = 0.1: .* set it to null"),
    (TOKENIZER, within("model", "vocab", to={}), "its model.s vocab: expected tokens, got none"),
    (SETTINGS, cut, "malformed JSON"),
    (SETTINGS, fields(padding_side="up"), "padding_side: expected 'left', 'right' or null, got"),
    (SETTINGS, fields(added_tokens_decoder={"x": {}}), "added_tokens_decoder: expected an object"),
    (SETTINGS, fields(extra_special_tokens={"im": 3}), "extra_special_tokens: expected a list or"),
    (SPECIALS, b'{"eos_token": 5}', "eos_token: expected text, an object with 'content', or null"),
    (SPECIALS, b'{"eos_token": {"content": "a", "lstrip": 1}}', "eos_token: expected text"),
    (SPECIALS, b'{"eos_token": null}', "set eos_token in its special_tokens_map.json"),
    ("added_tokens.json", b'{"<x>": "272"}', "<x>: expected the token's id, got '272'"),
    (SETTINGS, b"[]", "got a list of 0"),
    (SETTINGS, fields(eos_token=5), "eos_token: expected text, an object with 'content', or null"),
    (SETTINGS, fields(model_max_length="x"), "model_max_length: expected a number above 0"),
    (SPECIALS, b"{", "malformed JSON"),
    (TEMPLATE, b"", "expected a Jinja template, got an empty file"),
    (TEMPLATE, POINTER, "git-lfs pointer"),
    (TEMPLATE, b"a\n{% for x in y %}", ":2: no Jinja template: .*'endfor'"),
    (TEMPLATE, b"{{ iessages }}", "the template reads 'iessages'; did you mean 'messages'"),
    (TEMPLATE, b"{{ bos_toke }}{{ messages }}", "did you mean 'bos_token'"),
    (TEMPLATE, b"{{ messages.x.y }}", "the chat template"),
    ("generation_config.json", cut, "malformed JSON"),
    ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id: expected a token's id"),
    (ADAPTER, POINTER, "git-lfs pointer"),
    (ADAPTER, fields(r="2"), "r: expected a positive integer, got '2'"),
    (ADAPTER, without("r"), "r: expected a positive integer, got null"),
    (ADAPTER, fields(lora_alpha=NAN), "lora_alpha: expected a number above 0, got NaN"),
    (ADAPTER, fields(r=4), r"(?s)4 mis-shaped:.*lora_A.weight: expected \(4, 16\), got \(2, 16\)"),
    (ADAPTER, fields(rank_pattern={"[": 1}), "rank_pattern: .* is no regular expression"),
    (ADAPTER, fields(rank_pattern=[1]), "rank_pattern: expected an object"),
    (ADAPTER, fields(alpha_pattern={"(": 1}), "alpha_pattern: .* is no regular expression"),
    (WEIGHTS, cut, "not a whole safetensors file"),
    (WEIGHTS, None, "adapter_model.safetensors not found"),
    (
        WEIGHTS,
        tensors(
            lambda name, found: (
                found | {"base_model.model.score.weight": np.ones((2, 16), np.float32)}
            )
        ),
        r"score.weight: expected \(1, 16\), got \(2, 16\)",
    ),
    (WEIGHTS, tensors(poisoned), "(?s)1 not finite:.*NaN or infinite"),
    (WEIGHTS, tensors(lambda name, found: found | {name: found[name].astype("i4")}), ": I32"),
    (
        WEIGHTS,
        tensors(lambda name, found: {k: v for k, v in found.items() if k != name}),
        "(?s)1 missing:",
    ),
]


def damaged(sound, folder, file, change):
    shutil.copytree(sound, folder, dirs_exist_ok=True)
    path = folder / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()) if callable(change) else change)


@pytest.mark.parametrize(
    "file, change, message", CASES, ids=[f"{case[0]}-{case[2][:30]}" for case in CASES]
)
def test_the_message_names_the_file_and_the_fault(sound, tmp_path, file, change, message):
    folder = tmp_path / "model"
    damaged(sound, folder, file, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read(folder)
    assert error.type in (ValueError, FileNotFoundError)
    assert str(folder) in str(error.value)


def test_a_sound_folder_is_read_with_any_ends_of_lines(sound, tmp_path):
    folder = tmp_path / "model"
    damaged(sound, folder, CONFIG, lambda data: data.replace(b"\n", b"\r\n"))
    config, _, stops = read(folder)
    assert config == hf.load_config(str(sound)) and stops == (257, 258)


@pytest.mark.parametrize(
    "change, message",
    [
        (fields(hidden_size="64"), "config.json: transformers refuses it: .*hidden_size"),
        (cut, "config.json:\\d+: malformed JSON"),
    ],
    ids=["field", "cut"],
)
def test_a_tokenizer_names_the_model_file_that_it_stumbles_on(sound, tmp_path, change, message):
    damaged(sound, tmp_path / "model", CONFIG, change)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(tmp_path / "model"))


def test_many_tensors_of_a_kind_are_counted_and_ten_are_named(sound, tmp_path):
    folder = tmp_path / "model"
    damaged(sound, folder, CONFIG, fields(num_hidden_layers=9))
    with pytest.raises(ValueError) as error:
        read(folder)
    message = str(error.value)
    assert "63 missing" in message and "and 53 more (all begin 'model.layers.')" in message
    assert message.count("\n") < 15


def test_weights_that_the_type_cannot_hold_are_refused(sound, tmp_path):
    folder = tmp_path / "model"
    damaged(sound, folder, SHARD, tensors(lambda name, found: found | {name: found[name] + 7e4}))
    hf.load(str(folder))
    with pytest.raises(ValueError, match="(?s)1 not finite:.*beyond float16's range"):
        hf.load(str(folder), dtype="float16")


def test_pickled_weights_are_named_with_what_makes_safetensors_of_them(sound, tmp_path):
    shutil.copy(sound / CONFIG, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin .*save_pretrained"):
        hf.load(str(tmp_path))


def test_a_path_that_is_no_models_folder_is_told_what_it_is(sound, tmp_path):
    for path, message in (
        (sound / SHARD, "is a file .a safetensors file.: expected the folder"),
        (tmp_path / "adapter", "holds a PEFT adapter: that is config.model.lora.path"),
        (tmp_path / "checkpoints/7", "export --workdir=.* makes a model of it"),
        (tmp_path / "gguf", "w.gguf beside it is not read"),
        (tmp_path / "models--me--mine", "cache has a model's files in a folder of .*snapshots"),
    ):
        if not path.exists():
            (path / "state" if path.name == "7" else path).mkdir(parents=True)
        if path.name == "adapter":
            shutil.copy(sound / ADAPTER, path)
        if path.name == "models--me--mine":
            (path / "snapshots").mkdir()
        if path.name == "gguf":
            (path / "w.gguf").write_bytes(b"GGUF")
        with pytest.raises(FileNotFoundError, match=message):
            hf.load(str(path))


def test_an_export_replaces_what_lay_there(tmp_path):
    params = build(MODEL).init(jax.random.key(0))
    for size in (20_000, 10**9, 20_000):
        hf.save(str(tmp_path), MODEL, params, shard_bytes=size)
        hf.load(str(tmp_path))


VALUES = (None, "x", -1, [], {})


def attempts(sound, draw):
    """Every file cut short and with bits changed; every field of its configurations replaced."""
    for path in sorted(path for path in sound.rglob("*") if path.is_file()):
        whole, name = path.read_bytes(), str(path.relative_to(sound))
        for at in draw.sample(range(len(whole)), 2):
            yield name, whole[:at], f"cut at {at}"
        # of weights mostly the header: a changed number is a number
        most = min(len(whole), 1200) if path.suffix == ".safetensors" else len(whole)
        for _ in range(4):
            at, bit = draw.randrange(most), draw.randrange(8)
            changed = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
            yield name, changed, f"bit {bit} of byte {at}"
        if path.suffix == ".json" and path.name != TOKENIZER:
            for key in json.loads(whole):
                value = draw.choice(VALUES)
                yield name, fields(**{key: value})(whole), f"{key} = {value!r}"


def test_nothing_but_a_named_refusal_comes_of_any_damage(sound, tmp_path):
    _, expected, _ = read(sound)
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    wrong, refused = [], 0
    for name, data, what in attempts(sound, random.Random(0)):
        path: pathlib.Path = folder / name
        path.write_bytes(data)
        try:
            _, params, _ = read(folder)
            same = jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
            if not same:
                wrong.append(f"{name}, {what}: another model was read")
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            if type(error) not in (ValueError, FileNotFoundError) or str(folder) not in str(error):
                wrong.append(f"{name}, {what}: {type(error).__name__}: {error}")
        except Exception as error:
            wrong.append(f"{name}, {what}: {type(error).__name__}: {error}")
        path.write_bytes((sound / name).read_bytes())
    assert not wrong, "\n".join(wrong)
    assert refused > 60
