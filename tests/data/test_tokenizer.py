# SPDX-License-Identifier: Apache-2.0
"""The byte tokenizer is a real one; mistakes in naming tokenizers are told."""

import json

import pytest
from transformers import AutoTokenizer

from align_jax.data import tokenizer, tokenizer_files


def test_byte_ids_are_the_bytes():
    tok = tokenizer.byte_tokenizer()
    text = "Grüß 🙂\n\t\x00 end"
    assert tok(text).input_ids == list(text.encode())
    assert tok.decode(tok(text).input_ids) == text
    assert len(tok) == tokenizer.BYTE_VOCAB and len(tok) % 16 == 0
    assert tok(f"{tokenizer.CHOSEN}a").input_ids[1:] == [97]


def test_the_byte_tokenizer_saves_and_loads_as_any_other(tmp_path):
    tok = tokenizer.byte_tokenizer()
    tok.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), tokenizer.load_tokenizer(str(tmp_path))):
        assert again.chat_template == tok.chat_template
        assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (256, 257, 258)
        messages = [{"role": "user", "content": "ä"}]
        assert again.apply_chat_template(messages, tokenize=False) == "<|bos|><|user|>ä<|end|>"
        assert tokenizer.tokenizer_digest(again) == tokenizer.tokenizer_digest(
            tokenizer.load_tokenizer(str(tmp_path))
        )


def test_the_fingerprint_sees_the_template():
    assert tokenizer.tokenizer_digest(
        tokenizer.load_tokenizer("byte")
    ) != tokenizer.tokenizer_digest(
        tokenizer.load_tokenizer("byte", chat_template="{{ messages }}")
    )


def test_a_template_may_be_a_file(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{{ 1 }}")
    assert tokenizer.load_tokenizer("byte", chat_template=str(path)).chat_template == "{{ 1 }}"
    with pytest.raises(ValueError, match="neither a file nor a Jinja template"):
        tokenizer.load_tokenizer("byte", chat_template=str(tmp_path / "chta.jinja"))


@pytest.mark.parametrize(
    "said, files, expected",
    [
        ("a", {}, "a"),
        ("a", {"chat_template": "b"}, "b"),
        ([{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}], {}, None),
        ("a", {"chat_template": "b", "additional_chat_templates/tool_use": "c"}, None),
    ],
)
def test_a_tokenizer_file_has_the_template_that_its_folder_has(tmp_path, said, files, expected):
    tokenizer.byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / tokenizer_files.TEMPLATE).unlink()
    config = tmp_path / tokenizer_files.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": said}))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jinja").write_text(text)
    found = tokenizer.load_tokenizer(str(tmp_path / "tokenizer.json")).chat_template
    assert found == tokenizer.load_tokenizer(str(tmp_path)).chat_template
    assert found == expected or expected is None and len(found) == 2


def test_a_missing_tokenizer_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match="expected 'byte', a directory, a tokenizer.json or a hub id"
    ):
        tokenizer.load_tokenizer(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "name, vocabulary, end, template",
    [
        ("deepseek_r1", 128815, "<｜end▁of▁sentence｜>", True),
        ("minimind", 6400, "<|im_end|>", True),
        ("gpt_neox_20B/20B_tokenizer.json", 50277, "<|endoftext|>", False),
    ],
)
def test_real_tokenizers_load(testdata, name, vocabulary, end, template):
    tok = tokenizer.load_tokenizer(str(testdata / "tokenizers" / name))
    assert (len(tok), tok.eos_token, bool(tok.chat_template)) == (vocabulary, end, template)
    assert 0 <= tokenizer.pad_id(tok) < vocabulary


def test_a_name_that_is_no_tokenizer_is_told_the_nearest(tmp_path):
    (tmp_path / "llama").mkdir()
    for given, near in (("byt", "byte"), (str(tmp_path / "lama"), str(tmp_path / "llama"))):
        with pytest.raises(ValueError, match=f"or a hub id; did you mean '{near}'"):
            tokenizer.load_tokenizer(given)
