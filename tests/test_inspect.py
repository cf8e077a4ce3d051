# SPDX-License-Identifier: Apache-2.0
"""What is shown of a run before it trains is what it trains on, and mistakes are train's."""

import json
import pathlib
import re
import runpy

import numpy as np
import pytest
from ml_collections import ConfigDict

from align_jax import inspect as program
from align_jax.core import files
from align_jax.runs import inspection, loop, setup

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def tiny(objective="dpo", **keys):
    config = runpy.run_path(str(CONFIGS / "tiny.py"))["get_config"](objective)
    config.batch_size = 8
    for key, value in keys.items():
        group, _, name = key.rpartition("__")
        setattr(config[group] if group else config, name, value)
    return config


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [
        {"prompt": f"{n}: how?", "chosen": "Well. " * (n % 6 + 1), "rejected": f"No, {n}."}
        for n in range(40)
    ]
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def joined(part):
    return "".join(piece.text for piece in part.pieces)


@pytest.mark.parametrize("layout", ["plain", "packed", "shared_prefix"])
def test_the_examples_shown_are_those_of_the_batch_that_trains(layout, pairs, tmp_path):
    config = tiny(data__layout=layout, data__train=pairs, batch_size=16)
    found = program.show_batch(config, examples=4, step=2)
    run = setup.prepare(setup.configs.read(config), str(tmp_path / "new"))
    batch, tokenizer = run.train.batch(1), run.resolved.tokenizer
    rows = [tokenizer.decode(row) for row in batch.tokens]
    learned = int(batch.loss_mask.sum())
    assert len(found.examples) == 4
    for shown, number in zip(found.examples, batch.example_index[batch.example_index >= 0]):
        assert shown.source == run.examples[int(number)].source
        prompt, *responses = shown.parts
        assert [part.name for part in shown.parts] == ["prompt", "chosen", "rejected"]
        for part in responses:
            assert any(joined(prompt) in row and joined(part) in row for row in rows)
    whole = program.show_batch(config, examples=99, step=2)
    assert sum(part.learned for one in whole.examples for part in one.parts) == learned
    assert found.rows["tokens"] == (batch.segment_ids != 0).sum()
    assert found.batch["tokens"] == f"int32[{','.join(map(str, batch.tokens.shape))}]"
    assert not list(tmp_path.iterdir())  # nothing was written


def test_every_token_has_its_kind(pairs):
    found = program.show_batch(tiny(data__train=pairs, data__strings="messages"))
    prompt, chosen, _ = found.examples[0].parts
    assert {piece.kind for piece in prompt.pieces} == {"prompt", "special"}
    assert [piece.kind for piece in chosen.pieces] == ["in the loss", "special, in the loss"]
    plain, colored = str(found), found.text(color=True)
    assert "\x1b" not in plain and "\x1b[32m" in colored and "\x1b[1;4;35m" in colored
    unpainted = re.sub(r"\x1b\[[\d;]*m", "", colored)
    assert re.sub("colors: .*\n", "", unpainted) == plain
    page = found._repr_html_()
    assert "<script" not in page and "&lt;|bos|&gt;" in page
    json.dumps(found.to_dict())


def test_cuts_turns_without_loss_and_control_characters_are_shown(tmp_path):
    def turn(role, content, **more):
        return {"role": role, "content": content, **more}

    answers = [turn("assistant", "A" * 9, loss=False), turn("user", "u"), turn("assistant", "B")]
    rows = [{"messages": [turn("user", f"q{n}\x1b[2J" + "x" * 90), *answers]} for n in range(4)]
    path = write(tmp_path / "rows.jsonl", rows)
    config = tiny("sft", data__train=path, data__eval_fraction=0.0, max_length=64)
    found = program.show_batch(config, examples=1)
    prompt, response = found.examples[0].parts
    assert prompt.cut > 0 and f"{prompt.cut} cut off" in str(found)
    assert response.learned < response.tokens and re.search("⟦A{9}", str(found))
    assert found.data["truncated prompts"] == 4
    config.max_length = 200
    found = str(program.show_batch(config, examples=1))
    assert "\\x1b[2J" in found and "\x1b" not in found
    assert "rows.jsonl:" in found


def test_no_character_of_a_name_or_a_text_stops_it_or_is_lost():
    half = "a\ud83d \u2028 \x1b[2J"
    part = inspection.Part("prompt", (inspection.Piece(half, "prompt"),), 3, 0, 0)
    shown = inspection.Shown(half, f"; {half}", (part,))
    found = inspection.Inspection((half,), {half: half}, {}, {}, {}, {}, (shown,))
    assert json.loads(files.json_text(found.to_dict()).encode())["examples"][0]["source"] == half
    for text in (str(found), found.text(color=True), found._repr_html_()):
        assert "\x1b[2J" not in text and text.encode() and text.count("a\\ud83d") >= 4


def test_feedback_and_prompts_say_what_they_are(tmp_path):
    rows = [{"prompt": f"{n}?", "completion": "Yes.", "label": n % 2 == 0} for n in range(20)]
    path = write(tmp_path / "rows.jsonl", rows)
    found = program.show_batch(tiny("kto", data__train=path, data__eval_fraction=0.0), examples=8)
    names = {part.name for one in found.examples for part in one.parts}
    assert names == {"prompt", "desirable response", "undesirable response"}
    assert any(name.startswith("mismatched.") for name in found.batch)
    online = program.show_batch(tiny("grpo"), examples=2)
    assert [part.name for part in online.examples[0].parts] == ["prompt"]
    assert "for rewards: answer" in str(online)
    with pytest.raises(ValueError, match="--step=2: this run is online"):
        program.show_batch(tiny("grpo"), step=2)


def test_the_weights_headers_are_checked_and_their_mistakes_are_trains(pairs, tmp_path):
    from safetensors.numpy import save_file

    fields = {**tiny().model.config, "model_type": "llama", "vocab_size": 272}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "architectures": ["x"]}))
    save_file({"model.norm.weight": np.ones(64, np.float32)}, tmp_path / "model.safetensors")
    config = tiny(model__path=str(tmp_path), tokenizer="byte", data__train=pairs)
    said = []
    for start in (program.show_batch, lambda made: loop.train(made, str(tmp_path / "run"))):
        with pytest.raises(ValueError, match=r"does not hold a llama model(.|\n)*missing") as error:
            start(config)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_run_too_large_for_these_devices_can_be_looked_at(pairs):
    large = dict(tiny().model.config, hidden_size=65536, intermediate_size=4 * 65536)
    large |= dict(num_hidden_layers=32, num_attention_heads=512, num_key_value_heads=512)
    config = tiny(data__train=pairs)
    config.model.config = ConfigDict(large)
    found = str(program.show_batch(config, examples=1))
    assert "not on these devices: a step takes at least" in found and "chosen (" in found
