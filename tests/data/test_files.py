import gzip
import json
from pathlib import Path

import pytest
import torch

from fedpeft.data.files import Files

pytestmark = pytest.mark.fast
STORED = Path(__file__).parents[3] / "shared" / "data"
CSV = 'text,label\n"one, two",b\nthree,a\n"a ""quote""\nover lines",b\n'


def write(folder: Path, name: str, text: str) -> Path:
    content = text.encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def rows(*values: dict) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def read(folder: Path, **fields):
    return Files(path=str(folder), **{"text": "text", "label": "label"} | fields).read(seed=0)


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".tsv", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_format_gives_the_same_table(tmp_path, ending):
    cells = [("one, two", "b"), ("three", "a"), ('a "quote"\nover lines', "b")]
    if ending == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        for name in ("train", "test"):
            parquet.write_table(arrow.table({"text": [c[0] for c in cells], "label": [c[1] for c in cells]}), tmp_path / f"{name}.parquet")
    else:
        text = rows(*({"text": t, "label": n} for t, n in cells)) if "jsonl" in ending else CSV
        text = 'text\tlabel\none, two\tb\nthree\ta\n"a ""quote""\nover lines"\tb\n' if "tsv" in ending else text
        write(write(tmp_path, "train" + ending, text), "test" + ending, text)
    data = read(tmp_path)
    for table in (data.train, data.test):
        assert table.inputs == tuple(c[0] for c in cells)
        assert table.labels.tolist() == [1, 0, 1]
    assert (data.task, data.classes, data.public, data.train.groups) == ("text", ("a", "b"), None, None)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    assert read(write(tmp_path, "train.csv", "\ufeff" + CSV), test_share=0.3).classes == ("a", "b")


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path):
    data = read(write(tmp_path, "train.jsonl", rows(*({"text": "x", "label": n} for n in (10, 2, 0, 1)))))
    assert data.classes == ("0", "1", "2", "10")


def test_pairs_and_owners_are_read(tmp_path):
    text = rows(*({"a": f"a{i}", "b": f"b{i}", "label": "xy"[i % 2], "who": i // 2} for i in range(4)))
    data = read(write(write(tmp_path, "train.jsonl", text), "test.jsonl", text), text="a", text_pair="b", group="who")
    assert data.train.inputs == (("a0", "b0"), ("a1", "b1"), ("a2", "b2"), ("a3", "b3"))
    assert data.train.groups == ("0", "0", "1", "1")


def test_without_a_test_file_a_share_of_the_rows_is_held_out(tmp_path):
    write(tmp_path, "train.jsonl", rows(*({"text": f"t{i}", "label": i % 2} for i in range(10))))
    data = read(tmp_path, test_share=0.3)
    assert len(data.test) == 3
    assert sorted(data.train.inputs + data.test.inputs) == [f"t{i}" for i in range(10)]
    assert read(tmp_path / "train.jsonl", test_share=0.3).test.inputs == data.test.inputs


def test_files_may_have_other_names(tmp_path):
    write(write(tmp_path, "mine.csv", CSV), "held.csv", CSV)
    assert len(read(tmp_path, train="mine.csv", test="held.csv").test) == 3
    assert len(read(tmp_path / "mine.csv", test="held.csv").test) == 3


def test_a_limit_keeps_the_classes_of_the_whole_file(tmp_path):
    text = rows(*({"text": f"t{i}", "label": i} for i in range(9)))
    data = read(write(write(tmp_path, "train.jsonl", text), "test.jsonl", text), limit=2)
    assert (len(data.train), len(data.test), len(data.classes)) == (2, 2, 9)


def test_small_owners_are_left_out_or_public(tmp_path):
    text = rows(*({"text": f"t{i}", "label": i % 2, "who": who} for i, who in enumerate("abaacb")))
    write(write(tmp_path, "train.jsonl", text), "test.jsonl", text)
    data = read(tmp_path, group="who", min_group=3)
    assert (data.train.inputs, data.public, len(data.test)) == (("t0", "t2", "t3"), None, 6)
    data = read(tmp_path, task="language", label=None, group="who", min_group=2, public_small_groups=True)
    assert data.public.inputs == ("t4",)
    assert (data.classes, data.train.labels.tolist()) == ((), [0] * 5)


def test_unseen_and_missing_labels_are_left_out_on_request_only(tmp_path):
    write(tmp_path, "train.jsonl", rows({"text": "x", "label": "a"}, {"text": "y", "label": None}, {"text": "z", "label": "b"}))
    write(tmp_path, "test.jsonl", rows({"text": "x", "label": "c"}, {"text": "y", "label": "b"}))
    with pytest.raises(ValueError, match=r"row 2 of train.jsonl has no label .* data.drop_unlabelled=true"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"row 1 of test.jsonl has the label c, which no training row has; .* data.drop_unseen=true"):
        read(tmp_path, drop_unlabelled=True)
    write(tmp_path, "blank.jsonl", rows({"text": "x", "label": None}))
    with pytest.raises(ValueError, match=r"none of the 1 rows of blank.jsonl can be used: data.drop_unlabelled=True"):
        read(tmp_path, test="blank.jsonl", drop_unlabelled=True)
    data = read(tmp_path, drop_unlabelled=True, drop_unseen=True)
    assert (data.train.inputs, data.test.inputs, data.test.labels.tolist()) == (("x", "z"), ("y",), [1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "body"}, r"data.text=body: train.csv has no such column, it has text, label"),
        ({"label": "class"}, r"data.label=class: train.csv has no such column, it has text, label"),
        ({"label": None}, r"data.label is not set; name the column with data.label=COLUMN"),
        ({"task": "language"}, r"data.label=label: language modelling has no classes"),
        ({"task": "image"}, r"data.task=image"),
        ({"min_group": 2}, r"data.group=COLUMN"),
        ({"group": "label", "public_small_groups": True}, r"data.public_small_groups=true is for data.task=language"),
        ({"group": "label", "min_group": 9}, r"data.min_group=9: the largest owner has \d training examples"),
        ({"train": "other.csv"}, r"data.train=other.csv: there is no such file in .*, which holds train.csv"),
        ({"test": "other.csv"}, r"data.test=other.csv: there is no such file"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(write(tmp_path, "train.csv", CSV), **fields)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.csv", "text,label\nx,a\ny\n", r"line 3 of train.csv has 1 fields, the header has 2"),
        ("train.csv", 'text,label\n"x"y,a\n', r"line 2 of train.csv is not well-formed"),
        ("train.csv", "text,text\nx,a\n", r"train.csv names a column twice"),
        ("train.csv", "text,label\n ,a\nx,b\n", r"row 1 of train.csv: column text is empty"),
        ("train.csv", "text,label\nx,a\ny,a\n", r"data.label=label: needs at least two classes, train.csv has a"),
        ("train.csv", "text,label\n", r"needs at least two classes, train.csv has none"),
        ("train.csv", "", r"train.csv has no such column, it has none"),
        ("train.jsonl", '{"text": "x"}\n{"text":\n', r"line 2 of train.jsonl is not JSON"),
        ("train.jsonl", '["x"]\n', r"line 1 of train.jsonl is a list"),
        ("train.jsonl", rows({"text": 3, "label": 1}, {"text": "x", "label": 2}), r"row 1 of train.jsonl: column text holds a int"),
        ("train.parquet", "no", r"train.parquet is not a parquet file"),
    ],
)
def test_a_malformed_file_is_an_error_with_its_place(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, name, text))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"text,label\n\xff\xfe,a\n")
    with pytest.raises(ValueError, match=r"train.csv is not utf-8"):
        read(tmp_path)
    (tmp_path / "train.csv").unlink()
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(CSV.encode())[:-9])
    with pytest.raises(ValueError, match=r"train.csv.gz is not a whole gzip file"):
        read(tmp_path)


