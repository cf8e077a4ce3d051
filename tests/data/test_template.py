# SPDX-License-Identifier: Apache-2.0
"""A chat template is given the run's own date, and ends whatever it does."""

import dataclasses
import pickle
import threading

import pytest

from align_jax.core.options import DataOptions
from align_jax.core.schema import Example
from align_jax.data import chat, template, tokenizer
from align_jax.runs import setup
from align_jax.storage import workdir as record

DATED = "{{ strftime_now('%d %b %Y') }}|{% for m in messages %}{{ m.content }}{% endfor %}"
# a loop of its own for each kind: of nothing, of text, of text that doubles
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}X{% endfor %}{% endfor %}"
ENDLESS = {
    "a loop": LOOP.replace("X", "{% set x = i %}"),
    "a loop of text": LOOP.replace("X", "{{ i }}"),
    "doubling": "{% set s = namespace(t='x') %}{% for i in range(60) %}{% set s.t = s.t ~ s.t %}"
    "{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(90) }}",
}


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_never_ends_is_named(text, monkeypatch, tmp_path):
    monkeypatch.setattr(template, "SECONDS", 0.3)
    monkeypatch.setattr(template, "BYTES", 1 << 27)
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(ValueError, match=r"t\.jinja: the chat template .* does not end"):
        tokenizer.load_tokenizer("byte", chat_template=str(tmp_path / "t.jinja"))


def test_one_that_never_ends_for_a_row_is_no_row_to_drop(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    text = "{% if messages[0].content == 'loop' %}" + ENDLESS["a loop"] + "{% endif %}"
    tok = tokenizer.load_tokenizer("byte", chat_template=text)
    example = Example(({"role": "user", "content": "loop"},), ("a",), source="f:1")
    with pytest.raises(template.Endless, match="does not end"):
        chat.encode_many([example], tok, drop=True)


def test_off_the_main_thread_templates_still_render():
    tok, made = tokenizer.load_tokenizer("byte", chat_template=DATED, date="2020-02-03"), []
    say = [{"role": "user", "content": "hi"}]
    thread = threading.Thread(target=lambda: made.append(template.apply(tok, say)))
    thread.start()
    thread.join()
    assert made == ["03 Feb 2020|hi"]


@pytest.mark.parametrize(
    "form, text",
    [
        ("%F", "2020-02-03"),
        ("%e %B %Y", " 3 February 2020"),
        ("%-d/%-m/%y, %T", "3/2/20, 12:00:00"),
        ("%D %R %Z", "02/03/20 12:00 UTC"),
        ("%G-W%V-%u", "2020-W06-1"),
        ("%^a %_d 100%%d", "MON  3 100%d"),
    ],
)
def test_every_form_of_a_date_is_written(form, text):
    tok = tokenizer.load_tokenizer(
        "byte", chat_template=f"{{{{ strftime_now({form!r}) }}}}", date="2020-02-03"
    )
    assert template.apply(tok, [{"role": "user", "content": "a"}]) == text


def test_the_date_is_part_of_the_digest_only_where_it_is_read():
    def digest(date, text):
        tok = tokenizer.load_tokenizer("byte", chat_template=text, date=date)
        assert template.date_read(pickle.loads(pickle.dumps(tok))) == ("" if text is None else date)
        return tokenizer.tokenizer_digest(tok)

    assert digest("2020-02-03", DATED) != digest("2020-02-04", DATED)
    assert digest("2020-02-03", None) == digest("2020-02-04", None)


def test_a_run_keeps_the_day_of_its_first_start(tmp_path):
    today = setup.first_day(str(tmp_path))
    assert template.date_read(setup.load_tokenizer("byte", chat_template=DATED)) == today
    dated = dataclasses.replace(DataOptions(train="x"), date="2020-02-03")
    record.write_record(tmp_path, {"data": dataclasses.asdict(dated)})
    assert setup.first_day(str(tmp_path)) == "2020-02-03"


def test_a_date_is_a_date():
    assert any("YYYY-MM-DD" in fault for fault in DataOptions(train="x", date="3 Feb").check())
