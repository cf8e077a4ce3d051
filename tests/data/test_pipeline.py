# SPDX-License-Identifier: Apache-2.0
"""A batch is a pure function of (seed, step), and its arrays say what the examples say."""

import collections
import dataclasses

import numpy as np
import pytest

from align_jax.core.options import DataOptions
from align_jax.core.schema import Batch, Example
from align_jax.data import chat, datasets, encoding, formats, packing, pipeline, tokenizer
from align_jax.data import layout as layouts
from align_jax.data.layout import BatchSizes

LAYOUTS = ("plain", "packed", "shared_prefix")


@pytest.fixture(scope="module")
def byte():
    return tokenizer.load_tokenizer("byte")


def load(name, kind, size=44, seed=0):
    spec = f"builtin:{name}:train?size={size}"
    return datasets.load(spec, kind, DataOptions(), chat=True, seed=seed)


@pytest.fixture(scope="module")
def pairs():
    return load("preferences", "pairs")


def make(
    examples,
    tok,
    batch_size=8,
    max_length=128,
    row_length=0,
    row_multiple=1,
    attention_cost=0.0,
    **options,
):
    sizes = BatchSizes(batch_size, max_length, row_length, row_multiple, attention_cost)
    names = [field.name for field in dataclasses.fields(DataOptions)]
    data = {name: options.pop(name) for name in names if name in options}
    data = DataOptions(**{"trim": False, "layout": "plain", **data})
    return pipeline.make_pipeline(examples, tok, data, sizes, **{"seed": 3, **options})


def examples_of(pipe, step):
    """Return the numbers of the examples in a step's batch."""
    return [number for number in pipe.batch(step).example_index.tolist() if number >= 0]


def of_texts(*texts, kind="pairs"):
    """Examples of plain texts: (prompt, response, ...)."""
    items = tuple(
        Example(prompt, responses, source=f"t:{i}")
        for i, (prompt, *rest) in enumerate(texts)
        for responses in [tuple(rest)]
    )
    return datasets.Examples(kind, items, (len(items),), None, "texts", {})


def assert_same(left, right):
    for name, a, b in zip(left._fields, left, right):
        assert (a is None) == (b is None), name
        if isinstance(a, Batch):
            assert_same(a, b)
        elif a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, err_msg=name)


