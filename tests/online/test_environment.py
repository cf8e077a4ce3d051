# SPDX-License-Identifier: Apache-2.0
"""Episodes of several turns: the very tokens that were sampled, masks on all else, and mistakes
that name the place."""

import dataclasses
import functools
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rollout import CONFIG, EXAMPLES, REWARDS, equal, make_config, vowels

from align_jax import losses
from align_jax.core import config as configs
from align_jax.core.options import Config, RolloutOptions, ServerOptions
from align_jax.core.schema import Example
from align_jax.data import chat
from align_jax.data.tokenizer import load_tokenizer, pad_id
from align_jax.inference import decoding, generate
from align_jax.inference.engines import Local, Server
from align_jax.inference.generate import Generator, Request
from align_jax.inference.samplers import Sampling
from align_jax.interop import hf
from align_jax.losses.logprobs import token_outputs
from align_jax.losses.objective import Inputs
from align_jax.models.model import build
from align_jax.online import rewards, tools
from align_jax.online.environment import Reply, make_player, read_reply
from align_jax.online.rollout import RolloutMaker, Rollouts, Weights, make_rollouts
from align_jax.online.sampling import Prompts, PromptSampler
from align_jax.parallel.mesh import make_mesh
from align_jax.runs.weights import load_model

TOKENIZER = load_tokenizer("byte")
CHAT = [
    Example(
        ({"role": "user", "content": f"{i}" + "x" * (i % 3)},),
        (),
        source=f"data.jsonl:{i + 1}",
        extras={"gold": f"g{i}"},
    )
    for i in range(6)
]
ENVIRONMENT_REWARDS = rewards.WeightedRewards(
    (("vowels", 1.0, vowels), ("environment", 2.0, rewards.environment()))
)


class Game:
    """Says how many turns there were and ends after three, each worth a tenth of its number."""

    def __init__(self, gold, seed):
        self.gold, self.seed, self.turn = gold, seed, 0

    def step(self, said):
        self.turn += 1
        assert isinstance(said, str) and self.gold[0] == "g" and isinstance(self.seed, int)
        return f"{self.turn}{self.gold}", self.turn == 3, self.turn / 10


class Uneven(Game):
    """Ends after one turn, or goes on for all of them, by what was said first."""

    first = None

    def step(self, said):
        self.first = said if self.first is None else self.first
        reply, _, reward = super().step(said)
        return reply * (1 + self.turn % 2), len(self.first) % 2 == 0, reward


def over(said):
    """Ends each episode at once."""


def go_on(said):
    return "!"


async def tool(said):
    return Reply("7", role="tool")


@pytest.fixture(scope="module")
def models():
    policy = build(CONFIG, compute_dtype="float32", remat="none", heads=("value",), unembed=True)
    params = jax.jit(policy.init)(jax.random.key(0))
    return policy, policy, Weights(params, params)


class Recorded:
    """An engine that keeps what it was asked and what it gave."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []

    def __call__(self, requests, report=None):
        self.calls.append((list(requests), self.engine(requests)))
        return self.calls[-1][1]

    def stream(self, request):
        return self.engine.stream(request)

    def update(self, params):
        self.engine.update(params)

    def release(self):
        pass


def make(models, name="grpo", *, examples=CHAT, scored=REWARDS, engine=None, keep=0, **keywords):
    """Make a source of rollouts and its recorded engine; contexts are of at most 56 tokens."""
    keywords = {"max_new_tokens": 40, "max_turn_tokens": 6, "temperature": 1.0} | keywords
    if not keywords.get("environment"):
        del keywords["max_turn_tokens"]
    config = make_config(name, **keywords)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    prompts = Prompts(
        examples, TOKENIZER, max_length=56, max_new_tokens=config.options.max_new_tokens
    )
    policy, reference, weights = models
    generator = Generator(
        policy, TOKENIZER, rows=8, max_length=56, mesh=mesh, prompt_bucket=16, keep=keep
    )
    recorded = Recorded(engine or Local(generator, weights.policy))
    player = make_player(
        config.options,
        TOKENIZER,
        examples,
        longest=prompts.longest,
        max_length=56,
        rewarded=scored.of_environment,
    )
    sampler = PromptSampler(config.options, recorded, scored, player)
    pad = pad_id(TOKENIZER)
    maker = RolloutMaker(config, prompts, sampler, pad, policy, reference, mesh)
    return Rollouts(maker), recorded


PLAYED = dict(environment="test_environment:Game", scored=ENVIRONMENT_REWARDS)


def rows_of(batch):
    """Yield each plain row's tokens and mask, without the padding."""
    for row in range(len(batch.tokens)):
        real = batch.segment_ids[row] > 0
        yield batch.tokens[row][real], batch.loss_mask[row][real]


