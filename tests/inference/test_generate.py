# SPDX-License-Identifier: Apache-2.0
"""Generation: equal to the full forward, to rescoring and to transformers; independent of the
batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference import decoding, generate
from align_jax.inference.generate import Generator, Request
from align_jax.inference.samplers import Sampling
from align_jax.models.config import ModelConfig, Rope
from align_jax.models.lora import LoraConfig, fold, merge
from align_jax.models.model import build
from align_jax.parallel.mesh import make_mesh
from align_jax.parallel.sharding import tree_shardings

TINY = ModelConfig(
    family="llama",
    vocab_size=270,
    vocab_rows=272,
    num_layers=2,
    hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=32,
    max_positions=96,
    query_scale=0.5,
    windows=(0, 0),
    layer_ropes=(0, 0),
    ropes=(Rope(10000.0, 4),),
    init_std=0.3,
)


@pytest.fixture(scope="module")
def tiny():
    model = build(TINY, compute_dtype="float32", remat="none")
    return model, model.init(jax.random.key(0)), load_tokenizer("byte")


@functools.partial(jax.jit, static_argnums=0)
def _logps(model, params, tokens, real):
    hidden, _ = model.hidden(params, tokens, real, jnp.arange(tokens.shape[1])[None] * real)
    return jax.nn.log_softmax(model.unembed(params, hidden[0]), axis=-1)


def forward_logps(model, params, tokens):
    """Log-softmax of the full forward on one row: [T - 1, V], of each token after the first."""
    row, real = np.zeros((2, 1, 96), np.int32)
    row[0, : len(tokens)], real[0, : len(tokens)] = tokens, 1
    return np.asarray(_logps(model, params, row, real))[: len(tokens) - 1, :270]


def prompts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(map(int, rng.integers(0, 256, rng.integers(1, 30)))) for _ in range(n)]


def same(a, b):
    return all(
        np.array_equal(x.tokens, y.tokens)
        and np.array_equal(x.token_logps, y.token_logps)
        and x[3:] == y[3:]
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("windows", [(0, 0), (0, 5)])
def test_sampled_log_probabilities_equal_the_full_forward(tiny, windows):
    config = dataclasses.replace(TINY, windows=windows)
    model, params = build(config, compute_dtype="float32", remat="none"), tiny[1]
    requests = [
        Request(p, samples=2, max_new_tokens=12, sampling=Sampling(temperature=0.8), seed=i)
        for i, p in enumerate(prompts(5))
    ]
    found = Generator(model, tiny[2], rows=4)(params, requests)
    for request, completions in zip(requests, found):
        assert len(completions) == 2
        for one in completions:
            assert (
                one.finish == "length"
                and len(one.tokens) == 12
                or one.tokens[-1] == tiny[2].eos_token_id
            )
            logps = forward_logps(model, params, [*request.prompt, *one.tokens])[-len(one.tokens) :]
            np.testing.assert_allclose(
                one.token_logps, logps[np.arange(len(one.tokens)), one.tokens], atol=1e-4
            )
            tempered = np.asarray(jax.nn.log_softmax(logps / 0.8, axis=-1))
            np.testing.assert_allclose(
                one.drawn_logps, tempered[np.arange(len(one.tokens)), one.tokens], atol=1e-4
            )


def test_greedy_tokens_are_the_full_forwards_most_probable(tiny):
    model, params, tokenizer = tiny
    request = Request(prompts(1)[0], max_new_tokens=10, sampling=Sampling(temperature=0.0))
    one = Generator(model, tokenizer, rows=2, stop_ids=())(params, [request])[0][0]
    expected = forward_logps(model, params, [*request.prompt, *one.tokens]).argmax(-1)
    np.testing.assert_array_equal(one.tokens, expected[-10:])
    assert one.finish == "length"


def test_a_requests_result_does_not_depend_on_its_batch(tiny):
    model, params, tokenizer = tiny
    generator = Generator(model, tokenizer, rows=8)
    requests = [
        Request(
            p, samples=1 + i % 2, max_new_tokens=9, seed=100 + i, sampling=Sampling(top_k=40 - i)
        )
        for i, p in enumerate(prompts(7))
    ]
    together = generator(params, requests)
    backwards = generator(params, requests[::-1])[::-1]
    assert all(same(a, b) for a, b in zip(together, backwards))
    alone = [generator(params, [one])[0] for one in requests[:3]]
    for a, b in zip(together, alone):
        assert [list(x.tokens) for x in a] == [list(x.tokens) for x in b]
    assert len({tuple(x.tokens) for several in together for x in several}) == sum(
        r.samples for r in requests
    )


def test_rows_go_on_alone_where_half_of_the_others_are_done(tiny):
    model, params, tokenizer = tiny
    limits = (3, 70, 5, 9, 4, 66, 2, 30)
    requests = [
        Request(p[:20], samples=2, max_new_tokens=n, seed=i)
        for i, (p, n) in enumerate(zip(prompts(8), limits))
    ]
    sizes, decode = [], decoding.decode

    def counted(model, params, row_requests, state, *rest, **keywords):
        sizes.append(len(state.done))
        return decode(model, params, row_requests, state, *rest, **keywords)

    generator = Generator(model, tokenizer, rows=16, stop_ids=(), prompt_bucket=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "decode", counted)
        together = generator(params, requests)
    assert sizes == [16, 8]
    alone = Generator(model, tokenizer, rows=2, stop_ids=(), prompt_bucket=24)
    for request, several in zip(requests, together):
        for a, b in zip(several, alone(params, [request])[0], strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_allclose(a.token_logps, b.token_logps, atol=1e-5)


def test_nothing_recompiles_for_other_settings_prompts_and_limits(tiny):
    model, params, tokenizer = tiny
    generator = Generator(model, tokenizer, rows=4)

    def run(n, temperature, seed):
        return generator(
            params,
            [
                Request(p, max_new_tokens=n, seed=seed, sampling=Sampling(temperature=temperature))
                for p in prompts(6, seed)
            ],
        )

    run(9, 0.5, 0), run(9, 0.7, 3)
    before = decoding.prefill._cache_size(), decoding.decode._cache_size()
    run(9, 0.5, 1), run(16, 0.7, 2), run(12, 1.4, 5)
    assert (decoding.prefill._cache_size(), decoding.decode._cache_size()) == before


def test_stop_tokens_end_a_completion_and_belong_to_it(tiny):
    model, params, tokenizer = tiny
    request = Request((65, 66), samples=8, max_new_tokens=30, seed=3)
    free = Generator(model, tokenizer, rows=8, stop_ids=())(params, [request])[0]
    stops = tuple({int(one.tokens[4]) for one in free})
    for one, longer in zip(
        Generator(model, tokenizer, rows=8, stop_ids=stops)(params, [request])[0], free
    ):
        n = int(np.flatnonzero(np.isin(longer.tokens, stops))[0]) + 1
        np.testing.assert_array_equal(one.tokens, longer.tokens[:n])
        np.testing.assert_allclose(one.token_logps, longer.token_logps[:n], rtol=1e-5)
        # the end is no text, though it is no special token
        text = generate.completion_text(tokenizer, request.prompt, one.tokens[:-1].tolist())
        assert one.finish == "stop" and one.text == text


def test_stop_strings_cut_text_and_tokens_where_they_first_occur(tiny):
    model, params, tokenizer = tiny
    request = Request(
        (65, 66), samples=6, max_new_tokens=40, seed=5, sampling=Sampling(temperature=2.0)
    )
    free = Generator(model, tokenizer, rows=8, stop_ids=())(params, [request])[0]
    stop = next(letter for letter in free[0].text[8:] if letter.isascii() and letter.isprintable())
    cut = Generator(model, tokenizer, rows=8, stop_ids=())(
        params, [dataclasses.replace(request, stop=(stop,))]
    )[0]
    assert cut[0].finish == "stop" and len(cut[0].tokens) < 40
    for one, longer in zip(cut, free):
        assert one.text == longer.text.partition(stop)[0]
        np.testing.assert_array_equal(one.tokens, longer.tokens[: len(one.tokens)])
        if one.finish == "stop":
            assert generate.completion_text(
                tokenizer, request.prompt, one.tokens.tolist()
            ).endswith(stop)


def test_sharded_over_eight_devices_gives_the_same_completions(tiny):
    model, params, tokenizer = tiny
    requests = [Request(p, samples=2, max_new_tokens=8, seed=i) for i, p in enumerate(prompts(6))]
    expected = Generator(model, tokenizer, rows=8)(params, requests)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(params, tree_shardings(mesh, model.axes()))
    got = Generator(model, tokenizer, rows=8, mesh=mesh)(placed, requests)
    for a, b in zip(expected, got):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x.tokens, y.tokens)
            np.testing.assert_allclose(x.token_logps, y.token_logps, atol=1e-4)


def test_sampled_frequencies_pass_a_chi_square_test(tiny):
    model, params, tokenizer = tiny
    prompt, n = (72, 105), 3000
    sampling = Sampling(top_k=6)
    completions = Generator(model, tokenizer, rows=1000, stop_ids=())(
        params, [Request(prompt, samples=n, max_new_tokens=1, sampling=sampling, seed=11)]
    )[0]
    assert len(completions) == n
    logps = forward_logps(model, params, [*prompt, 0])[-1]
    top = np.argsort(-logps)[:6]
    expected = n * np.exp(logps[top]) / np.exp(logps[top]).sum()
    counts = np.bincount([int(one.tokens[0]) for one in completions], minlength=272)
    # 0.999, 5 df
    assert (
        counts.sum() == counts[top].sum()
        and np.sum((counts[top] - expected) ** 2 / expected) < 20.5
    )


@pytest.mark.parametrize(
    "prompt,message", [((), "0 tokens"), (tuple(range(96)), "96 tokens; expected from 1 to 95")]
)
def test_prompts_without_room_are_named(tiny, prompt, message):
    with pytest.raises(ValueError, match=message):
        Generator(tiny[0], tiny[2])(tiny[1], [Request(prompt)])


def test_rows_must_divide_over_the_mesh(tiny):
    with pytest.raises(ValueError, match="multiple of the 8 row shards"):
        Generator(tiny[0], tiny[2], rows=12, mesh=make_mesh({"fsdp": 8}))


def test_an_adapter_generates_unmerged_what_its_merged_model_does(tiny):
    base, params, tokenizer = tiny
    config = LoraConfig(2, alpha=8.0)
    model = build(TINY, compute_dtype="float32", remat="none", lora=config)
    adapter = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.1,
        model.init_adapter(jax.random.key(1), params),
    )
    whole = merge(params, adapter)
    requests = [Request(p, samples=2, max_new_tokens=8, seed=i) for i, p in enumerate(prompts(2))]

    def generate_with(model, params):
        return Generator(model, tokenizer, rows=4)(params, requests)

    unmerged, merged, plain = (
        generate_with(*one) for one in ((model, whole), (base, fold(whole, config)), tiny[:2])
    )
    for a, b, c in zip(unmerged, merged, plain):
        assert (
            [x.tokens.tolist() for x in a]
            == [x.tokens.tolist() for x in b]
            != [x.tokens.tolist() for x in c]
        )


@pytest.mark.parametrize(("end", "found"), [("<|im_end|>", (258, 272)), (" \n", (258,))])
def test_an_end_of_turn_need_not_be_called_special(end, found):
    tokenizer = load_tokenizer("byte")
    tokenizer.add_tokens([end])  # a token of its own, not special
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", end)
    assert generate.stop_tokens(tokenizer) == found


def test_a_special_token_stops_as_a_string():
    tokenizer = load_tokenizer("byte")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    tokens = [*tokenizer.encode("ab", add_special_tokens=False), end, *b"cd"]
    assert generate.find_stop(tokenizer, (), tokens, ("<|end|>",)) == (3, "ab")
    assert generate.find_stop(tokenizer, (), tokens, ("b", "<|end|>")) == (2, "a")
    assert generate.find_stop(tokenizer, (), tokens[:2], ("<|end|>",)) is None
