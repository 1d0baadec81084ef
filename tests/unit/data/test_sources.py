"""Sources: what is read, and that each broken input is named with its place and its remedy."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_dist.data import sources
from rlhf_dist.data.sources import read_rows, task_function, task_names
from rlhf_dist.errors import DataError

ROWS = [{"prompt": "one", "n": 1}, {"prompt": "two", "n": 2}, {"prompt": "three", "n": 3}]


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `datasets` library whose every use fails the test."""
    monkeypatch.setitem(sys.modules, "datasets", None)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_lines_with_blank_lines_and_byte_order_mark(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / name, b'\xef\xbb\xbf{"prompt": "one"}\n\n{"prompt": "t\xc3\xa9"}')
    rows = read_rows(source)
    assert rows.rows == [{"prompt": "one"}, {"prompt": "té"}]
    assert rows.place(1) == f"{source} line 3"


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz"])
def test_gzipped_json_lines(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / name, gzip.compress(b'{"prompt": "one"}\n{"prompt": "two"}\n'))
    assert read_rows(source).rows == [{"prompt": "one"}, {"prompt": "two"}]


def test_parquet(tmp_path: Path) -> None:
    source = str(tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), source, row_group_size=1)
    rows = read_rows(source)
    assert rows.rows == ROWS
    assert rows.place(2) == f"{source} row 2 (from 0)"
    assert read_rows(source, limit=2).rows == ROWS[:2]


def test_limit_reads_no_further(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", b'{"prompt": "one"}\nnot json\n')
    assert len(read_rows(source, limit=1)) == 1


def test_task(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("rlhf_dist.tasks.some_task")
    module.prompts = lambda split: [{"prompt": split}, {"prompt": "b"}]
    monkeypatch.setitem(sys.modules, "rlhf_dist.tasks.some_task", module)
    monkeypatch.setattr(sources, "_task_modules", lambda: ["some_task"])
    assert read_rows("task:some-task", split="test", limit=1).rows == [{"prompt": "test"}]
    assert task_names("prompts") == ["some_task"]
    assert task_function("task:some_task", "prompts") is module.prompts
    with pytest.raises(DataError, match=r"task:sum-task.*prompts.*did you mean 'some_task'"):
        read_rows("task:sum-task")
    with pytest.raises(DataError, match=r"task:some-task: no task of this name has demonstrations"):
        read_rows("task:some-task", kind="demonstrations")


def test_saved_folder_with_and_without_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"dev": data}).save_to_disk(tmp_path / "several")
    assert read_rows(str(tmp_path / "one"), limit=2).rows == ROWS[:2]
    assert read_rows(str(tmp_path / "several"), split="dev").rows == ROWS
    with pytest.raises(DataError, match=r"several: no split 'train'; it has dev; set the split"):
        read_rows(str(tmp_path / "several"))


def test_hub_name_is_asked_with_split_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(*args: object, **options: object) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("openai/gsm8k", split="test", config_name="main").rows == ROWS
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_hub_name_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_args: object, **_options: object) -> None:
        raise ConnectionError("Couldn't reach 'no/such' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        DataError, match=r"no/such: not a file here.*Couldn't reach 'no/such'.*correct"
    ) as error:
        read_rows("no/such")
    assert "\n" not in str(error.value)


BROKEN_LINES = [
    (
        b'{"prompt": "a" "n": 1}',
        r"not valid JSON \(Expecting ',' delimiter at column 16\); fix or remove the line",
    ),
    (b'["prompt"]', r"a JSON array where an object is needed; .*jq -c '\.\[\]'"),
    (b'"text"', r"a JSON str where an object is needed; fix or remove the line"),
    (b"{", r"not valid JSON .*each object on one line: jq -c \."),
    (b'{"prompt": "\xff"}', r"not UTF-8 \(byte 13 of the line\); save the file as UTF-8"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN_LINES)
def test_broken_line(tmp_path: Path, line: bytes, message: str) -> None:
    source = write(tmp_path / "prompts.jsonl", b'{"prompt": "ok"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl line 3: " + message):
        read_rows(source)


def test_broken_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "one"}\n' * 1000)
    source = write(tmp_path / "prompts.jsonl.gz", whole[:-12])
    with pytest.raises(
        DataError, match=r"prompts\.jsonl\.gz: cannot be read after line \d+ .*download the file"
    ):
        read_rows(source)


def test_not_gzip(tmp_path: Path) -> None:
    source = write(tmp_path / "prompts.jsonl.gz", b'{"prompt": "one"}\n')
    with pytest.raises(
        DataError, match=r"prompts\.jsonl\.gz: cannot be read after line 0 \(Not a gzipped file"
    ):
        read_rows(source)


def test_broken_parquet(tmp_path: Path) -> None:
    source = write(tmp_path / "prompts.parquet", b"not parquet")
    with pytest.raises(DataError, match=r"prompts\.parquet: cannot be read as parquet \(.*download the file"):
        read_rows(source)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"prompts\.jsonl: it has no rows; name a source"):
        read_rows(write(tmp_path / "prompts.jsonl", content))


@pytest.mark.usefixtures("no_hub")
def test_missing_file_names_its_neighbour_and_is_not_looked_up(tmp_path: Path) -> None:
    write(tmp_path / "prompts.jsonl", b"{}")
    with pytest.raises(
        DataError, match=r"no such file or folder \(did you mean 'prompts\.jsonl'\?\); correct"
    ):
        read_rows(str(tmp_path / "promts.jsonl"))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("source", ["gone.jsonl", "gone/prompts.parquet", "./gone", "~/gone/x", "a/b/c"])
def test_what_looks_like_a_path_is_not_looked_up(source: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_rows(source)


@pytest.mark.usefixtures("no_hub")
def test_other_kinds_of_files(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"prompts\.csv: not a kind of file that is read; convert it to \.jsonl"
    ):
        read_rows(write(tmp_path / "prompts.csv", b"prompt\nhello\n"))


def test_missing_column(write_jsonl: Callable[..., str]) -> None:
    rows = read_rows(write_jsonl({"prompt": "a"}, {"promt": "b", "n": 1}))
    assert rows.value(0, "prompt", setting="data.prompt_column") == "a"
    message = (
        r"prompts\.jsonl line 2: no column 'prompt'; it has 'promt', 'n' \(did you mean 'promt'\?\); "
        r"set data\.prompt_column or fix the row"
    )
    with pytest.raises(DataError, match=message):
        rows.value(1, "prompt", setting="data.prompt_column")


def test_faults_of_the_program_are_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_args: object, **_options: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(KeyError):
        read_rows("some/name")
