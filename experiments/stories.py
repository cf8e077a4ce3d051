# SPDX-License-Identifier: Apache-2.0
"""Make prompts and completions from a text of stories: the first sentence, and what follows it.

    python experiments/stories.py STORIES.txt FOLDER

Stories are separated by lines of ``<|endoftext|>``.  Writes FOLDER/prompts.jsonl and
FOLDER/stories.jsonl.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys

_FIRST_SENTENCE = re.compile(r"([^.!?\n]{20,140}[.!?] )(\S.{40,})", re.DOTALL)
_MOST_CHARACTERS = 400  # of a completion


def main(source: str, folder: str) -> None:
    """Read the stories and write both files."""
    found = {}
    for story in pathlib.Path(source).read_text(encoding="utf-8").split("<|endoftext|>")[1:]:
        match = _FIRST_SENTENCE.match(story.strip())
        if match:
            found.setdefault(match[1], match[2][:_MOST_CHARACTERS])
    out = pathlib.Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in found))
    (out / "stories.jsonl").write_text(
        "".join(
            json.dumps({"prompt": one, "completion": rest}) + "\n" for one, rest in found.items()
        )
    )
    print(f"{len(found)} stories in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