def spoken(calls):
    """Return each episode's turns, (context, answer); all have as many."""
    turns = [
        [(request.prompt, one) for request, several in zip(*call) for one in several]
        for call in calls
    ]
    return list(zip(*turns))


@pytest.mark.parametrize("layout", ["plain", "shared_prefix"])
def test_a_row_holds_what_was_sampled_and_only_that_is_learned(models, layout):
    source, recorded = make(models, layout=layout, **PLAYED)
    batch = source.next(lambda: models[2])
    assert len(recorded.calls) == 3 and source.metrics["environment/turns"] == 3
    told = spoken(recorded.calls)
    sampled = sorted(b"".join(one.tokens.tobytes() for _, one in turns) for turns in told)
    learned = []
    for row in range(len(batch.tokens)):
        for slot in range(source.shape.slots):
            own = batch.loss_mask[row] & (batch.slot[row] == slot)
            learned.append(batch.tokens[row][own].tobytes())
    assert sorted(learned) == sampled
    assert batch.lengths.sum() == batch.loss_mask.sum() == sum(map(len, sampled)) // 4
    for field in ("advantages", "old_token_logps"):
        assert not getattr(batch, field)[~batch.loss_mask].any()
    if layout == "plain":  # the last context with the last answer is the row
        whole = {(*turns[-1][0], *turns[-1][1].tokens.tolist()) for turns in told}
        assert {tuple(tokens.tolist()) for tokens, _ in rows_of(batch)} == whole
        text = TOKENIZER.decode(next(iter(whole)))
        assert re.search(
            r"<\|end\|><\|user\|>1g\d<\|end\|><\|assistant\|>.*<\|user\|>2g\d", text, re.DOTALL
        )
    # the rewards of the turns are summed, and weighed
    given = source.metrics["rewards/environment"]
    assert given == pytest.approx(0.6)
    assert source.metrics["reward"] == pytest.approx(source.metrics["rewards/vowels"] + 2 * given)


def test_loss_and_gradient_are_those_of_the_answers_tokens_alone(models):
    policy, _, weights = models
    source, recorded = make(models, objective={"loss_type": "dapo"}, **PLAYED)
    batch = source.next(lambda: weights)
    terms = losses.resolve("grpo", {"loss_type": "dapo"})

    def ours(params):
        hidden, _ = policy.hidden(params, batch.tokens, batch.segment_ids, batch.positions, None)
        unembed = functools.partial(policy.unembed, params)
        outputs = token_outputs(hidden, unembed, batch, chunk=64)
        return losses.total(terms, Inputs(batch=batch, policy=outputs)).loss

    told = spoken(recorded.calls)
    contexts = [(*turns[-1][0], *turns[-1][1].tokens.tolist()) for turns in told]
    tokens = np.zeros((len(told), max(map(len, contexts))), np.int32)
    for row, ids in enumerate(contexts):
        tokens[row, : len(ids)] = ids
    # row, place and advantage of each token that the model said
    scores = {tuple(ids.tolist()): row for row, (ids, _) in enumerate(rows_of(batch))}
    scores = [batch.scores.reshape(-1)[scores[ids]] for ids in contexts]
    said = []
    for row, turns in enumerate(told):
        group = np.array(scores[row // 4 * 4 : row // 4 * 4 + 4])
        advantage = (scores[row] - group.mean()) / (group.std(ddof=1) + 1e-4)
        for context, answer in turns:
            said += [(row, len(context) + k, advantage) for k in range(len(answer.tokens))]
    rows, places, advantages = (np.array(x) for x in zip(*said))

    def by_hand(params):
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        ones = jnp.ones(tokens.shape, jnp.int32)
        hidden, _ = policy.hidden(params, jnp.asarray(tokens), ones, index, None)
        logps = jax.nn.log_softmax(policy.unembed(params, hidden), axis=-1)
        logp = logps[rows, places - 1, tokens[rows, places]]
        ratio = jnp.exp(logp - jax.lax.stop_gradient(logp))
        return -(jnp.asarray(advantages, jnp.float32) * ratio).sum() / len(said)

    batch = jax.tree.map(jnp.asarray, batch)
    loss, grads = jax.jit(jax.value_and_grad(ours))(weights.policy)
    expected, hand = jax.jit(jax.value_and_grad(by_hand))(weights.policy)
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, hand)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads)) > 1e-3


