# SPDX-License-Identifier: Apache-2.0
"""Greedy generation of a real model, token for token what transformers generates."""

import json

import numpy as np
import pytest
import torch
import transformers

from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.generate import Generator, Request
from align_jax.inference.samplers import Sampling
from align_jax.interop import hf
from align_jax.models.model import build

STARTS = (
    "Once upon a time, there was a",
    "One day, a little girl named Lily",
    "Tom and Sam",
    "The big red ball",
    "Mommy said",
    "In a dark forest, a small bird",
    '"Can I play?" asked',
    "Ben had a toy car. He",
)


@pytest.fixture(scope="module")
def stories(testdata):
    path = testdata / "models" / "TinyStories-656K"
    config, params = hf.load(str(path), dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return (
        build(config, compute_dtype="float32", remat="none"),
        params,
        load_tokenizer(str(path)),
        theirs,
    )


def story_prompts(tokenizer, testdata, n=64):
    """Eight starts by hand, and the first words of real rasbt instructions, of 1 to 40 tokens."""
    rows = json.loads((testdata / "text" / "rasbt_instruction_data.json").read_text())
    texts = [*STARTS, *(row["instruction"] for row in rows)][:n]
    return [
        tuple(tokenizer(text).input_ids[: 1 + i % 40 if i >= len(STARTS) else None])
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_is_transformers_token_for_token_on_64_prompts(stories, testdata, penalty):
    model, params, tokenizer, theirs = stories
    prompts = story_prompts(tokenizer, testdata)
    assert len(prompts) == 64
    new = 32 if penalty == 1.0 else 12
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty)
    ours = Generator(model, tokenizer, rows=32, prompt_bucket=64)(
        params, [Request(p, max_new_tokens=new, sampling=sampling) for p in prompts]
    )
    longest = max(map(len, prompts))
    padded = torch.zeros(64, longest, dtype=torch.long)
    mask = torch.zeros(64, longest, dtype=torch.long)
    for i, p in enumerate(prompts):
        padded[i, longest - len(p) :], mask[i, longest - len(p) :] = torch.tensor(p), 1
    if penalty != 1.0:  # transformers counts the padding as seen, so prompts go one by one
        outputs = [
            theirs.generate(
                torch.tensor([p]),
                max_new_tokens=new,
                do_sample=False,
                repetition_penalty=penalty,
                pad_token_id=0,
            )[0, len(p) :].tolist()
            for p in prompts[:16]
        ]
    else:
        outputs = theirs.generate(
            padded, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
        )[:, longest:].tolist()
    for (one,), expected in zip(ours, outputs):
        end = expected.index(2) + 1 if 2 in expected else len(expected)
        assert one.tokens.tolist() == expected[:end]
        assert one.finish == ("stop" if 2 in expected else "length")


def test_completions_text_continues_the_prompt(stories):
    model, params, tokenizer, _ = stories
    prompt = tuple(tokenizer("Once upon a time, there").input_ids)
    one = Generator(model, tokenizer, rows=1)(
        params, [Request(prompt, max_new_tokens=8, sampling=Sampling(temperature=0.0))]
    )[0][0]
    assert one.text == ", a little girl named Lily lived in a small house with her mom" and np.all(
        one.token_logps < 0
    )
