"""The journal: what was appended is there, whole, at its place; what was torn never counted."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.errors import RunError
from rlhf_dist.experience import steps
from rlhf_dist.experience.archives import write_archive
from rlhf_dist.experience.journal import (
    JOURNAL_FOLDER,
    JournalReader,
    JournalWriter,
    TornTail,
    open_journal,
    read_table,
)
from rlhf_dist.experience.schema import EXPERIENCE_SCHEMA
from rlhf_dist.experience.segments import Segment
from rlhf_dist.experience.steps import StepsLog
from rlhf_dist.types import BatchPlace, BatchRows

NO_LIMIT = 1 << 40


@pytest.fixture
def batches(completion, scored):
    """Four batches of ragged samples."""
    return [scored([completion(3 * i + j, length=i + j) for j in range(3)]) for i in range(4)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / JOURNAL_FOLDER


def write(folder, batches, producer="scorer", **options):
    writer = JournalWriter(folder, producer, **({"max_segment_bytes": NO_LIMIT} | options))
    return writer, [writer.append(batch) for batch in batches]


def contents(folder):
    return [(place, batch.to_pylist()) for place, batch in JournalReader(folder).batches()]


def test_batches_come_back_at_the_places_that_append_gave(folder, batches):
    _, places = write(folder, batches, "scoring worker 0")
    assert places == [BatchPlace("scoring-worker-0-000001", number) for number in range(4)]
    assert contents(folder) == [
        (place, batch.to_pylist()) for place, batch in zip(places, batches, strict=True)
    ]
    journal = JournalReader(folder)
    for place in (places[2], places[0], places[3]):
        assert journal.read(place).equals(batches[place.batch])
        assert journal.read(place).schema.equals(EXPERIENCE_SCHEMA, check_metadata=True)
    assert journal.torn_tails() == []


def test_an_ended_segment_is_a_stream_that_arrow_reads_by_itself(folder, batches):
    writer, _ = write(folder, batches)
    writer.close()
    with pa.ipc.open_stream(folder / "scorer-000001.arrows") as stream:
        assert stream.read_all().equals(pa.Table.from_batches(batches))
    assert JournalReader(folder).num_batches("scorer-000001") == 4


def test_rows_of_a_selection(folder, batches):
    _, places = write(folder, batches)
    one, whole = JournalReader(folder).read_rows(
        [BatchRows(places[1], (0, 2)), BatchRows(places[3], (0, 1, 2))]
    )
    assert one["ordinal"].to_pylist() == [3, 5]
    assert whole.equals(batches[3])


def test_a_slice_is_written_without_the_rest(folder, batches):
    _, (place,) = write(folder, [batches[2].slice(1, 1)])
    assert JournalReader(folder).read(place).to_pylist() == batches[2].slice(1, 1).to_pylist()


def test_a_new_writer_never_goes_on_with_an_old_segment(folder, batches):
    first, (one,) = write(folder, batches[:1])
    _, (two,) = write(folder, batches[1:2])
    assert (one.segment, two.segment) == ("scorer-000001", "scorer-000002")
    assert first.append(batches[2]) == BatchPlace("scorer-000001", 1)
    first.close()
    assert first.append(batches[3]) == BatchPlace("scorer-000003", 0)
    assert [place for place, _ in contents(folder)] == [
        BatchPlace("scorer-000001", 0),
        BatchPlace("scorer-000001", 1),
        BatchPlace("scorer-000002", 0),
        BatchPlace("scorer-000003", 0),
    ]


def test_a_segment_ends_when_it_has_its_size(folder, batches):
    _, places = write(folder, batches, max_segment_bytes=1)
    assert [place.segment for place in places] == [f"scorer-{number:06d}" for number in (1, 2, 3, 4)]
    assert [batch for _, batch in contents(folder)] == [batch.to_pylist() for batch in batches]


def test_a_reader_sees_what_is_appended_after_it_was_made(folder, batches):
    journal = JournalReader(folder)
    assert list(journal.batches()) == []
    writer, (place,) = write(folder, batches[:1])
    assert journal.read(place).equals(batches[0])
    assert journal.read(writer.append(batches[1])).equals(batches[1])


def test_a_batch_that_is_not_there_is_an_error_that_names_the_place(folder, batches):
    write(folder, batches[:2])
    with pytest.raises(RunError, match=r"scorer-000001\.arrows has 2 whole batches, no batch 2"):
        JournalReader(folder).read(BatchPlace("scorer-000001", 2))
    with pytest.raises(RunError, match="has no segment other-000001"):
        JournalReader(folder).read(BatchPlace("other-000001", 0))


def test_experience_of_another_version_is_neither_written_nor_read(folder, batches):
    foreign = pa.RecordBatch.from_arrays(batches[0].columns, schema=EXPERIENCE_SCHEMA.with_metadata({}))
    with pytest.raises(RunError, match="schema version none"):
        write(folder, [foreign])
    folder.mkdir(parents=True)
    with pa.ipc.new_stream(folder / "old-000001.arrows", foreign.schema) as stream:
        stream.write_batch(foreign)
    with pytest.raises(RunError, match="schema version none"):
        contents(folder)


# ------------------------------------------------------------------------------------------------ crashes


def message_ends(folder, batches):
    """Bytes of the segment after the schema and after each batch."""
    writer, ends = JournalWriter(folder, "scorer", max_segment_bytes=NO_LIMIT), []
    for batch in batches:
        writer.append(batch)
        ends.append((folder / "scorer-000001.arrows").stat().st_size)
    return ends


def test_a_segment_cut_anywhere_has_its_whole_batches(folder, batches):
    ends = message_ends(folder, batches[:3])
    path = folder / "scorer-000001.arrows"
    content = path.read_bytes()
    for length in sorted({*range(0, len(content), 7), *(end + near for end in ends for near in (-1, 0, 1))}):
        path.write_bytes(content[:length])
        journal = JournalReader(folder)
        num_whole = sum(end <= length for end in ends)
        found = list(journal.batches())
        assert [batch.equals(batches[place.batch]) for place, batch in found] == [True] * num_whole, length
        torn = sum(tail.num_bytes for tail in journal.torn_tails())
        if num_whole:
            assert torn == min(length, len(content)) - ends[num_whole - 1], length
            assert journal.torn_tails() == ([TornTail("scorer-000001", torn)] if torn else [])


@pytest.mark.parametrize("filler", [b"\x00", b"\xff", b"\x01"])
def test_a_tail_whose_pages_never_reached_the_disk_does_not_count(filler, folder, batches):
    ends = message_ends(folder, batches[:2])
    path = folder / "scorer-000001.arrows"
    content = path.read_bytes()
    for begin in range(ends[0], ends[1], 7):
        path.write_bytes(content[:begin] + filler * (ends[1] - begin))
        found = [batch for _, batch in JournalReader(folder).batches()]
        if content[begin:] != filler * (ends[1] - begin):
            assert len(found) == 1, begin
            assert found[0].equals(batches[0])


def test_after_a_crash_the_producer_goes_on_in_a_new_segment(folder, batches):
    write(folder, batches[:2])
    path = folder / "scorer-000001.arrows"
    path.write_bytes(path.read_bytes()[:-5])
    write(folder, batches[2:])
    journal = JournalReader(folder)
    assert [place for place, _ in journal.batches()] == [
        BatchPlace("scorer-000001", 0),
        BatchPlace("scorer-000002", 0),
        BatchPlace("scorer-000002", 1),
    ]
    assert [tail.segment for tail in journal.torn_tails()] == ["scorer-000001"]


def test_a_damaged_batch_is_an_error_and_never_data(folder, batches):
    ends = message_ends(folder, batches[:3])
    path = folder / "scorer-000001.arrows"
    content = bytearray(path.read_bytes())
    content[ends[1] - 9] ^= 1
    path.write_bytes(content)
    journal = JournalReader(folder)
    assert journal.read(BatchPlace("scorer-000001", 0)).equals(batches[0])
    assert journal.read(BatchPlace("scorer-000001", 2)).equals(batches[2])
    with pytest.raises(RunError, match=r"batch 1 of segment .*scorer-000001\.arrows is damaged"):
        journal.read(BatchPlace("scorer-000001", 1))


def test_a_full_disk_is_one_message_and_the_journal_stays_readable(folder, batches, monkeypatch):
    writer, (first,) = write(folder, batches[:1])

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"journal .* cannot be written \(No space left on device\)"):
            writer.append(batches[1])
    assert writer.append(batches[2]) == BatchPlace("scorer-000002", 0)
    assert JournalReader(folder).read(first).equals(batches[0])


WRITER = """
import sys
from pathlib import Path
import pyarrow as pa
from rlhf_dist.experience.journal import JournalWriter
batch = pa.ipc.open_stream(sys.stdin.buffer).read_next_batch()
writer = JournalWriter(Path(sys.argv[1]), "scorer", max_segment_bytes=200_000)
while True:
    print(*writer.append(batch), flush=True)