@pytest.mark.parametrize("examples", [CHAT, EXAMPLES], ids=["chat", "text"])
def test_one_turn_is_the_rollout_without_an_environment_bit_for_bit(models, examples):
    plain, _ = make(models, examples=examples, max_new_tokens=6)
    turns, _ = make(
        models,
        examples=examples,
        max_new_tokens=6,
        max_turn_tokens=0,
        environment="test_environment:over",
    )
    for _ in range(2):
        a, b = plain.next(lambda: models[2]), turns.next(lambda: models[2])
        assert equal(a, b)
    known = {name for name in plain.metrics if not name.startswith("rollout/")}
    assert all(plain.metrics[name] == turns.metrics[name] for name in known)


def test_a_kept_cache_draws_what_a_prefill_draws(models, monkeypatch):
    """Also where episodes end in different turns."""
    monkeypatch.setattr(generate, "_TIMES_FASTER", 0)
    times = {"prefill": 0, "extend": 0}
    for name in times:

        def counted(made, name, *arguments, **keywords):
            times[name] += 1
            return made(*arguments, **keywords)

        wrapped = functools.partial(counted, getattr(decoding, name), name)
        monkeypatch.setattr(decoding, name, wrapped)
    options = PLAYED | {"environment": "test_environment:Uneven"}
    found = []
    for keep in (0, 72):
        source, _ = make(models, keep=keep, max_turns=4, batch_size=2, **options)
        found.append(source.next(lambda: models[2]))
    assert times == {"prefill": 3 + 1, "extend": 2}  # of three turns
    plain, kept = found
    np.testing.assert_array_equal(plain.tokens, kept.tokens)
    np.testing.assert_array_equal(plain.loss_mask, kept.loss_mask)
    np.testing.assert_allclose(plain.old_token_logps, kept.old_token_logps, atol=1e-5)


def test_resuming_within_a_rollout_is_exact_and_samples_keep_their_turns(models, tmp_path):
    options = PLAYED | dict(objective={"epochs": 2, "minibatches": 2, "kl_coef": 0.0})
    weights = lambda: models[2]  # noqa: E731
    through, _ = make(models, "rloo", batch_size=1, **options)
    batches = [through.next(weights) for _ in range(6)]
    stopped, _ = make(models, "rloo", batch_size=1, **options)
    for _ in range(3):
        stopped.next(weights)
    state = json.loads(json.dumps(stopped.save(tmp_path, 3)))
    resumed, _ = make(models, "rloo", batch_size=1, **options)
    resumed.restore(tmp_path, state)
    assert state["file"] and all(equal(resumed.next(weights), one) for one in batches[3:])
    resumed.log_samples(tmp_path, 6)
    resumed.close()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    roles = ["assistant", "user", "assistant", "user", "assistant", "user"]
    assert [turn["role"] for turn in lines[0]["turns"]] == roles and lines[0]["done"]
    assert lines[0]["turn_rewards"] == [0.1, 0.2, 0.3]
    assert lines[0]["turns"][1]["content"] in lines[0]["output"]