def test_an_owner_must_be_named(tmp_path):
    write(tmp_path, "train.csv", "text,label,who\nx,a,me\ny,b,\n")
    with pytest.raises(ValueError, match=r"row 2 of train.csv has no owner in column who"):
        read(tmp_path, group="who")


def test_a_language_file_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none of the 0 rows of train.csv can be used"):
        read(write(tmp_path, "train.csv", "text\n"), task="language", label=None)


def test_a_file_of_another_format_is_refused(tmp_path):
    write(tmp_path, "train.txt", "x")
    with pytest.raises(ValueError, match=r"train.txt cannot be read; needed is a file of .csv"):
        read(tmp_path / "train.txt")


@pytest.mark.parametrize(
    ("name", "rows", "classes", "fields"),
    [
        ("banking77", (10_003, 3_080), 77, {}),
        ("clinc150", (15_000, 4_500), 150, {"group": "domain"}),
        ("sick", (4_500, 4_927), 3, {"text": "sentence_a", "text_pair": "sentence_b"}),
        ("newsgroups20", (11_313, 7_530), 20, {"group": "author"}),
    ],
)
def test_the_stored_data_reads_as_its_readme_says(name, rows, classes, fields):
    if not (STORED / name).exists():
        pytest.skip(f"{name} is not stored here")
    data = read(STORED / name, **fields)
    assert ((len(data.train), len(data.test)), len(data.classes)) == (rows, classes)


def test_shakespeares_small_speakers_are_public():
    if not (STORED / "tinyshakespeare").exists():
        pytest.skip("tinyshakespeare is not stored here")
    fields = {
        "train": "lines.jsonl.gz",
        "task": "language",
        "label": None,
        "group": "speaker",
        "min_group": 20,
        "public_small_groups": True,
    }
    data = read(STORED / "tinyshakespeare", **fields)
    assert len(data.train) + len(data.public) + len(data.test) == 7_095
    assert not set(data.train.groups) & set(data.public.groups)
    assert min(map(data.train.groups.count, set(data.train.groups))) >= 20


def test_named_classes_do_not_follow_from_the_rows(tmp_path):
    data = read(write(tmp_path, "train.csv", CSV), class_names=["c", "b", "a"], test_share=0.3)
    assert data.classes == ("c", "b", "a")
    assert sorted(torch.cat([data.train.labels, data.test.labels]).tolist()) == [1, 1, 2]
    assert read(write(tmp_path, "train.csv", "text,label\nx,1\ny,1\n"), class_names=[0, 1]).classes == ("0", "1")  # one of them has no row


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"class_names": ["a"]}, "needed are two names or more"),
        ({"class_names": ["a", "a"]}, "each another"),
        ({"class_names": ["a", "c"]}, "row 1 of train.csv has the label b, which is not one of data.class_names; remove it"),
        ({"class_names": ["a", "b"], "task": "language", "label": None}, "language modelling has no classes"),
    ],
)
def test_class_names_that_cannot_be_are_refused(tmp_path, fields, said):
    with pytest.raises(ValueError, match=said):
        read(write(tmp_path, "train.csv", CSV), **fields)


def test_rows_of_other_classes_may_be_left_out(tmp_path):
    data = read(write(tmp_path, "train.csv", CSV + "four,b\n"), class_names=["b", "c"], drop_unseen=True, test_share=0.4)
    assert sorted(torch.cat([data.train.labels, data.test.labels]).tolist()) == [0, 0, 0]
