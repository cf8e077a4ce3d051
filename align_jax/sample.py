# SPDX-License-Identifier: Apache-2.0
"""Sample from a model, into a file or in a conversation.

    python -m align_jax.sample (--model=HF_DIR | --workdir=DIR) --prompts=FILE_OR_SOURCE
    --output=FILE.jsonl
        [--samples_per_prompt=4 --temperature=0.7 --top_p=0.95 --max_new_tokens=256 --seed=0]
    python -m align_jax.sample (--model=HF_DIR | --workdir=DIR) --chat [--temperature=0.7]

A line of the output holds HALOs' fields (prompt, output, generator, dataset, prompt_id, sample_id,
type), the prompt's own columns, and how it was sampled; ``align_jax.label`` makes feedback of it.
The same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

from absl import flags

from align_jax.runs import command

COMMANDS = "/quit or Ctrl-D leaves; /reset begins anew"
SYSTEM = "; /system WORDS also sets the system turn"  # which a chat template writes


def check_flags() -> None:
    """Refuse flags that do not go together.

    Raises:
        Usage: with what to give instead.
    """
    values = flags.FLAGS
    command.one_of("model", "workdir")
    if not values.chat and not (values.prompts and values.output):
        raise command.Usage("give --prompts and --output, or --chat")
    command.belong(("dtype",), "--model without --url", bool(values.model) and not values.url)
    command.belong(("chat_template", "url"), "--model", bool(values.model))
    command.belong(("allow_http",), "--url", bool(values.url))
    command.belong(("step",), "--workdir", bool(values.workdir))
    of_files = ("prompts", "output", "strings", "samples_per_prompt", "rows", "limit")
    command.belong(of_files, "--prompts, not to --chat", not values.chat)
    if values.temperature == 0 and values.samples_per_prompt > 1:
        raise command.Usage(
            f"--samples_per_prompt={values.samples_per_prompt} are alike at --temperature=0"
        )
    if values.stop and not all(values.stop):
        raise command.Usage("--stop is empty")
    command.rows_path("output", "prompts")
    command.check_there("" if values.url else values.model, values.workdir, values.prompts)


if __name__ == "__main__":  # here, because what is imported next takes seconds
    flags.DEFINE_string("model", "", "Hugging Face checkpoint: directory or hub id.")
    flags.DEFINE_string("workdir", "", "Folder of a training run.")
    flags.DEFINE_string("step", "latest", "Checkpoint of the run: latest, best or a step.")
    flags.DEFINE_string(
        "url", "", "OpenAI-compatible server that serves --model; nothing is loaded here."
    )
    flags.DEFINE_string("prompts", "", "Data source: path, glob, tfds:..., hf:..., builtin:...")
    flags.DEFINE_bool("allow_http", False, "--url may be plain http to another host.")
    flags.DEFINE_enum(
        "strings",
        None,
        ["plain", "messages"],
        "A prompt that is a mere text is continued, or is a user's turn of the chat template; "
        "default: plain, or what the run was trained with.",
    )
    flags.DEFINE_string("output", "", "File of JSON lines.")
    flags.DEFINE_bool("chat", False, f"Talk instead of reading prompts: {COMMANDS}{SYSTEM}.")
    flags.DEFINE_integer("samples_per_prompt", 1, "Completions of each prompt.", 1)
    flags.DEFINE_integer("max_new_tokens", 256, "Tokens of a completion at most.", 1)
    flags.DEFINE_integer(
        "max_length", 0, "Tokens of prompt and completion; 0 = the model's positions.", 0
    )
    flags.DEFINE_float("temperature", 1.0, "0 is greedy.", 0)
    flags.DEFINE_float("top_p", 1.0, "Nucleus; 1 = all.", 0, 1)
    flags.DEFINE_integer("top_k", 0, "0 = all.", 0)
    flags.DEFINE_float("min_p", 0.0, "Relative to the most probable token; 0 = all.", 0, 1)
    flags.DEFINE_float("repetition_penalty", 1.0, "1 = none.", 0)
    flags.DEFINE_multi_string("stop", [], "String that ends a completion.")
    flags.DEFINE_integer("seed", 0, "Prompt number i is sampled with seed + i.", 0, 2**31)
    flags.DEFINE_integer("rows", 64, "Completions decoded together.", 1)
    flags.DEFINE_integer("limit", 0, "Prompts at most; 0 = all.", 0)
    command.define_dtype("Of weights and activations (--model)")
    flags.DEFINE_string(
        "chat_template", "", "Jinja template or file (--model); default: the tokenizer's own."
    )
    arguments = command.read(check=check_flags)

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tqdm
from transformers import PreTrainedTokenizerBase

from align_jax.core.files import json_text, writing
from align_jax.core.options import DataOptions, ServerOptions
from align_jax.core.schema import Example, Message
from align_jax.data import chat, datasets
from align_jax.data.sources import open_source
from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference import engines
from align_jax.inference.generate import Completion, Generator, Request
from align_jax.inference.samplers import Sampling
from align_jax.interop import hf
from align_jax.parallel import compile_cache, distributed
from align_jax.parallel.mesh import make_mesh, row_shards
from align_jax.runs import trained as trained_runs
from align_jax.runs.trained import Trained
from align_jax.runs.weights import load_model


class SamplingPolicy(NamedTuple):
    """A policy to sample from.

    Attributes:
        engine: what answers.
        tokenizer: its tokenizer.
        name: in the records.
        max_length: tokens of a prompt with its completion; 0: only a server knows.
        strings: what a prompt is that is a mere text, as ``config.data.strings`` has it.
    """

    engine: engines.Engine
    tokenizer: PreTrainedTokenizerBase
    name: str
    max_length: int = 0
    strings: str = "plain"


def load_checkpoint(
    path: str,
    *,
    rows: int,
    max_length: int | None = None,
    compute_dtype: str = "",
    chat_template: str | None = None,
) -> SamplingPolicy:
    """Load a Hugging Face checkpoint over all devices, for generation.

    Args:
        path: directory or hub id.
        rows: completions decoded together; rounded up to what the devices divide.
        max_length: tokens of a prompt with its completion; None: the model's positions.
        compute_dtype: of weights and activations; "" as ``runs.weights.load_model`` has it.
        chat_template: replaces the tokenizer's own.
    """
    limit = max_length or hf.load_config(path).longest
    tokenizer, mesh = load_tokenizer(path, chat_template=chat_template), make_mesh({"fsdp": -1})
    model, params = load_model(
        path, mesh=mesh, compute_dtype=compute_dtype, max_length=max_length or 0
    )
    generator = Generator(
        model, tokenizer, rows=round_up(rows, row_shards(mesh)), mesh=mesh, max_length=limit
    )
    return SamplingPolicy(engines.Local(generator, params), tokenizer, path, limit)


def load_server(
    url: str, model: str, *, chat_template: str | None = None, allow_http: bool = False
) -> SamplingPolicy:
    """Ask a server of a checkpoint, whose tokenizer and end tokens are read here.

    Args:
        url: the server's address.
        model: directory or hub id, as the server names it; or a tokenizer alone.
        chat_template: replaces the tokenizer's own.
        allow_http: plain http, to a host that is not this one, too.
    """
    tokenizer = load_tokenizer(model, chat_template=chat_template)
    alone = model == "byte" or model.endswith((".json", ".json.gz"))
    ends = () if alone else hf.end_tokens(model)
    options = ServerOptions(url, model, allow_http=allow_http)
    return SamplingPolicy(engines.Server(options, tokenizer, end_tokens=ends), tokenizer, model)


def load_run(
    workdir: str, *, rows: int, which: str = "latest", max_length: int | None = None
) -> SamplingPolicy:
    """Load a run's policy from its checkpoint; adapters stay unmerged.

    Args:
        workdir: of the run.
        rows: completions decoded together.
        which: "latest", "best" or a step.
        max_length: tokens of a prompt with its completion; None: the model's positions.
    """
    trained = trained_runs.restore(workdir, which, speaks=True)
    name = f"{workdir}@{trained.step}"
    return policy_of(trained, name, rows=rows, max_length=max_length)


def policy_of(
    trained: Trained, name: str, *, rows: int, max_length: int | None = None
) -> SamplingPolicy:
    """Return a policy that was read back, for generation; the arguments are ``load_run``'s."""
    tokenizer = trained.resolved.tokenizer
    limit = max_length or trained.resolved.model_config.longest
    generator = Generator(
        trained.resolved.models.policy,
        tokenizer,
        mesh=trained.mesh,
        rows=round_up(rows, row_shards(trained.mesh)),
        max_length=limit,
    )
    engine = engines.Local(generator, trained.params)
    return SamplingPolicy(engine, tokenizer, name, limit, trained.config.data.strings)