def test_nothing_is_compiled_after_the_second_turn(models):
    source, recorded = make(models, environment="test_environment:go_on", max_turns=5)
    sizes = []
    whole = Recorded.__call__

    def counted(self, requests, report=None):
        found = whole(self, requests, report)
        sizes.append((decoding.prefill._cache_size(), decoding.decode._cache_size()))
        return found

    Recorded.__call__ = counted
    try:
        for _ in range(2):
            source.next(lambda: models[2])
    finally:
        Recorded.__call__ = whole
    assert len(sizes) >= 6 and len(set(sizes[1:])) == 1


class Asked:
    """A server's client that answers from a generator, in the protocol's own form."""

    url = "http://stub"

    def __init__(self, engine):
        self.engine = engine

    def post(self, path, body, most=0):
        request = Request(
            tuple(body["prompt"]),
            body["n"],
            body["max_tokens"],
            Sampling(body["temperature"]),
            body["seed"],
            tuple(body["stop"]),
            (40, 6),
        )
        [several] = self.engine([request])
        return {
            "choices": [
                {
                    "index": i,
                    "finish_reason": one.finish,
                    "logprobs": {
                        "tokens": [f"token_id:{token}" for token in one.tokens],
                        "token_logprobs": [float(min(x, 0)) for x in one.token_logps],
                    },
                }
                for i, one in enumerate(several)
            ]
        }

    def excerpt(self, answer):
        return str(answer)[:80]


def test_a_server_plays_the_same_episodes(models):
    local, recorded = make(models, **PLAYED)
    batch = local.next(lambda: models[2])
    recorded.engine.update(models[2].policy)
    options = dataclasses.replace(
        RolloutOptions().server, url="http://localhost:1", model="m", weights="w"
    )
    server = Server(options, TOKENIZER, export=lambda folder, params: None)
    server._client = Asked(recorded.engine)
    server.update = lambda params: None
    other, _ = make(models, engine=server, **PLAYED)
    found = other.next(lambda: models[2])
    assert equal(batch._replace(old_token_logps=None), found._replace(old_token_logps=None))
    np.testing.assert_allclose(batch.old_token_logps, found.old_token_logps, atol=1e-5)


@pytest.mark.parametrize(
    "turns, tokens, metrics",
    [
        (2, 40, {"environment/turns": 2, "environment/unfinished": 1, "environment/no_room": 0}),
        # an answer of up to 6 tokens and a reply of 5: the second reply leaves no room
        (8, 16, {"environment/unfinished": 1, "environment/no_room": 1}),
    ],
)
def test_limits_end_an_episode_and_are_counted(models, turns, tokens, metrics):
    source, _ = make(
        models, environment="test_environment:go_on", max_turns=turns, max_new_tokens=tokens
    )
    batch = source.next(lambda: models[2])
    found = source.metrics
    assert metrics.items() <= found.items() and found["completions/clipped_ratio"] == 1
    assert all(len(row) <= 16 + tokens for row, _ in rows_of(batch))
    lengths = np.array([mask.sum() for _, mask in rows_of(batch)])
    assert found["completions/mean_length"] == pytest.approx(lengths.mean())
    # nothing stands behind the last answer
    assert all(mask[-1] for _, mask in rows_of(batch))
    assert 0 < found["environment/tokens_share"] < 1
    kept, _ = make(
        models, environment="test_environment:go_on", max_turns=turns, keep_unfinished=False
    )
    assert not kept.next(lambda: models[2]).loss_mask.any()


def test_plain_text_goes_on_as_it_is(models):
    source, recorded = make(
        models, examples=EXAMPLES, environment="test_environment:go_on", max_turns=3
    )
    source.next(lambda: models[2])
    first, (requests, _), *_ = recorded.calls
    prompt, answer = first[0][0].prompt, first[1][0][0]
    assert requests[0].prompt == (*prompt, *answer.tokens.tolist(), ord("!"))
    one = source._now.samples[0]
    assert one["output"] == "".join(turn["content"] for turn in one["turns"][:5])


