# SPDX-License-Identifier: Apache-2.0
"""What is rendered is what transformers renders; the mask covers the response and its end, and
nothing else."""

import functools
import itertools

import pytest

from align_jax.core.options import DataOptions
from align_jax.core.schema import Example
from align_jax.data import chat, datasets, tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}{{ eos_token "
    "}}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if "
    "add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL = (
    "{{ messages | length }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% "
    "endfor %}"
)


def U(text):
    return {"role": "user", "content": text}


def A(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}


@functools.cache
def load(testdata, name, template=None):
    if name == "byte":
        return tokenizer.load_tokenizer("byte", chat_template=template)
    path = {
        "stories": "models/TinyStories-656K",
        "neox": "tokenizers/gpt_neox_20B/20B_tokenizer.json",
    }.get(name, f"tokenizers/{name}")
    return tokenizer.load_tokenizer(str(testdata / path), chat_template=template)


def learned(tokens, index):
    return [token for token, mask in zip(tokens.responses[index], tokens.masks[index]) if mask]


CONVERSATIONS = [
    ((U("Hi"),), "Hello there."),
    ((SYSTEM, U("What is 2+2?")), "4\n\nThat is all."),
    ((U("Grüß 🙂"), A("x"), U("And?\n")), "Ünïcode — yes"),
    ((U("a"), A("b"), U("c"), A("d"), U("e")), " spaced "),
]


@pytest.mark.parametrize(
    "name, template",
    [("byte", None), ("minimind", None), ("deepseek_r1", None), ("byte", CHATML), ("neox", CHATML)],
    ids=["byte", "minimind", "deepseek", "chatml", "neox"],
)
def test_rendered_text_and_tokens_equal_transformers(testdata, name, template):
    tok = load(testdata, name, template)
    for prompt, answer in CONVERSATIONS:
        example = Example(prompt, (answer, "No."))
        rendered, tokens = chat.render(example, tok), chat.encode(example, tok)
        for index, response in enumerate(example.responses):
            whole = [*prompt, A(response)]
            text = (
                rendered.prompt
                + "".join(s.text for s in rendered.responses[index])
                + rendered.closing[index]
            )
            assert text == tok.apply_chat_template(whole, tokenize=False)
            assert tokens.prompt == tok.apply_chat_template(
                list(prompt), add_generation_prompt=True, return_dict=False
            )
            ids = tok.apply_chat_template(whole, return_dict=False)
            assert (
                tokens.prompt + tokens.responses[index]
                == ids[: len(tokens.prompt) + len(tokens.responses[index])]
            )
            assert (
                tok.decode(learned(tokens, index), skip_special_tokens=True).strip()
                == response.strip()
            )
            assert learned(tokens, index)[-1] == tok.eos_token_id
            assert learned(tokens, index).count(tok.eos_token_id) == 1


@pytest.mark.parametrize("name", ["minimind", "deepseek_r1"])
def test_real_conversations_are_masked_exactly(testdata, name):
    tok = load(testdata, name)
    hh = datasets.load(
        str(testdata / "preference/hh_rlhf_harmless_test.jsonl.gz"),
        "pairs",
        DataOptions(),
        chat=True,
        limit=60,
    )
    kto = datasets.load(
        str(testdata / "preference/lf_kto_en_demo.json"),
        "unpaired",
        DataOptions(),
        chat=True,
        limit=60,
    )
    for example in itertools.chain(hh.items, kto.items):
        tokens = chat.encode(example, tok)
        joined = tok.apply_chat_template([*example.prompt, A(example.responses[0])], tokenize=False)
        assert tok.decode(tokens.prompt + tokens.responses[0]).strip() == joined.strip()
        for index, response in enumerate(example.responses):
            assert (
                tok.decode(learned(tokens, index), skip_special_tokens=True).strip()
                == response.strip()
            )


@pytest.mark.parametrize(
    "name, bos", [("stories", True), ("neox", False), ("byte", False), ("deepseek_r1", False)]
)
def test_plain_text_gets_one_bos_and_one_eos(testdata, name, bos):
    tok = load(testdata, name)
    example = Example("Once upon a time", (" there was a cat.", " the end." + tok.eos_token))
    tokens = chat.encode(example, tok)
    assert (tokens.prompt[0] == tok.bos_token_id) == bos and tokens.prompt[1:].count(
        tok.bos_token_id
    ) == 0
    for ids, mask in zip(tokens.responses, tokens.masks):
        assert ids[-1] == tok.eos_token_id and ids.count(tok.eos_token_id) == 1 and all(mask)
    again = chat.encode(Example((tok.bos_token or "") + "Once upon a time", (" x",)), tok)
    assert again.prompt.count(tok.bos_token_id) <= 1


@pytest.mark.parametrize("name", ["stories", "neox", "byte"])
def test_plain_text_is_tokenized_as_one_text_is(testdata, name):
    tok = load(testdata, name)
    for prompt, answer in (
        ("\n\nHuman: Why?\n\nAssistant:", " Because it is so."),
        ("Tom said:\n", "Look at me!"),
        ("Question: 2\nAnswer:", " 4"),
    ):
        tokens = chat.encode(Example(prompt, (answer,)), tok)
        whole = tok(prompt + answer).input_ids + [tok.eos_token_id]
        # its tokens span words (":▁"), so a cut there shows
        if name == "stories" and answer[0] == " ":
            assert tok.decode(tokens.prompt + tokens.responses[0]) == tok.decode(whole)
        else:
            assert tokens.prompt + tokens.responses[0] == whole


def test_every_answer_of_a_conversation_is_learned_and_nothing_between():
    tok = load(None, "byte")
    tokens = chat.encode(Example((U("a"),), ((A("one"), U("b"), A("two")),)), tok)
    assert tok.decode(tokens.prompt) == "<|bos|><|user|>a<|end|><|assistant|>"
    assert tok.decode(tokens.responses[0]) == "one<|end|><|user|>b<|end|><|assistant|>two<|end|>"
    assert tok.decode(learned(tokens, 0)) == "one<|end|>two<|end|>"


def test_white_space_between_turns_is_not_learned():
    tok = load(None, "byte", CHATML)
    tokens = chat.encode(Example((U("a"),), ((A("one"), U("b"), A("two")),)), tok)
    assert (
        tok.decode(tokens.responses[0])
        == "one<|end|>\n<|user|>\nb<|end|>\n<|assistant|>\ntwo<|end|>"
    )
    assert tok.decode(learned(tokens, 0)) == "one<|end|>two<|end|>"


def test_a_template_without_an_end_of_turn_gets_the_end_of_sequence_once():
    tok = load(None, "byte", BARE)
    tokens = chat.encode(Example((U("a"),), ("one",)), tok)
    assert tok.decode(tokens.prompt + tokens.responses[0]) == "user: a\nassistant: one<|end|>"


def test_an_end_after_the_last_turn_alone_is_no_answers():
    ends = "{% else %}{{ eos_token }}{% endif %}"  # as Phi-3's template does
    tok = load(None, "byte", CHATML.replace("eos_token", "'<|end|>'").replace("{% endif %}", ends))
    tok.eos_token = "<|pad|>"
    tokens = chat.encode(Example((U("a"),), ((A("one"), U("b"), A("two")),)), tok)
    assert tok.decode(learned(tokens, 0)) == "one<|end|>two<|end|>"
    assert "<|pad|>" not in tok.decode(tokens.responses[0])


def test_a_header_longer_than_the_templates_own_turn_is_cut_where_they_part():
    tok = load(None, "byte", THINKING)
    assert (
        tok.decode(chat.encode(Example((U("a"),), ("one",)), tok).prompt)
        == "<|user|>a<|end|><|assistant|>"
    )


ERRORS = [
    (
        None,
        Example((U("a"),), ("b",), source="d:7"),
        "d:7: messages, but the tokenizer has no chat template",
    ),
    (
        FORGETFUL,
        Example((U("a"),), ("b",), source="d:7"),
        "d:7: the chat template renders the prompt diff",
    ),
    (
        "{{ raise_exception('no') }}",
        Example((SYSTEM,), ("b",), source="x"),
        "x: the chat template refuses .*no",
    ),
    (
        CHATML,
        Example("plain", ((A("b"),),), source="x"),
        "x: the prompt is plain text, so the responses must be",
    ),
]


@pytest.mark.parametrize("template, example, message", ERRORS)
def test_conversations_that_cannot_be_told_apart_are_errors(template, example, message):
    tok = tokenizer.load_tokenizer("byte", chat_template=template)
    if template is None:
        tok.chat_template = None
    with pytest.raises(ValueError, match=message):
        chat.encode(example, tok)


def test_turn_and_header_of_the_prompt_are_found():
    tok = load(None, "byte")
    tokens = chat.encode(Example((U("first"), A("x"), U("second")), ("y",)), tok)
    assert tok.decode(tokens.prompt[tokens.last_turn :]) == "<|user|>second<|end|><|assistant|>"
    assert tok.decode(tokens.prompt[-tokens.header :]) == "<|end|><|assistant|>"
    plain = chat.encode(
        Example("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", (" d",)), tok
    )
    assert tok.decode(plain.prompt[plain.last_turn :]) == "\n\nHuman: c\n\nAssistant:"
    assert tok.decode(plain.prompt[-plain.header :]) == "\n\nAssistant:"