"""


def test_what_a_killed_process_had_reported_is_there(folder, completion, scored):
    batch = scored([completion(i, length=50 * i) for i in range(20)])
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        with pa.ipc.new_stream(writer.stdin, batch.schema) as stream:
            stream.write_batch(batch)
        writer.stdin.close()
        lines = [writer.stdout.readline() for _ in range(40)]
        writer.kill()
        lines += writer.stdout.readlines()
    reported = [
        BatchPlace(segment, int(number)) for segment, number in map(str.split, map(bytes.decode, lines))
    ]
    found = dict(JournalReader(folder).batches())
    assert len({place.segment for place in reported}) > 1
    assert set(reported) <= found.keys()
    assert len(found) - len(reported) <= 1, "the one that was written but not yet reported"
    assert all(read.equals(batch) for read in found.values())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_whatever_is_appended_by_whomever_comes_back_once(data, completion, scored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("journal")
    writers, written = {}, {}
    for number in range(data.draw(st.integers(1, 12))):
        producer = data.draw(st.sampled_from(["a", "b", "a-1"]))
        if producer not in writers or data.draw(st.booleans()):
            limit = data.draw(st.sampled_from([1, 4000, NO_LIMIT]))
            writers[producer] = JournalWriter(folder, producer, max_segment_bytes=limit)
        lengths = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
        batch = scored([completion(number, i, length=length) for i, length in enumerate(lengths)])
        place = writers[producer].append(batch)
        assert place not in written
        written[place] = batch.to_pylist()
    assert contents(folder) == sorted(written.items())


# --------------------------------------------------------------------------------------- archives, table


def archive(folder, *segments):
    """Merge segments; their files."""
    paths = [folder / f"{name}.arrows" for name in segments]
    write_archive(folder / "archive-000001.arrow", [Segment(path) for path in paths])
    return paths


def test_places_stay_valid_in_an_archive(folder, batches):
    _, places = write(folder, batches, max_segment_bytes=1)
    before = JournalReader(folder)
    for path in archive(folder, "scorer-000001", "scorer-000003"):
        path.unlink()
    for journal in (before, JournalReader(folder)):
        for place, batch in zip(places, batches, strict=True):
            assert journal.read(place).equals(batch)
    assert JournalReader(folder).segments() == ["scorer-000002", "scorer-000004"]
    assert sorted(contents(folder)) == [
        (place, batch.to_pylist()) for place, batch in zip(places, batches, strict=True)
    ]


def test_a_segment_that_is_also_in_an_archive_counts_once(folder, batches):
    _, places = write(folder, batches, max_segment_bytes=1)
    archive(folder, "scorer-000001", "scorer-000002")
    assert sorted(place for place, _ in contents(folder)) == places


def test_the_table_has_each_sample_once_with_its_step(folder, completion, scored):
    first = scored([completion(0), completion(1)])
    again = scored([completion(1), completion(1, attempt=1), completion(2)])
    _, places = write(folder, [first, again])
    log = StepsLog(folder)
    log.append([steps.started_record(samples_per_prompt=1, max_staleness=0)])
    selection = [BatchRows(places[0], (0,)), BatchRows(places[1], (0,))]
    log.append([steps.leased_record(7, [0, 1], selection, 0)])
    table = read_table(folder.parent)
    assert table.column_names == [*EXPERIENCE_SCHEMA.names, "step"]
    rows = table.select(["ordinal", "attempt", "step"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [(0, 0, 7), (1, 0, 7), (1, 1, None), (2, 0, None)]
    assert read_table(str(folder.parent), ["reward"]).column_names == ["reward", "step"]


def test_the_table_of_an_empty_journal_is_empty(folder):
    folder.mkdir(parents=True)
    assert read_table(folder.parent).num_rows == 0


def test_a_folder_without_a_journal_is_an_error(tmp_path):
    with pytest.raises(RunError, match="has no folder 'journal'; name the folder of a run"):
        open_journal(tmp_path)


def test_the_digest_is_where_the_format_says(folder, batches):
    """The one thing here that is read from Arrow's bytes by hand: the length of the metadata."""
    write(folder, batches[:1])
    message = batches[0].serialize().to_pybytes()
    marker, metadata_bytes = struct.unpack("<Ii", message[:8])
    assert marker == 0xFFFFFFFF
    content = (folder / "scorer-000001.arrows").read_bytes()
    assert content.endswith(message[8 + metadata_bytes :])