def test_a_reply_is_a_turn_of_the_template_and_an_end_is_not_written_twice():
    reply = {"role": "tool", "content": "7"}

    def text(end):
        return TOKENIZER.decode(chat.encode_reply(CHAT[0], TOKENIZER, reply, end))

    assert text("") == "<|end|><|tool|>7<|end|><|assistant|>"
    assert text("<|end|>") == "<|tool|>7<|end|><|assistant|>"
    plain = load_tokenizer(
        "byte",
        chat_template="{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}\n"
        "{% endif %}{% endfor %}",
    )
    with pytest.raises(chat.RowError, match="does not render the reply: .*tool"):
        chat.encode_reply(CHAT[0], plain, reply)


def test_rewards_see_the_whole_response_and_its_turns(models):
    seen = []

    def watched(prompts, completions, extras):
        seen.extend(zip(completions, extras))
        return [0.1 * i for i in range(len(completions))]

    scored = rewards.WeightedRewards((("watched", 1.0, watched),))
    make(models, environment="test_environment:tool", max_turns=2, scored=scored)[0].next(
        lambda: models[2]
    )
    text, row = seen[0]
    first, reply, last = row["turns"][:3]
    assert text == f"{first['content']}\n7\n{last['content']}" and reply["role"] == "tool"
    assert row["environment_reward"] is None and row["finished"] is False


@pytest.mark.parametrize(
    "returned, said",
    [
        (3, r"returned 3 \(a int\); expected a text"),
        (("a", 1), "done = 1; expected True or False"),
        (("a", False, float("nan")), "the reward nan; expected a finite number"),
        (("a", False, None, "usr"), "the role 'usr'; expected one of user, tool, system"),
        ("", "an empty text, and not that the episode is over"),
        ((), "returned 0 values"),
        ({"text": "a"}, r"a dict"),
    ],
)
def test_what_an_environment_returns_is_read(returned, said):
    with pytest.raises(ValueError, match=said):
        read_reply(returned)


def test_replies_have_short_forms():
    assert read_reply(None) == Reply(done=True) and read_reply("a") == Reply("a")
    assert read_reply(("", np.True_, np.float32(0.5))) == Reply("", True, 0.5)


# an answer, and what the calculator says to it
CALLS = [
    ("The sum is 7.", None),
    ('{"expression": "3 * (4 + 1)"}', "15"),
    ('{"expression": "2 ** 0.5"}', "1.414213562"),
    ('{"expression": "1 / 0"}', "error: ZeroDivisionError: "),
    ('{"expression": "9 ** 9 ** 9 ** 9"}', "error: OverflowError"),
    ('{"expression": "(-8) ** 0.5"}', "error: it is no finite number"),
    ('{"expression": "__import__(\'os\').abort()"}', "error: expected numbers and"),
    ('{"expression": "' + "-" * 300 + '1"}', "error: expected at most 200 characters"),
    ('{"expression": 3}', 'error: there is only calculator, of one "expression"'),
    ('{"expression": ', "error: the tool call is not JSON"),
]


@pytest.mark.parametrize("arguments, said", CALLS)
def test_a_calculator_answers_calls_and_an_answer_without_one_ends_the_episode(arguments, said):
    call = f'<tool_call>{{"name": "calculator", "arguments": {arguments}}}</tool_call>'
    reply = tools.calculator(arguments if said is None else f"Let me see. {call}")
    if said is None:
        assert reply is None
    else:
        assert reply.role == "tool" and reply.text.startswith(said) and not reply.done


def test_several_calls_are_answered_in_one_turn_and_numbers_are_compared_as_the_reward_does():
    call = '<tool_call>{{"name": "calculator", "arguments": {{"expression": "{}"}}}}</tool_call>'
    assert tools.calculator(call.format("1+1") + "\n" + call.format("2*2")).text == "2\n4"
    again = tools.SecondTry("9 * 2 = 18 #### 18")
    assert again.step("so it is 17") == again.WORDS and again.step("The answer is $18.") is None