def groups_of(batch):
    """Read a batch back: example -> (prompt and response tokens, learned tokens) of each
    response."""
    found = {}
    slots = batch.lengths.size // len(batch.tokens)
    for group, example in enumerate(batch.example_index.tolist()):
        for index in range(batch.lengths.shape[1]) if example >= 0 else ():
            row, slot = divmod(group * batch.lengths.shape[1] + index, slots)
            mine = batch.loss_mask[row] & (batch.slot[row] == slot)
            segment = batch.segment_ids[row] == batch.segment_ids[row][mine][0]
            seen = (
                segment
                if batch.prefix_ids is None
                else segment | (batch.segment_ids[row] == batch.prefix_ids[row][mine][0])
            )
            order = np.argsort(batch.positions[row][seen], kind="stable")
            assert batch.positions[row][seen][order].tolist() == list(range(seen.sum()))
            assert mine.sum() == batch.lengths[group, index]
            assert batch.last_index[group, index] == np.flatnonzero(mine)[-1]
            found.setdefault(example, []).append(
                (batch.tokens[row][seen][order].tolist(), batch.tokens[row][mine].tolist())
            )
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_depends_on_the_step_alone(byte, pairs, layout):
    pipe, again = (make(pairs, byte, layout=layout) for _ in range(2))
    iterator = pipe.iterator(7)
    for step in range(7, 12):
        batch = next(iterator)
        assert_same(batch, pipe.batch(step))
        assert_same(batch, again.batch(step))
    assert (
        groups_of(make(pairs, byte, layout=layout, seed=4).batch(7)).keys()
        != groups_of(pipe.batch(7)).keys()
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_hold_what_was_tokenized(byte, pairs, layout):
    pipe = make(pairs, byte, layout=layout, row_length=512)
    for step in range(3):
        for number, responses in groups_of(pipe.batch(step)).items():
            tokens = chat.encode(pairs[number], byte)
            assert [whole for whole, _ in responses] == [
                tokens.prompt + ids for ids in tokens.responses
            ]
            assert [learned for _, learned in responses] == list(tokens.responses)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_is_predicted_from_the_one_before_it(byte, pairs, layout):
    batch = make(pairs, byte, layout=layout).batch(0)
    for row in range(len(batch.tokens)):
        for t in batch.loss_index[row][batch.loss_index[row] < batch.tokens.shape[1]]:
            source = batch.source_index[row, t]
            assert source < t and batch.positions[row, source] == batch.positions[row, t] - 1
            assert batch.segment_ids[row, source] in (
                batch.segment_ids[row, t],
                0 if batch.prefix_ids is None else batch.prefix_ids[row, t],
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_index_lists_the_mask_and_its_budget_is_exact(byte, pairs, layout):
    pipe = make(pairs, byte, layout=layout, batch_size=44, once=True)
    batch = pipe.batch(0)
    width = batch.tokens.shape[1]
    for row, indices in enumerate(batch.loss_index):
        assert indices[indices < width].tolist() == np.flatnonzero(batch.loss_mask[row]).tolist()
    assert pipe.shape.loss_positions == layouts.loss_budget(
        int(batch.loss_mask.sum(1).max()), width
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_sees_every_example_once(byte, pairs, layout, shuffle):
    pipe = make(pairs, byte, layout=layout, batch_size=4, shuffle=shuffle)
    units = (
        pipe.num_examples
        if layout == "plain"
        else round(pipe.num_examples / pipe.report["groups_per_step"] * pipe.shape.rows)
    )
    in_step = pipe.shape.groups if layout == "plain" else pipe.shape.rows
    assert pipe.steps_per_epoch == units // in_step
    epochs = 2 * in_step  # after so many epochs the steps come out even
    seen = collections.Counter(n for step in range(2 * units) for n in examples_of(pipe, step))
    assert seen == dict.fromkeys(range(len(pairs)), epochs)
    first = [examples_of(pipe, step) for step in range(3)]
    if layout == "plain":
        assert (sorted(sum(first, [])) == sum(first, [])) == (not shuffle)


def test_epochs_are_shuffled_differently(byte, pairs):
    pipe = make(pairs, byte, batch_size=44)
    assert sorted(examples_of(pipe, 0)) == sorted(examples_of(pipe, 1)) == list(range(44))
    assert examples_of(pipe, 0) != examples_of(pipe, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind, mismatched", [("pairs", False), ("unpaired", True)])
def test_processes_share_one_global_batch(byte, layout, kind, mismatched):
    examples = load("preferences", kind, seed=1)
    whole = make(examples, byte, layout=layout, mismatched=mismatched, row_multiple=4)
    parts = [
        make(
            examples,
            byte,
            layout=layout,
            mismatched=mismatched,
            row_multiple=4,
            process_index=i,
            process_count=4,
        )
        for i in range(4)
    ]

    def join(*values):
        return (
            None
            if values[0] is None
            else (
                Batch(*map(join, *values))
                if isinstance(values[0], Batch)
                else np.concatenate(values)
            )
        )

    for step in (0, 9):
        assert_same(join(*[part.batch(step) for part in parts]), whole.batch(step))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name, kind, mismatched",
    [
        ("preferences", "pairs", False),
        ("unpaired", "unpaired", True),
        ("ranked", "ranked", False),
        ("completions", "completions", False),
    ],
)
def test_the_abstract_batch_has_the_shapes_of_a_real_one(byte, layout, name, kind, mismatched):
    pipe = make(load(name, kind), byte, layout=layout, mismatched=mismatched)

    def compare(real, abstract):
        for field, a, b in zip(real._fields, real, abstract):
            assert (a is None) == (b is None), field
            if isinstance(a, Batch):
                compare(a, b)
            elif a is not None:
                assert (a.shape, a.dtype) == (b.shape, b.dtype), field

    compare(pipe.batch(0), pipe.abstract())
    s = pipe.shape
    assert s.groups * s.responses == s.rows * s.slots
    mean = 0.0 if layout == "plain" else pipe.report["groups_per_step"] / s.rows
    planned = layouts.batch_shape(
        DataOptions(layout=layout, groups_per_row=mean),
        BatchSizes(8, 128, 0 if layout == "plain" else s.length),
        s.responses,
        loss_positions=s.loss_positions,
    )
    assert planned == s


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_is_one_pass_filled_up_with_groups_of_weight_zero(byte, pairs, layout):
    pipe = make(pairs, byte, layout=layout, once=True, batch_size=16)
    batches = list(pipe.iterator())
    assert len(batches) == pipe.steps_per_epoch
    assert sorted(n for batch in batches for n in groups_of(batch)) == list(range(44))
    last = batches[-1]
    fillers = last.example_index == packing.FILLER
    assert fillers.any() and not last.weight[fillers].any() and not last.lengths[fillers].any()
    assert (last.weight[~fillers] == 1).all() and (
        last.loss_index[-1] == last.tokens.shape[1]
    ).all()
    with pytest.raises(IndexError, match="the data ends after"):
        pipe.batch(pipe.steps_per_epoch)


def mismatches(texts, tok, *, seed=3, **options):
    """Return each example's words with the response that its prompt gets, and its loss tokens."""
    pipe = make(
        of_texts(*texts, kind="unpaired"),
        tok,
        batch_size=len(texts),
        mismatched=True,
        seed=seed,
        **options,
    )
    batch = pipe.batch(0)
    extra, found = batch.mismatched, {}
    for number, tokens, ids, mask in zip(
        batch.example_index.tolist(), extra.tokens, extra.segment_ids, extra.loss_mask
    ):
        prompt, response = tok.decode(tokens[(ids > 0) & ~mask]), tok.decode(tokens[mask])
        if number >= 0:
            found[texts[number]] = (prompt, response.removesuffix("<|end|>"))
    return found


PAIRED = [(f"{name}:", f" {kind} {name}") for name in "abcdefgh" for kind in ("good", "bad")]


@pytest.mark.parametrize("once", [False, True])
def test_every_response_meets_another_prompt_once_whatever_the_rows_order(byte, once):
    found = mismatches(PAIRED, byte, once=once)
    assert all(found[row][0] == row[0] and row[0][0] != found[row][1][-1] for row in PAIRED)
    assert sorted(got for _, got in found.values()) == sorted(words for _, words in PAIRED)
    assert mismatches(PAIRED[::-1], byte, once=once) == found
    assert mismatches(PAIRED, byte, once=once, seed=4) != found


def test_a_batch_of_one_prompt_finds_partners_elsewhere(byte):
    texts = [("a:", f" {i}") for i in range(6)] + [("b:", " x"), ("b:", " y")]
    pipe = make(
        of_texts(*texts, kind="unpaired"), byte, batch_size=2, mismatched=True, shuffle=False
    )
    for step in range(4):
        extra = pipe.batch(step).mismatched
        for tokens, mask, ids in zip(extra.tokens, extra.loss_mask, extra.segment_ids):
            prompt, response = byte.decode(tokens[(ids > 0) & ~mask]), byte.decode(tokens[mask])
            assert (prompt == "a:") == (response[1] in "xy")


@pytest.mark.parametrize("words", [" one", " one" * 11])
def test_a_mismatched_pair_that_does_not_fit_gives_way_or_is_shortened(byte, words):
    texts = [("a" * 40 + ":", " x"), ("b:", " y" * 20), ("c:", words)]
    found = mismatches(texts, byte, max_length=50, truncation="drop")
    prompt, response = found[texts[0]]
    assert prompt == texts[0][0] and (response == " one" or len(response) == 9)


def test_mismatched_rows_of_fillers_weigh_nothing(byte):
    texts = [("a:", " one"), ("b:", " two"), ("c:", " three")]
    pipe = make(of_texts(*texts, kind="unpaired"), byte, batch_size=4, once=True, mismatched=True)
    extra = pipe.batch(0).mismatched
    assert extra.weight.tolist() == [1, 1, 1, 0] and not extra.loss_mask[3].any()


def test_the_batches_fields_are_the_examples(byte):
    examples = load("ranked", "ranked")
    batch = make(examples, byte).batch(1)
    np.testing.assert_array_equal(
        batch.scores, [examples[n].scores for n in batch.example_index.tolist()]
    )
    labeled = load("unpaired", "unpaired")
    batch = make(labeled, byte).batch(1)
    assert (
        batch.label.tolist() == [labeled[n].label for n in batch.example_index.tolist()]
        and batch.margin is None
    )
    weighted = of_texts(("p:", " a", " b"), ("q:", " c", " d"))
    weighted = dataclasses.replace(
        weighted,
        items=tuple(
            dataclasses.replace(example, margin=1.5, weight=0.25) for example in weighted.items
        ),
    )
    batch = make(weighted, byte, batch_size=2).batch(0)
    assert (
        batch.margin.tolist() == [1.5, 1.5]
        and batch.weight.tolist() == [0.25, 0.25]
        and batch.scores.sum() == 0
    )


def test_rankings_without_scores_have_no_ties(byte):
    ranked = of_texts(("p:", " a", " b", " c"), ("q:", " d", " e", " f"), kind="ranked")
    first = dataclasses.replace(ranked[0], scores=(2.5, 2.5, 0.0))
    batch = make(
        dataclasses.replace(ranked, items=(first, ranked[1])), byte, batch_size=2, shuffle=False
    ).batch(0)
    assert batch.scores.tolist() == [[2.5, 2.5, 0.0], [2.0, 1.0, 0.0]]


def test_control_tokens_stand_before_responses_and_are_not_learned(byte):
    examples = of_texts(("p:", " good", " bad"))
    control = (tokenizer.CHOSEN, tokenizer.REJECTED)
    for layout in LAYOUTS:
        batch = make(examples, byte, batch_size=1, layout=layout, control_tokens=control).batch(0)
        (responses,) = groups_of(batch).values()
        assert [byte.decode(whole) for whole, _ in responses] == [
            "p:<|chosen|> good<|end|>",
            "p:<|rejected|> bad<|end|>",
        ]
        assert [byte.decode(learned) for _, learned in responses] == [" good<|end|>", " bad<|end|>"]
    labeled = of_texts(("p:", " bad"), kind="unpaired")
    labeled = dataclasses.replace(labeled, items=(dataclasses.replace(labeled[0], label=False),))
    batch = make(labeled, byte, batch_size=1, control_tokens=control).batch(0)
    assert byte.decode(batch.tokens[0][batch.segment_ids[0] > 0]) == "p:<|rejected|> bad<|end|>"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sources_are_mixed_by_weight(byte, layout):
    specs = ["builtin:preferences:train?size=64", "builtin:preferences:eval?size=16"]
    examples = datasets.load(specs, "pairs", DataOptions(), chat=True, weights=(1.0, 3.0))
    pipe = make(examples, byte, layout=layout, groups_per_row=0.0 if layout == "plain" else 1.0)
    seen = [number for step in range(40) for number in examples_of(pipe, step)]
    assert abs(np.mean(np.array(seen) >= 64) - 0.75) < 0.02
    natural = make(
        dataclasses.replace(examples, weights=None),
        byte,
        layout=layout,
        groups_per_row=0.0 if layout == "plain" else 1.0,
    )
    seen = [number for step in range(40) for number in examples_of(natural, step)]
    assert abs(np.mean(np.array(seen) >= 64) - 0.2) < 0.02


def test_a_source_of_which_nothing_is_left_is_an_error_if_it_has_a_weight(byte):
    examples = dataclasses.replace(
        of_texts(("p" * 200, " a", " b"), ("p:", " a", " b")), ends=(1, 2)
    )
    assert make(examples, byte, batch_size=1, truncation="drop").num_examples == 1
    with pytest.raises(
        ValueError, match="data source 1 of 2 has a weight, but no examples are left"
    ):
        make(
            dataclasses.replace(examples, weights=(1.0, 1.0)), byte, batch_size=1, truncation="drop"
        )


def test_rankings_of_unlike_lengths_are_refused_with_the_option_that_evens_them(byte):
    examples = of_texts(("p:", " a", " b", " c"), ("p:", " a", " b"), kind="ranked")
    with pytest.raises(
        ValueError, match="t:1: 2 responses, expected 3 .*--config.data.responses=2"
    ):
        make(examples, byte, batch_size=1)


def test_what_is_cut_and_dropped_is_counted(byte):
    examples = of_texts(("p" * 40, " a", " b"), ("p:", " a" * 40, " b"), ("p:", " a", " b"))
    report = make(examples, byte, batch_size=1, max_length=32).report
    assert (report["truncated prompts"], report["truncated responses"]) == (1, 1)
    report = make(examples, byte, batch_size=1, max_length=32, truncation="drop").report
    assert report["examples"] == len(examples) - 2  # what is used, not what was read
    assert report["dropped: too long"] == 2 and make(
        examples, byte, batch_size=1, max_length=90
    ).report.keys() == {"examples", "tokens", "padding_fraction", "groups_per_step"}
    batch = make(examples, byte, batch_size=3, max_length=32, shuffle=False).batch(0)
    rows = [byte.decode(row[ids > 0]) for row, ids in zip(batch.tokens, batch.segment_ids)]
    assert (
        rows[2] == "p:" + " a" * 15
        and rows[4] == "p: a<|end|>"
        and rows[0] == "p" * 29 + " a<|end|>"
    )


def test_trim_shortens_rows_to_the_longest_example(byte, pairs):
    assert make(pairs, byte, trim=True).shape.length < make(pairs, byte).shape.length == 128
    longest = max(
        len(chat.encode(e, byte).prompt) + max(map(len, chat.encode(e, byte).responses))
        for e in pairs.items
    )
    assert make(pairs, byte, trim=True).shape.length == -(-longest // 8) * 8


def test_a_start_from_the_cache_reads_no_row_and_no_text(byte, tmp_path, monkeypatch):
    spec, options = "builtin:preferences:train?size=44", DataOptions(cache=str(tmp_path))

    def start(tok=byte):
        examples = datasets.load(spec, "pairs", options, chat=True)
        parts = datasets.hold_out(examples, 0.2, most=0, seed=0, folder=options.cache)
        return [make(part, tok, cache=options.cache, batch_size=4) for part in parts]

    first = start()
    with monkeypatch.context() as patch:
        patch.setattr(chat, "encode_many", None)
        patch.setattr(formats, "read", None)
        again = start()
        with pytest.raises(TypeError, match="'NoneType'"):  # another tokenizer, another key
            start(tokenizer.load_tokenizer("byte", chat_template="{{ messages }}"))
    for left, right in zip(first, again):
        assert_same(left.batch(0), right.batch(0))
        assert left.report == right.report
    assert not again[0]._encoded.prompt_ids.flags.writeable  # mapped


def test_examples_are_read_later_where_only_their_number_was_kept(tmp_path):
    options = DataOptions(cache=str(tmp_path))
    first, again = (
        datasets.load("builtin:preferences:train?size=9", "pairs", options, chat=True)
        for _ in range(2)
    )
    assert again.items._read is not first.items._read and list(again.items) == list(first.items)


def test_several_processes_tokenize_as_one_does(byte, pairs):
    one, two = (
        encoding.encode_all(pairs.items, byte, DataOptions(), processes=count) for count in (1, 2)
    )
    for field in dataclasses.fields(encoding.Encoded):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(two, field.name))


ONE = [("p:", " a", " b")]
ERRORS = [
    (
        {"batch_size": 6, "row_multiple": 4},
        "batch_size 6 is not divisible by 4 .*nearest that are: 4, 8",
    ),
    ({"layout": "packed", "groups_per_row": 0.5}, "groups_per_row = 0.5: expected at least 1"),
    ({"layout": "pack"}, "data.layout = 'pack' is unknown; did you mean 'packed'"),
    ({"truncation": "keep"}, "data.truncation = 'keep' is unknown; did you mean 'keep_"),
    (
        {"layout": "packed", "row_length": 8},
        "row_length = 8 is shorter than the longest group, 10 tokens: --config.row_length=10",
    ),
    (
        {"max_length": 4, "truncation": "drop"},
        "empty after truncation to max_length=4.*too long': 1}; raise --config.max_length",
    ),
    (
        {"mismatched": True},
        "mismatched completions need one response a prompt, these examples have 2",
    ),
    ({"max_prompt_length": 128}, "max_prompt_length = 128: expected less than max_length = 128"),
    ({"control_tokens": ("x",)}, "control_tokens = \\('x',\\): expected 2, one a response"),
    (
        {"layout": "packed", "exact_batch": True, "batch_size": 5, "row_multiple": 2},
        "exact_batch: batch_size 5 is not divisible by 2 .*the next that is: 6",
    ),
]


@pytest.mark.parametrize("options, message", ERRORS)
def test_sizes_that_do_not_fit_are_told(byte, options, message):
    with pytest.raises(ValueError, match=message):
        make(of_texts(*ONE), byte, **options)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_packed_rows_are_full_and_a_step_holds_the_groups_asked_for(byte, layout):
    examples = load("preferences", "pairs", size=400)
    pipe = make(examples, byte, layout=layout, batch_size=32, row_length=512)
    assert pipe.report["padding_fraction"] < 0.17 and abs(pipe.report["groups_per_step"] - 32) < 3
    plain = make(examples, byte, batch_size=32)
    assert pipe.shape.rows * pipe.shape.length < 0.75 * plain.shape.rows * plain.shape.length
    with pytest.raises(
        ValueError, match="batch_size 4 would become 16 rows of .* change row_length, or batch_size"
    ):
        make(examples, byte, layout=layout, batch_size=4, row_length=512, row_multiple=16)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("batch_size, row_multiple", [(8, 1), (24, 4), (64, 8)])
def test_rows_are_as_long_as_a_step_of_the_batch_size_asks(byte, layout, batch_size, row_multiple):
    examples = load("preferences", "pairs", size=400)
    pipe = make(
        examples,
        byte,
        layout=layout,
        batch_size=batch_size,
        row_multiple=row_multiple,
        shuffle=True,
    )
    assert pipe.report["groups_per_step"] == pytest.approx(batch_size, rel=0.01)
    assert pipe.report["padding_fraction"] < 0.25


def test_a_mixture_of_short_and_long_examples_holds_the_groups_asked_for(byte):
    short, long = [("p:", " a", " b")] * 900, [("p" * 20, " a" * 4, " b" * 4)] * 600
    examples = dataclasses.replace(of_texts(*short, *long), ends=(900, 1500), weights=(1.0, 2.0))
    pipe = make(examples, byte, layout="shared_prefix", batch_size=20, shuffle=True)
    counts = [len(examples_of(pipe, step)) for step in range(60)]
    assert np.mean(counts) == pytest.approx(20, rel=0.01) and len(set(counts)) > 1
    assert pipe.report["groups_per_step"] == pytest.approx(20, rel=0.01)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_a_step_holds_exactly_the_groups_asked_for_where_that_is_asked(byte, layout):
    examples = load("preferences", "pairs", size=61)
    pipe = make(
        examples, byte, layout=layout, batch_size=12, row_multiple=2, exact_batch=True, shuffle=True
    )
    per_row = 12 // pipe.shape.rows
    assert {len(examples_of(pipe, step)) for step in range(9)} == {12} and pipe.shape.rows % 2 == 0
    assert pipe.num_examples == 61 - 61 % per_row
    assert pipe.report.get("left out of equal rows", 0) == 61 % per_row
    given = make(
        examples,
        byte,
        layout=layout,
        batch_size=12,
        row_multiple=2,
        exact_batch=True,
        shuffle=True,
        row_length=pipe.shape.length,
    )
    assert_same(given.batch(3), pipe.batch(3))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_a_row_length_that_was_chosen_gives_the_same_batches_when_it_is_given(byte, layout):
    examples = load("preferences", "pairs", size=200)
    chosen = make(examples, byte, layout=layout, batch_size=12, shuffle=True)
    given = make(
        examples, byte, layout=layout, batch_size=12, shuffle=True, row_length=chosen.shape.length
    )
    assert given.shape == chosen.shape
    assert_same(given.batch(7), chosen.batch(7))


@pytest.mark.parametrize(
    "kind, changes, expected",
    [
        ("pairs", {}, "shared_prefix"),
        ("completions", {}, "packed"),
        ("pairs", {"attention_cost": 1.0}, "plain"),  # short rows, whatever they waste
        ("pairs", {"shuffle": False}, "plain"),  # in the data's order
        ("pairs", {"shuffle": False, "row_length": 512}, "shared_prefix"),  # which is asked for
        ("pairs", {"batch_size": 6, "row_multiple": 4}, "shared_prefix"),
        ("completions", {"once": True}, "packed"),
    ],
)
def test_the_layout_is_the_one_that_costs_least(byte, kind, changes, expected):
    name = "preferences" if kind == "pairs" else kind
    options = {"batch_size": 16, "trim": True, "layout": "auto", **changes}
    assert make(load(name, kind, size=200), byte, **options).layout == expected


def test_packed_mismatched_pairs_lie_as_their_groups_do(byte):
    examples = of_texts(*PAIRED, kind="unpaired")
    pipe = make(examples, byte, batch_size=16, layout="packed", row_length=48, mismatched=True)
    batch, found = pipe.batch(0), []
    extra = batch.mismatched
    assert len(extra.tokens) == len(batch.tokens) and (extra.weight == batch.weight).all()
    for group in np.flatnonzero(extra.weight).tolist():
        row, slot = divmod(group, extra.lengths.size // len(extra.tokens))
        mine = extra.loss_mask[row] & (extra.slot[row] == slot)
        segment = extra.segment_ids[row] == extra.segment_ids[row][mine][0]
        found.append((byte.decode(extra.tokens[row][segment & ~mine]), mine.sum()))
        words = PAIRED[batch.example_index[group]]
        assert found[-1][0].startswith(words[0]) and (extra.lengths[group] == mine.sum()).all()
    plain = mismatches(PAIRED, byte)
    assert sorted(prompt for prompt, _ in found) == sorted(prompt for prompt, _ in plain.values())


def test_mismatched_rows_have_room_for_any_prompt_with_any_response(byte):
    texts = [("p" * 60 + ":", " one"), ("q:", " two" * 15)]
    pipe = make(
        of_texts(*texts, kind="unpaired"),
        byte,
        batch_size=2,
        trim=True,
        mismatched=True,
        shuffle=False,
    )
    extra = pipe.batch(0).mismatched
    assert pipe.shape.length == 72 and extra.tokens.shape == (2, 128)
    assert (
        byte.decode(extra.tokens[0][extra.segment_ids[0] > 0])
        == "p" * 60 + ":" + " two" * 15 + "<|end|>"
    )


def test_a_mismatched_response_may_be_longer_than_its_own_prompt_left_room_for(byte):
    texts = [("p" * 200 + ":", " one" * 40), ("q:", " two")]
    pipe = make(
        of_texts(*texts, kind="unpaired"),
        byte,
        batch_size=2,
        max_prompt_length=100,
        mismatched=True,
        shuffle=False,
    )
    batch = pipe.batch(0)
    assert (
        batch.lengths[0, 0] < batch.mismatched.lengths[1, 0] <= batch.mismatched.loss_index.shape[1]
    )


def test_a_single_prompt_has_no_mismatched_completions(byte):
    with pytest.raises(ValueError, match="need two different prompts"):
        make(of_texts(("p:", " a"), ("p:", " b"), kind="unpaired"), byte, mismatched=True)