def check_room(policy: SamplingPolicy, request: Request) -> None:
    """Refuse completions that can never fit.

    Raises:
        ValueError: more new tokens than the model has positions.
    """
    if 0 < policy.max_length <= request.max_new_tokens:
        raise ValueError(
            f"--max_new_tokens={request.max_new_tokens}: expected at most {policy.max_length - 1}: "
            f"{policy.name} has room for {policy.max_length} tokens, prompt and completion together"
        )


def _check_prompts(policy: SamplingPolicy, examples: Sequence[Example], tokens: list[int]) -> None:
    """Refuse prompts that no token of an answer fits beside.

    Raises:
        ValueError: with the first one's place.
    """
    for example, count in zip(examples, tokens):
        if 0 < policy.max_length <= count:
            raise ValueError(
                f"{example.source}: a prompt of {count} tokens; {policy.name} has room for "
                f"{policy.max_length}, prompt and completion together"
            )


def round_up(rows: int, multiple: int) -> int:
    """Return the least multiple that is at least so many rows."""
    return -(-rows // multiple) * multiple


def count_records(path: pathlib.Path, settings: dict[str, Any]) -> int:
    """Return how many records a file already has, after cutting off a half-written last line.

    Raises:
        ValueError: they were sampled in another way.
    """
    if not path.exists():
        return 0
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if complete != data:
        path.write_bytes(complete)
    # by bytes: other line ends may stand in an answer
    lines = [line for line in complete.split(b"\n") if line]
    if lines and (before := json.loads(lines[0])["sampling"]) != settings:
        raise ValueError(
            f"{path} holds samples made with {before}, not with {settings}; choose another "
            "--output, or delete it"
        )
    return len(lines)


def make_records(
    examples: Sequence[tuple[int, Example]],
    completions: Sequence[Sequence[Completion]],
    *,
    name: str,
    dataset: str,
    settings: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Return a record for each completion."""
    for (number, example), several in zip(examples, completions):
        prompt = example.prompt if isinstance(example.prompt, str) else list(example.prompt)
        for i, one in enumerate(several):
            yield {
                **example.extras,
                "prompt": prompt,
                "output": one.text,
                "generator": name,
                "dataset": dataset,
                "prompt_id": number,
                "sample_id": i,
                "type": "sample",
                "finish": one.finish,
                "tokens": len(one.tokens),
                "sampling": settings,
            }


def sample_file(
    policy: SamplingPolicy,
    prompts: str,
    output: str,
    request: Request,
    *,
    limit: int | None = None,
    chunk: int = 64,
    show: bool = True,
) -> int:
    """Sample every prompt of a source into a file of JSON lines.

    Args:
        policy: what answers.
        prompts: a data source; answers that it has are kept as columns.
        output: file; records that it has are not sampled again.
        request: how each prompt is sampled: prompt number i with the request's seed + i.
        limit: at most so many prompts.
        chunk: prompts generated and written at once.
        show: show a progress bar.

    Returns:
        Records written now.

    Raises:
        ValueError: as ``check_room``, ``datasets.load`` and ``count_records``.
    """
    check_room(policy, request)
    tokenizer, samples = policy.tokenizer, request.samples
    options, chatty = DataOptions(strings=policy.strings), bool(tokenizer.chat_template)
    examples = datasets.load(prompts, "prompts", options, chat=chatty, limit=limit)
    if chatty and show and isinstance(examples[0].prompt, str):
        print(
            f"{prompts}: the prompts are texts, which the model continues; --strings=messages "
            "makes each a user's turn of the chat template",
            file=sys.stderr,
        )
    settings = dataclasses.asdict(request.sampling) | {
        "samples_per_prompt": samples,
        "max_new_tokens": request.max_new_tokens,
        "seed": request.seed,
        "stop": list(request.stop),
        "generator": policy.name,
        "prompts": prompts,
        "strings": policy.strings,
    }
    path = pathlib.Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = count_records(path, settings)
    numbered = list(enumerate(examples.items))[done // samples :]
    # all at once: a prompt that does not fit is told before hours of the others
    encoded = chat.encode_many([example for _, example in numbered], tokenizer)
    _check_prompts(policy, [one for _, one in numbered], [len(one.prompt) for one in encoded])
    skip, written, total = done % samples, 0, len(examples) * samples
    bar = tqdm.tqdm(total=total, initial=done, unit="sample", file=sys.stderr, disable=not show)
    with writing(path), bar, path.open("a", encoding="utf-8") as file:
        for begin in range(0, len(numbered), chunk):
            part = numbered[begin : begin + chunk]
            requests = [
                dataclasses.replace(request, prompt=tuple(one.prompt), seed=request.seed + number)
                for (number, _), one in zip(part, encoded[begin : begin + chunk])
            ]
            completions = policy.engine(requests, bar.update)
            records = list(
                make_records(
                    part, completions, name=policy.name, dataset=prompts, settings=settings
                )
            )
            for record in records[skip:]:
                file.write(json_text(record) + "\n")
            file.flush()
            written, skip = written + len(records) - skip, 0
    return written


def converse(
    policy: SamplingPolicy,
    request: Request,
    *,
    ask: Callable[[str], str] = input,
    write: Callable[[str], Any] = sys.stdout.write,
) -> None:
    """Talk with a model until /quit or the end of input; answers are written as they come.

    Without a chat template the model continues the text so far, the user's and its own.
    """
    tokenizer, name = policy.tokenizer, policy.name
    check_room(policy, request)
    commands = COMMANDS + (SYSTEM if tokenizer.chat_template else "")
    turns: list[Message] = []
    write(f"{name}: {commands}\n")
    if not tokenizer.chat_template:
        write("There is no chat template: the model continues the text.\n")
    while True:
        try:
            words = ask("> ")
        except EOFError:
            write("\n")
            return
        command, _, rest = words.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/system" and rest and tokenizer.chat_template:
            turns = [{"role": "system", "content": rest}]
        elif command == "/reset":
            turns = []
        elif command.startswith("/"):
            write(f"{command}: {commands}\n")
        elif command:
            asked = [*turns, {"role": "user", "content": words}]
            try:
                answer = _answer(policy, request, asked, write)
            except ValueError as error:  # no room is left, or the template refuses the turns
                write(f"{error}; /reset begins anew\n")
            else:
                turns = [*asked, {"role": "assistant", "content": answer}]


def _answer(
    policy: SamplingPolicy, request: Request, turns: list[Message], write: Callable[[str], Any]
) -> str:
    """Write a conversation's next answer as it comes, and return it."""
    prompt = tuple(turns) if policy.tokenizer.chat_template else text_of(turns)
    ids = chat.encode(Example(prompt, (), source="the conversation"), policy.tokenizer).prompt
    asked = dataclasses.replace(request, prompt=tuple(ids), seed=request.seed + len(turns))
    written = ""
    for one in policy.engine.stream(asked):
        ready = settled(one.text, request.stop)
        if ready.startswith(written) and ready != written:
            write(ready[len(written) :])
            written = ready
    rest = one.text.removeprefix(written)
    write(f"{rest}\n" if one.text.startswith(written) else f"\n{one.text}\n")
    return one.text


def text_of(turns: Sequence[Message]) -> str:
    """Join turns as one text, for a model without a chat template."""
    return "\n".join(turn["content"] for turn in turns)


def settled(text: str, stop: Sequence[str]) -> str:
    """Return what of a text stays whatever tokens follow.

    The end of a character whose bytes are not all there, and what may begin a stop string, wait.

    >>> settled("na\N{REPLACEMENT CHARACTER}", ()), settled("The end#", ("##",))
    ('na', 'The end')
    """
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    begun = [size for one in stop for size in range(1, len(one)) if text.endswith(one[:size])]
    return text[: len(text) - max(begun, default=0)]


def count_wanted(prompts: str, limit: int, samples: int) -> int:
    """Return how many completions a source's prompts, at most ``limit`` of them, are to have."""
    found = len(open_source(prompts))
    return min(limit or found, found) * samples


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    output = command.output_path("output")
    sampling = Sampling(
        values.temperature, values.top_k, values.top_p, values.min_p, values.repetition_penalty
    )
    distributed.start()
    compile_cache.keep()
    rows = 1
    if not values.chat:
        wanted = count_wanted(values.prompts, values.limit, values.samples_per_prompt)
        rows = min(values.rows, wanted)
    template = values.chat_template or None
    max_length = values.max_length or None
    if values.url:
        policy = load_server(
            values.url, values.model, chat_template=template, allow_http=values.allow_http
        )
    elif values.workdir:
        policy = load_run(values.workdir, rows=rows, which=values.step, max_length=max_length)
    else:
        policy = load_checkpoint(
            values.model,
            rows=rows,
            max_length=max_length,
            compute_dtype=values.dtype or "",
            chat_template=template,
        )
    request = Request(
        (),
        1 if values.chat else values.samples_per_prompt,
        values.max_new_tokens,
        sampling,
        values.seed,
        tuple(values.stop),
    )
    if values.chat:
        converse(policy, request)
    else:
        policy = policy._replace(strings=values.strings or policy.strings)
        written = sample_file(
            policy, values.prompts, str(output), request, limit=values.limit or None
        )
        print(f"{output}: {written} completions written")


if __name__ == "__main__":
    command.run(main, arguments)
