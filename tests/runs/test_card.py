# SPDX-License-Identifier: Apache-2.0
"""An export's model card, and its way to the hub."""

import http.server
import json
import threading

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from align_jax import export
from align_jax.interop import hub
from align_jax.runs import card

TOKEN = "hf_" + "s3cret" * 5
RECORD = {
    "config": {
        "objective": {"name": "dpo+sft", "beta": 0.3, "label_smoothing": 0.0, "weights": []},
        "data": {"train": "/home/me/secret/pairs.jsonl,hf:someone/feedback:train"},
        "model": {"path": "/home/me/base", "lora": {"rank": 8}},
        "rollout": {"server": {"url": f"https://me:{TOKEN}@host/v1?key={TOKEN}"}},
        "batch_size": 32,
    },
    "versions": {"jax": "0.10.2"},
    "devices": {"count": 8, "kind": "TPU v5e"},
    "git_commit": "0123abcd",
    "command": ["train.py", "--config=/home/me/secret/dpo.py", "--workdir=/home/me/run"],
}
ROWS = [
    {"step": 0, "time": 0.0, "eval/loss": 1.25, "eval/rewards/accuracies": 0.5},
    {"step": 5, "time": 1.0, "loss": 0.6},
    {"step": 9, "time": 2.0, "eval/loss": 0.75, "eval/rewards/accuracies": None},
]


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    header = "license: llama3\nlanguage:\n- en\nbase_model: meta/root"
    (folder / "README.md").write_text(f"---\n{header}\n---\n# The base\n")
    return str(folder)


def made(base, **changes):
    fields = {"record": RECORD, "rows": ROWS, "step": 9}
    return card.Card("mine", card.base_of(base), **fields | changes)


def test_a_card_says_what_it_is_made_of_and_keeps_what_is_private(base):
    text = made(base).text()
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "llama3" and data["base_model"] == "meta/root"
    assert data["datasets"] == ["someone/feedback"] and data["tags"] == ["align_jax", "dpo", "sft"]
    (index,) = data["model-index"]
    assert index["results"][0]["metrics"] == [{"type": "loss", "value": 0.75}]
    assert "| loss | 1.25 | 0.75 |" in text and "9 steps of 32 groups" in text
    for word in ("log σ", "objective.beta", "TPU v5e", "jax 0.10.2", "0123abcd", "dpo.py"):
        assert word in text, word
    for word in ("secret", "/home", TOKEN, "me:hf", "label_smoothing", "weights"):
        assert word not in text, word
    adapter = made(base, adapter=True).text()
    assert "library_name: peft" in adapter and "AutoPeftModelForCausalLM" in adapter
    assert "text-classification" in made(base, reward=True).text()
    assert "rounded" not in adapter
    model = RECORD["config"]["model"] | {"quantize": "int8"}
    beside = {"record": RECORD | {"config": RECORD["config"] | {"model": model}}}
    assert "a base rounded to int8; PEFT" in made(base, adapter=True, **beside).text()
    assert "rounded" not in made(base, **beside).text()  # merged, it is what the run was


def test_a_card_of_names_with_half_characters_is_written(base, tmp_path):
    name = "a\ud83d \u2028 \x1b"
    record = {"config": {"data": {"train": f"{name}.jsonl"}}, "command": [f"--workdir={name}"]}
    assert card.write(card.Card(name, card.base_of(base), record), str(tmp_path)) == "README.md"
    assert "a\\ud83d" in (tmp_path / "README.md").read_text("utf-8")
    assert card.write(card.Card("b", card.base_of(base), record), str(tmp_path)) == "README.md"


@pytest.mark.parametrize("readme", ["", "---\n: [\n---\n", "no header", None])
def test_a_base_that_says_no_license_is_told_so(readme, tmp_path):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    text = made(str(tmp_path)).text()
    assert "license" not in ModelCard(text).data.to_dict()
    assert "License: that of" in text and "do not say" in text


def test_a_readme_of_a_person_s_own_is_left_alone(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert card.write(made(base), str(out)) == "README.md"
    assert card.write(made(base, step=10), str(out)) == "README.md"  # its own: written anew
    edited = (out / "README.md").read_text().replace("# mine", "# Mine, with words of my own")
    (out / "README.md").write_text(edited)
    assert card.write(made(base), str(out)) == "MODEL_CARD.md"
    assert (out / "README.md").read_text() == edited
    (out / "README.md").unlink()
    assert card.write(made(base), str(out)) == "README.md"
    assert not (out / "MODEL_CARD.md").exists()


class Api:
    """The hub's client, which remembers what it is asked."""

    asked: list = []

    def whoami(self):
        self.asked.append("whoami")

    def create_repo(self, repo, **options):
        self.asked.append((repo, options))
        return f"https://hub/{repo}"

    def upload_folder(self, **options):
        self.asked.append(options)


def online(monkeypatch, token=TOKEN):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)


def test_what_is_published_is_the_export_alone(monkeypatch, tmp_path):
    import fnmatch

    online(monkeypatch)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    hub.check("me/mine")
    assert hub.push(str(tmp_path), "me/mine", message="m", private=True) == "https://hub/me/mine"
    who, (repo, options), upload = Api.asked
    assert who == "whoami" and repo == "me/mine"
    assert options == {"private": True, "exist_ok": True}
    assert upload["folder_path"] == str(tmp_path) and upload["commit_message"] == "m"

    def goes(name):
        return any(fnmatch.fnmatch(name, one) for one in upload["allow_patterns"])

    files = "config.json model-00001-of-00002.safetensors model.safetensors.index.json README.md "
    files += "tokenizer.json tokenizer.model chat_template.jinja adapter_config.json"
    assert all(map(goes, files.split()))
    assert not any(map(goes, ("pairs.jsonl", "notes.txt", ".env", "optimizer.pt")))


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("mine", TOKEN, "expected owner/name"),
        ("a/b/c", TOKEN, "expected owner/name"),
        ("me/mi ne", TOKEN, "expected owner/name"),
        ("me/mine", None, "needs a token that may write: hf auth login"),
    ],
)
def test_a_mistake_is_found_before_anything_is_exported(repo, token, said, monkeypatch):
    online(monkeypatch, token)
    with pytest.raises(ValueError, match=said):
        hub.check(repo)


def test_offline_is_told(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        hub.check("me/mine")


@pytest.mark.parametrize("token", [TOKEN, TOKEN + "\n", "abc def"])
def test_no_token_is_in_a_message(token, monkeypatch):
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # a server that tells what it was sent
            body = json.dumps({"error": f"bad {self.headers['Authorization']}"}).encode()
            self.send_response(401)
            self.send_header("X-Error-Message", f"bad {self.headers['Authorization']}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    online(monkeypatch, token)
    with http.server.HTTPServer(("localhost", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        real, url = huggingface_hub.HfApi, f"http://localhost:{server.server_port}"
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=url, token=token))
        with pytest.raises((ValueError, hub.HubError), match="--push_to_hub=me/mine: ") as error:
            hub.check("me/mine")
        server.shutdown()
    assert token.strip() not in str(error.value) and "s3cret" not in str(error.value)
    assert error.value.__cause__ is None and error.value.__suppress_context__


def test_a_checkpoint_passed_through_has_a_card(base, tmp_path):
    text = card.Card("again", card.base_of(base)).text()
    assert "no tensor was changed" in text and "How it was made" not in text
    assert export.card is card
