# SPDX-License-Identifier: Apache-2.0
"""Rows from files of every kind, TFDS and the hub; each knows its place."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os

import numpy as np
import pytest
from etils import epath

from align_jax.core.options import DataOptions
from align_jax.data import datasets, row_files, sources

ROWS = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(5)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write(path, text):
    path.write_bytes(PACK.get(path.suffix, bytes)(text.encode()))
    return str(path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl.gz", lines(ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("b.json", lines(ROWS)),
        ("a.json.gz", json.dumps(ROWS, indent=1)),
        ("a.jsonl.bz2", lines(ROWS)),
        ("a.json.xz", json.dumps(ROWS, indent=1)),
        ("c.jsonl", "\n" + lines(ROWS[:2]) + "\r\n" + lines(ROWS[2:]) + "\n"),
    ],
)
def test_files_give_their_rows(tmp_path, name, text):
    source = sources.open_source(write(tmp_path / name, text))
    assert [source[i] for i in range(len(source))] == ROWS
    assert source.where(2).startswith(str(tmp_path / name))


@pytest.mark.parametrize("ending", [".bz2", ".xz"])
def test_a_packed_file_is_read_to_its_end_or_refused(tmp_path, ending):
    pack, path = PACK[ending], tmp_path / f"a.jsonl{ending}"
    halves = [pack(lines(part).encode()) for part in (ROWS[:2], ROWS[2:])]
    path.write_bytes(halves[0] + bytes(4) + halves[1] + bytes(8))
    source = sources.open_source(str(path))
    assert [source[i] for i in range(len(source))] == ROWS
    for second, said in ((halves[1][:-1], "ends too early"), (b"junk", ".")):
        path.write_bytes(halves[0] + second)
        with pytest.raises(ValueError, match=rf"a\.jsonl{ending}: not a whole \w+ file: .*{said}"):
            sources.open_source(str(path))


TABLE = [
    {"prompt": "a, b", "chosen": [{"role": "assistant", "content": "x"}], "label": True, "n": 1.5},
    {"prompt": 'say "no"\nand go', "chosen": [], "label": False, "n": None},
]


def write_table(path, kind):
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(TABLE)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, path)
    else:
        writer = {"file": pyarrow.ipc.new_file, "stream": pyarrow.ipc.new_stream}[kind]
        with writer(str(path), table.schema) as opened:
            opened.write_table(table)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.parquet", "parquet"),
        ("a.feather", "feather"),
        ("a.arrow", "file"),
        ("b.arrow", "stream"),
    ],
)
def test_tables_give_their_rows(tmp_path, name, kind):
    write_table(tmp_path / name, kind)
    source = sources.open_source(str(tmp_path / name))
    assert [source[i] for i in range(len(source))] == TABLE
    assert source.where(1) == f"{tmp_path / name}[1]"


def test_the_calls_of_other_rows_lend_theirs_no_arguments(tmp_path):
    calls = ({"city": "Rome"}, {"count": 1, "unit": "m"})
    rows = [
        {"turns": [{"call": {"arguments": one}}], "style": {"a": None}, "kwargs": None}
        for one in calls
    ]
    import pyarrow.feather

    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), str(tmp_path / "a.feather"))
    source = sources.open_source(str(tmp_path / "a.feather"))
    assert [source[i] for i in range(2)] == rows


def test_a_name_with_brackets_is_a_file_where_there_is_one(tmp_path):
    path = write(tmp_path / "run [v1].jsonl", lines(ROWS[:2]))
    assert len(sources.open_source(path)) == 2


@pytest.mark.parametrize("name", ["a.csv", "a.csv.bz2", "a.tsv", "semicolon.csv"])
def test_csv_gives_texts_and_the_values_of_json(tmp_path, name):
    text = io.StringIO(newline="")
    delimiter = {"a.tsv": "\t", "semicolon.csv": ";"}.get(name, ",")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(TABLE[0])
    for row in TABLE:
        writer.writerow([row["prompt"], json.dumps(row["chosen"]), row["label"], row["n"]])
    source = sources.open_source(write(tmp_path / name, "\ufeff" + text.getvalue()))
    read = [source[i] for i in range(len(source))]
    assert [row["prompt"] for row in read] == [row["prompt"] for row in TABLE]
    assert [row["chosen"] for row in read] == [row["chosen"] for row in TABLE]
    assert [row["label"] for row in read] == ["True", "False"]  # read where a label is needed
    assert [row["n"] for row in read] == ["1.5", None]
    assert [source.where(i).rpartition(":")[2] for i in range(2)] == ["2", "3"]


def test_pairs_of_csv_are_those_of_json(tmp_path):
    rows = "prompt,chosen,rejected,margin\nWhat is 2+2?,4,5,\nAnd 3+3?,6,7,0.5\n"
    examples = datasets.load(
        write(tmp_path / "a.csv", rows), "pairs", DataOptions(), chat=True, seed=0
    )
    assert [(one.responses, one.margin) for one in examples.items] == [
        (("4", "5"), 0.0),
        (("6", "7"), 0.5),
    ]


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="pipe.jsonl: is a named pipe, not a file"):
        sources.open_source(str(tmp_path / "pipe.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="folder.jsonl: is a directory, not a file"):
        sources.open_source(str(tmp_path / "*.jsonl").replace("*", "f*"))


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", lines(ROWS))
    opened = row_files.open_file

    def grow(path):
        rows = opened(path)
        (tmp_path / "a.jsonl").write_text(lines(ROWS + ROWS))
        return rows

    monkeypatch.setattr(sources, "open_file", grow)
    with pytest.raises(ValueError, match=r"a\.jsonl: it changed while it was read"):
        sources.open_source(path)


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_FILES", 2)
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", lines(ROWS))
    with pytest.raises(ValueError, match="matches more than 2 files"):
        sources.open_source(f"{tmp_path}/*.jsonl")


def test_not_utf8_is_named_wherever_it_stands(tmp_path):
    filler = lines(ROWS) * 20_000  # more than a block
    (tmp_path / "a.jsonl").write_bytes(filler.encode() + b'{"prompt": "caf\xe9"}\n')
    number = filler.count("\n") + 1
    with pytest.raises(ValueError, match=rf"a\.jsonl:{number}: not UTF-8 \(byte 0xe9\)"):
        sources.open_source(str(tmp_path / "a.jsonl"))


def test_places_are_line_numbers(tmp_path):
    source = sources.open_source(write(tmp_path / "a.jsonl", "\n\n" + lines(ROWS[:2])))
    assert [source.where(i).rpartition(":")[2] for i in range(2)] == ["3", "4"]
    with pytest.raises(IndexError):
        source[2]


@pytest.mark.parametrize("checked", [True, False])
def test_damage_within_a_parquet_file_is_named(tmp_path, checked):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"text": "first row"}, {"text": "second row"}]),
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=checked,
    )
    path.write_bytes(path.read_bytes().replace(b"second row", b"s\xffcond row"))
    message = "parquet: not a readable Parquet" if checked else r"parquet\[1\]: not a readable row"
    with pytest.raises(ValueError, match=message):
        sources.open_source(str(path))[1]


def test_a_glob_is_one_source_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.jsonl", lines(ROWS[3:]))
    write(tmp_path / "a.jsonl.gz", lines(ROWS[:3]))
    source = sources.open_source(str(tmp_path / "*.jsonl*"))
    assert [source[i] for i in range(5)] == ROWS
    assert source.where(3) == f"{tmp_path}/b.jsonl:1"


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000], ids=["deep", "long"])
def test_a_line_that_no_reader_takes_is_named(tmp_path, value):
    source = sources.open_source(write(tmp_path / "a.jsonl", f'{{"a": 1}}\n{{"a": {value}}}'))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: malformed JSON"):
        source[1]


def test_a_change_of_the_file_changes_its_digest(tmp_path):
    first = sources.open_source(write(tmp_path / "a.jsonl", lines(ROWS))).digest
    assert sources.open_source(write(tmp_path / "a.jsonl", lines(ROWS[:4]))).digest != first


def broken_gzip(folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode())[:-12])
    return str(folder / "a.jsonl.gz")


def broken_parquet(folder):
    (folder / "a.parquet").write_bytes(b"PAR1 no")
    return str(folder / "a.parquet")


def holding(name, data):
    """A file of any bytes under any name."""

    def make(folder):
        (folder / name).write_bytes(data)
        return str(folder / name)

    return make


def saved_to_disk(folder):
    """What DatasetDict.save_to_disk leaves, and a cache that map() has written beside it."""
    import pyarrow
    import pyarrow.feather

    for split in ("train", "test"):
        (folder / "d" / split).mkdir(parents=True)
        for name in ("data-00000-of-00001.arrow", "cache-0.arrow")[: 1 + (split == "train")]:
            pyarrow.feather.write_feather(
                pyarrow.Table.from_pylist(ROWS), folder / "d" / split / name
            )
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / "d" / split / "state.json").write_text(json.dumps(state))
    (folder / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder / "d"


MISTAKES = [
    (holding("a.csv", b"a,b\n1,2\n1,2,3\n"), ValueError, r"a\.csv:3: 3 cells in a row, 2 names"),
    (holding("b.csv", b'a,b\n1,"x\n'), ValueError, r"b\.csv:2: malformed CSV"),
    (holding("c.csv", b"a,a\n1,2\n"), ValueError, r"c\.csv:1: columns without a name, or"),
    (holding("d.csv", b"a,b\n"), ValueError, "no rows"),
    (holding("e.arrow", b"<html>"), ValueError, "e.arrow: not a readable Arrow .*an HTML page"),
    (holding("deep.jsonl", b"[" * 99999), ValueError, r"deep\.jsonl"),
    (lambda folder: f"{folder}/tran*.jsonl", FileNotFoundError, "did you mean '.*train.jsonl'"),
    (lambda folder: "", ValueError, "an empty name among the data sources"),
    (lambda folder: "builtin:preferences:train?size=1e6", ValueError, "size = '1e6': expected a w"),
    (lambda folder: "builtin:preferences:train?seed=-1", ValueError, "seed = '-1': expected a w"),
    (
        lambda folder: "builtin:preferences:train?size=999999999999",
        ValueError,
        r"size = 999,999,999,999 rows take about 2,047,\S+ bytes; this machine has",
    ),
    (holding("p.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x"), ValueError, "git-l"),
    (holding("p.jsonl.gz", b"version https://git-lfs"), ValueError, "gz: not a whole.*git-lfs"),
    (holding("h.jsonl", b"<!DOCTYPE html><html>"), ValueError, r"h\.jsonl: expected rows .* HTML"),
    (holding("z.jsonl", gzip.compress(b"{}")), ValueError, r"got gzip data .*ends in \.gz"),
    (holding("d.json", b"[" * 100_000), ValueError, r"d\.json: malformed JSON"),
    (holding("i.json", b"[" + b"9" * 5000 + b"]"), ValueError, r"i\.json: malformed JSON"),
    (holding("n.json", bytes(600)), ValueError, "nothing but zero bytes"),
    (
        holding("f.jsonl.gz", gzip.compress(b"{}")[:-9] + b"\x07" * 9),
        ValueError,
        "f.jsonl.gz: not a",
    ),
    (holding("t.parquet", b"<html>"), ValueError, "not a readable Parquet .*an HTML page"),
    (
        lambda folder: str(folder / "train.jsnl"),
        FileNotFoundError,
        r"no such file: .*did you mean '.*train\.jsonl'",
    ),
    (lambda folder: str(folder / "*.csv"), FileNotFoundError, r"no file matches .*\*\.csv"),
    (lambda folder: str(folder), ValueError, r"is a directory: name its files: /.*/\*\.jsonl \(1"),
    (
        lambda folder: str(saved_to_disk(folder)),
        ValueError,
        r"name its files: /.*/test/data-\*\.arrow \(1\), /.*/train/data-\*\.arrow \(1\)$",
    ),
    (
        lambda folder: str(saved_to_disk(folder) / "train/*.arrow"),
        ValueError,
        r"cache-0\.arrow: no file of the data set saved there.*: give /.*/train/data-\*\.arrow",
    ),
    (lambda folder: str(saved_to_disk(folder) / "*"), ValueError, "test: is a directory, not a"),
    (holding("t.jsonl.gz", gzip.compress(gzip.compress(b"{}"))), ValueError, "gzip data in gzip"),
    (holding("t.tar.gz", b""), ValueError, "unpack it: tar -xf /"),
    (holding("z.jsonl", lzma.compress(b"{}")), ValueError, r"got xz data .*ends in \.xz"),
    (holding("t.json.bz2", bz2.compress(bz2.compress(b"{}"))), ValueError, "it once, bunzip2 -k /"),
    (holding("p.json.xz", b"<html>"), ValueError, "xz: not a whole xz file: .*HTML page"),
    (holding("t.jsonl.part", b""), ValueError, "a download that has not ended"),
    (
        lambda folder: write(folder / "a.xlsx", "x"),
        ValueError,
        r"a\.xlsx: unknown kind of file; known: \.json, ",
    ),
    (
        lambda folder: write(folder / "a.jsonl.zst", "x"),
        ValueError,
        "unpack it: zstd -d /.*/a.jsonl.zst",
    ),
    (
        lambda folder: write(folder / "a b.JSONL", "x"),
        ValueError,
        "mv '/.*/a b.JSONL' '/.*/a b.jsonl'",
    ),
    (lambda folder: write(folder / "a.json", "[{},\n{]"), ValueError, r"a\.json:2: malformed JSON"),
    (lambda folder: write(folder / "a.jsonl", "\n"), ValueError, "no rows"),
    (broken_gzip, ValueError, "not a whole gzip file"),
    (broken_parquet, ValueError, "not a readable Parquet file"),
    (
        lambda folder: "builtin:preference:train",
        ValueError,
        "builtin data set = 'preference' is unknown; did you mean 'preferences'",
    ),
    (
        lambda folder: "builtin:preferences:test",
        ValueError,
        "split of builtin:preferences = 'test' is unknown; known: eval, train",
    ),
    (lambda folder: "builtin:preferences:train?sed=1", ValueError, r"got options \['sed'\]"),
    (lambda folder: "builtin:preferences:train?size=0", ValueError, "size must be at least 1"),
    (lambda folder: "hf:name:train", ValueError, "expected hf:OWNER/NAME"),
    (lambda folder: "tfds:name", ValueError, "expected tfds:NAME:SPLIT"),
]


@pytest.mark.parametrize("spec, error, message", MISTAKES, ids=[case[2][:24] for case in MISTAKES])
def test_mistakes_name_what_is_wrong_and_what_is_near(tmp_path, spec, error, message):
    write(tmp_path / "train.jsonl", lines(ROWS))
    with pytest.raises(error, match=message):
        sources.open_source(spec(tmp_path))


HUB = [  # split, files in the repository's snapshot, files chosen
    (
        "owner/name",
        "train",
        ["a/train.jsonl.gz", "b/train.jsonl.gz", "b/test.jsonl.gz", "c/red_team.jsonl.gz"],
        ["a/train.jsonl.gz", "b/train.jsonl.gz"],
    ),
    ("owner/name/b", "train", ["b/train.jsonl", "b/test.jsonl"], ["b/train.jsonl"]),
    (
        "owner/name",
        "train_prefs",
        ["data/train_prefs-00000-of-00001.jsonl", "data/train_sft-00000-of-00001.jsonl"],
        ["data/train_prefs-00000-of-00001.jsonl"],
    ),
    ("owner/name", "test", ["test/0.jsonl", "train/0.jsonl"], ["test/0.jsonl"]),
    ("owner/name", "train", ["train_extra.jsonl", "train.jsonl"], ["train.jsonl"]),
]


@pytest.mark.parametrize("repository, split, files, chosen", HUB)
def test_a_hub_split_is_its_files(tmp_path, monkeypatch, repository, split, files, chosen):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / file, json.dumps({"file": file}) + "\n")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **known: asked.append((name, known)) or str(tmp_path),
    )
    source = sources.open_source(f"hf:{repository}:{split}")
    assert [source[i]["file"] for i in range(len(source))] == chosen
    assert asked[0][0] == "owner/name" and asked[0][1]["repo_type"] == "dataset"
    with pytest.raises(ValueError, match="no file of split 'validation' among"):
        sources.open_source(f"hf:{repository}:validation")


def test_tfds_is_read_without_tensorflow(tmp_path):
    import sys

    import tensorflow_datasets as tfds

    class Pairs(tfds.core.GeneratorBasedBuilder):
        """Three pairs."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = epath.Path(tmp_path)

        def _info(self):
            text = tfds.features.Text()
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(
                    {
                        "prompt": text,
                        "chosen": text,
                        "rejected": text,
                        "margin": tfds.features.Scalar(np.float32),
                    }
                )
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(3):
                yield (
                    number,
                    {"prompt": f"é{number}", "chosen": "c", "rejected": "r", "margin": number},
                )

    builder = Pairs(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    examples = datasets.load(f"tfds:{builder.data_dir}:train", "pairs", DataOptions(), chat=False)
    assert sorted((example.prompt, example.margin) for example in examples.items) == [
        ("é0", 0),
        ("é1", 1),
        ("é2", 2),
    ]
    assert (
        examples[0].source == f"tfds:{builder.data_dir}:train[0]"
        and "tensorflow" not in sys.modules
    )
    with pytest.raises(ValueError, match="no split 'test'; there are .*train"):
        datasets.load(f"tfds:{builder.data_dir}:test", "pairs", DataOptions(), chat=False)