def no_answer(gold):
    return gold


def wants_more(said, god):
    return god


class NoStep:
    pass


@pytest.mark.parametrize(
    "path, said",
    [
        ("test_environment", "an environment is named 'module:function'"),
        ("test_environment:game", "no function or class 'game'; did you mean 'Game'"),
        ("test_environment:CHAT", "is a list; expected a function or class"),
        ("test_environment:no_answer", r"takes \(gold\); expected \(said, \*\*columns\)"),
        ("test_environment:NoStep", r"no method step\(self, said\)"),
        ("test_environment:wants_more", r"data.jsonl:1.*'god'.*did you mean 'gold'"),
    ],
)
def test_an_environment_is_checked_before_anything_is_compiled(path, said):
    options = RolloutOptions(environment=path)
    with pytest.raises(ValueError, match=said):
        make_player(options, TOKENIZER, CHAT, longest=9, max_length=56, rewarded=False)


def test_an_answer_ends_with_the_tokens_of_tokenizer_and_checkpoint():
    options, lengths = RolloutOptions(environment="test_environment:Game"), dict(longest=9)
    lengths |= dict(max_length=56, rewarded=False)
    player = make_player(options, TOKENIZER, CHAT, **lengths, end_tokens=(5,))
    assert player.ends == (5, TOKENIZER.eos_token_id)


def test_a_rollout_s_server_and_environment_know_the_policys_end_tokens():
    policy = build(dataclasses.replace(CONFIG, end_tokens=(5,)), compute_dtype="float32")
    server = ServerOptions("http://127.0.0.1:9", "policy")
    source = make_rollouts(
        make_config("grpo", environment="test_environment:Game", server=server),
        Config(max_length=56),
        CHAT,
        TOKENIZER,
        policy=policy,
        reference=policy,
        mesh=make_mesh({"data": 1}, jax.devices()[:1]),
        load_model=load_model,
        export=hf.save,
    )
    sampler = source._maker.sampler
    assert sampler.player.ends == sampler.engine._stop_ids == (5, TOKENIZER.eos_token_id)


def divides(said, gold):
    return 1 / 0 if gold == "g2" else "fine"


def test_what_an_environment_raises_names_it_the_row_the_sample_and_the_turn(models):
    source, _ = make(models, environment="test_environment:divides", max_turns=2)
    place = r"'test_environment:divides' at data.jsonl:3, sample 0, turn 1 \(answer '.*'\)"
    with pytest.raises(ValueError, match=rf"{place}: ZeroDivisionError: .*test_environment.py:\d+"):
        for _ in range(3):
            source.next(lambda: models[2])
    source, _ = make(models, environment="test_environment:Game")
    with pytest.raises(ValueError, match="name the reward 'environment' in config.rewards"):
        source.next(lambda: models[2])


def waits(said):
    time.sleep(60)


def test_an_environment_that_does_not_return_is_ended_and_named(models):
    source, _ = make(models, environment="test_environment:waits", environment_seconds=0.5)
    said = r"'test_environment:waits' at data.jsonl:\d, sample 0, turn 1: no reply within rollout"
    with pytest.raises(TimeoutError, match=rf"{said}.*= 0.5; it is at .*test_environment.py:\d+"):
        source.next(lambda: models[2])


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"max_turns": 3}, "max_turns = 3 has no effect without rollout.environment"),
        ({"environment": "a:b", "max_turn_tokens": 300}, "expected at most max_new_tokens = 256"),
        ({"environment": "a:b", "max_turns": 0}, "max_turns"),
        ({"environment_seconds": 5.0}, "environment_seconds = 5.0 has no effect"),
    ],
)
def test_limits_that_mean_nothing_are_refused(keys, said):
    config = configs.defaults()
    config.total_steps = 1
    config.rollout.update(keys)
    with pytest.raises(ValueError, match=said):
        configs.read(config)
    with pytest.raises(ValueError, match="set config.rollout.environment"):
        make_player(RolloutOptions(), TOKENIZER, CHAT, longest=9, max_length=56, rewarded=True)
