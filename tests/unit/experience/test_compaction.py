"""Compaction: whatever it does, and wherever it is cut off, the journal reads the same."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
from contextlib import contextmanager

import pyarrow.compute as pc
import pytest

from rlhf_dist.errors import RunError, StorageError
from rlhf_dist.experience import compaction, steps
from rlhf_dist.experience.compaction import Compaction
from rlhf_dist.experience.inspection import inspect_run
from rlhf_dist.experience.journal import JOURNAL_FOLDER, JournalReader, JournalWriter, read_table
from rlhf_dist.experience.ordinals import Ordinals
from rlhf_dist.experience.segments import segment_numbers
from rlhf_dist.experience.steps import StepsLog
from rlhf_dist.types import BatchPlace, BatchRows


class CrashError(Exception):
    """The process ended here."""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / JOURNAL_FOLDER


@pytest.fixture
def journal(folder, completion, scored):
    """Segments 1 to 6 with a batch each: step s trained the ordinals of segment s + 1, up to step 4."""
    writer = JournalWriter(folder, "scorer", max_segment_bytes=1)
    log = StepsLog(folder)
    log.append([steps.started_record(samples_per_prompt=1, max_staleness=0)])
    for step in range(6):
        ordinals = [2 * step, 2 * step + 1]
        place = writer.append(scored([completion(ordinal, length=20) for ordinal in ordinals]))
        if step < 5:
            log.append([steps.leased_record(step, ordinals, [BatchRows(place, (0, 1))], step)])
            log.append([steps.trained_record(step, None)])
    log.close()
    return folder


def compact(folder, *, keep_from_step, **options):
    """Of what the log says was trained before a step, or given up."""
    history = steps.read_history(folder)
    trained = [each for each in history.steps.values() if each.trained and each.step < keep_from_step]
    done = {ordinal for each in trained for ordinal in each.ordinals} | set(history.failed)
    return compaction.compact(folder, Ordinals(done), **options)


def contents(folder):
    return {place: batch.to_pylist() for place, batch in JournalReader(folder).batches()}


def segments(*numbers):
    return [f"scorer-{number:06d}" for number in numbers]


def test_segments_of_trained_steps_become_archives_and_read_the_same(journal):
    before, table = contents(journal), read_table(journal.parent)
    done = compact(journal, keep_from_step=4, archive_bytes=1)
    assert done == Compaction(segments_archived=segments(1, 2, 3, 4), archives_deleted=[])
    assert sorted(path.name for path in journal.iterdir()) == [
        *(f"archive-{number:06d}.arrow" for number in (1, 2, 3, 4)),
        *(f"scorer-{number:06d}.arrows" for number in (5, 6)),
        "steps.jsonl",
    ]
    assert contents(journal) == before
    assert read_table(journal.parent).sort_by("ordinal").equals(table.sort_by("ordinal"))
    assert [
        journal_batch["ordinal"].to_pylist() for journal_batch in map(JournalReader(journal).read, before)
    ] == [[2 * step, 2 * step + 1] for step in range(6)]


def test_a_segment_is_held_by_its_file_or_by_an_archive_until_that_is_deleted(journal):
    reader = JournalReader(journal)
    assert reader.holds("scorer-000001")
    assert not reader.holds("scorer-000009")
    compact(journal, keep_from_step=1, archive_bytes=1)
    assert not (journal / "scorer-000001.arrows").exists()
    assert reader.holds("scorer-000001"), "also for a reader that was there before the archive"
    compact(journal, keep_from_step=1, max_bytes=1)
    assert not JournalReader(journal).holds("scorer-000001")
    assert JournalReader(journal).holds("scorer-000002")


def test_segments_are_merged_up_to_a_size_and_what_has_less_waits(journal):
    size = (journal / "scorer-000001.arrows").stat().st_size
    before = contents(journal)
    assert compact(journal, keep_from_step=5, archive_bytes=2 * size).segments_archived == segments(
        1, 2, 3, 4
    )
    assert [path.name for path in JournalReader(journal).archives()] == [
        "archive-000001.arrow",
        "archive-000002.arrow",
    ]
    assert JournalReader(journal).segments() == segments(5, 6)
    assert contents(journal) == before


def test_a_segment_with_one_sample_that_is_still_needed_stays(journal, completion, scored):
    writer = JournalWriter(journal, "other", max_segment_bytes=1)
    for ordinals in ([0, 99], [1]):
        writer.append(scored([completion(ordinal, attempt=1) for ordinal in ordinals]))
    writer.append(scored([completion(1, attempt=2)]))
    assert compact(journal, keep_from_step=1, archive_bytes=1).segments_archived == [
        "other-000002",
        *segments(1),
    ]


def test_samples_of_a_prompt_that_was_given_up_are_not_needed(journal):
    log = StepsLog(journal)
    log.append([steps.failed_record(2, ["it failed"]), steps.failed_record(3, ["it failed"])])
    log.close()
    assert compact(journal, keep_from_step=0, archive_bytes=1).segments_archived == segments(2)


def test_a_leased_step_is_not_a_trained_one(journal):
    lines = (journal / "steps.jsonl").read_text().splitlines(keepends=True)
    (journal / "steps.jsonl").write_text(
        "".join(line for line in lines if '"trained", "step": 1' not in line)
    )
    assert compact(journal, keep_from_step=4, archive_bytes=1).segments_archived == segments(1, 3, 4)


def test_the_last_segment_of_a_producer_stays_so_that_no_name_comes_twice(journal, completion, scored):
    compact(journal, keep_from_step=99, archive_bytes=1)
    assert JournalReader(journal).segments() == segments(6)
    place = JournalWriter(journal, "scorer", max_segment_bytes=1).append(scored([completion(50)]))
    assert place.segment == "scorer-000007"


def test_a_segment_that_its_writer_still_holds_stays(journal):
    with (journal / "scorer-000002.arrows").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert compact(journal, keep_from_step=4, archive_bytes=1).segments_archived == segments(1, 3, 4)
    assert compact(journal, keep_from_step=4, archive_bytes=1).segments_archived == segments(2)


def test_a_file_system_that_locks_only_what_may_be_written_is_served(journal, monkeypatch):
    """As NFS, whose exclusive locks need a descriptor that may write."""
    flock = fcntl.flock

    def strict(file, operation):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", strict)
    assert compact(journal, keep_from_step=4, archive_bytes=1).segments_archived == segments(1, 2, 3, 4)


def test_where_nothing_can_be_locked_every_segment_stays(journal, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert compact(journal, keep_from_step=4, archive_bytes=1) == Compaction([], [])


# --------------------------------------------------------------------------------------------- problems


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def no_file_larger_than(num_bytes):
    """As on a disk that is full, writes fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def problem(folder, reason):
    return f"journal {folder} was not wholly compacted, and takes more room than it need: {reason}"


def test_a_full_disk_leaves_the_journal_as_it_was_and_is_told(journal):
    before = files(journal)
    with no_file_larger_than(3000):
        done = compact(journal, keep_from_step=4, archive_bytes=1)
    assert done == Compaction([], [], problem(journal, "File too large"))
    assert files(journal) == before
    assert compact(journal, keep_from_step=4, archive_bytes=1).segments_archived == segments(1, 2, 3, 4)


def test_a_disk_that_fails_at_the_second_archive_keeps_the_first(journal, monkeypatch):
    before, archives = contents(journal), []
    rename = os.rename

    def fail_at_the_second(source, target):
        archives.append(target)
        if len(archives) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_the_second)
    done = compact(journal, keep_from_step=4, archive_bytes=1)
    assert done.segments_archived == segments(1)
    assert done.problem.endswith("archive-000002.arrow.tmp: Input/output error")
    assert contents(journal) == before
    assert list(journal.glob("*.tmp")) == []


def test_room_is_made_also_where_nothing_can_be_merged(journal):
    compact(journal, keep_from_step=2, archive_bytes=1)
    with no_file_larger_than(3000):
        done = compact(journal, keep_from_step=4, archive_bytes=1, max_bytes=1)
    assert done.archives_deleted == ["archive-000001.arrow", "archive-000002.arrow"]
    assert done.problem is not None


def test_a_damaged_batch_keeps_its_own_segment_from_being_merged_and_no_other(journal):
    path = journal / "scorer-000002.arrows"
    damaged = path.read_bytes().replace(b"response 2.0", b"response 9.0")
    path.write_bytes(damaged)
    done = compact(journal, keep_from_step=4, archive_bytes=1)
    reason = f"batch 0 of segment {path} is damaged: its digest does not match"
    assert done == Compaction(segments(1, 3, 4), [], problem(journal, reason))
    assert path.read_bytes() == damaged


def test_bytes_that_changed_in_an_archive_are_noticed(journal):
    before = contents(journal)
    compact(journal, keep_from_step=1, archive_bytes=1)
    path = journal / "archive-000001.arrow"
    assert JournalReader(journal).damaged() == []
    spoil_a_frame(path)
    [first, *_] = before
    assert JournalReader(journal).damaged() == [first]
    with pytest.raises(RunError, match="batch 0 of segment scorer-000001 in"):
        JournalReader(journal).read(first)


def spoil_a_frame(path):
    """Change a byte of compressed data."""
    content = bytearray(path.read_bytes())
    content[content.index(b"\x28\xb5\x2f\xfd") + 20] ^= 0xFF
    path.write_bytes(content)


def test_a_table_leaves_out_what_is_damaged_and_says_so(journal):
    compact(journal, keep_from_step=2, archive_bytes=1)
    os.truncate(journal / "archive-000001.arrow", 100)
    spoil_a_frame(journal / "archive-000002.arrow")
    segment = journal / "scorer-000003.arrows"
    segment.write_bytes(segment.read_bytes().replace(b"response 4.0", b"response 9.0"))
    with pytest.warns(UserWarning, match="left out of the table") as warned:
        table = read_table(journal.parent)
    assert table["ordinal"].to_pylist() == [6, 7, 8, 9, 10, 11]
    (warning,) = warned
    assert warning.filename == __file__
    for what in (
        f"archive {journal / 'archive-000001.arrow'} is damaged",
        "batch 0 of segment scorer-000002 is damaged",
        "batch 0 of segment scorer-000003 is damaged",
    ):
        assert what in str(warning.message)


def test_a_table_that_is_not_checked_reads_no_more_than_its_columns(journal):
    segment = journal / "scorer-000003.arrows"
    segment.write_bytes(segment.read_bytes().replace(b"response 4.0", b"response 9.0"))
    assert read_table(journal.parent, ["ordinal"], check=False)["ordinal"].to_pylist() == list(range(12))


def test_a_table_that_is_not_checked_cannot_have_what_does_not_decompress(journal):
    compact(journal, keep_from_step=1, archive_bytes=1)
    path = journal / "archive-000001.arrow"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x28\xb5\x2f\xfd", b"\0\0\0\0"))
    with pytest.raises(RunError, match=r"batch 0 of segment scorer-000001 in .*archive-000001.arrow is dam"):
        read_table(journal.parent, check=False)


@pytest.mark.parametrize("size", [0, 6, 100, -50])
def test_a_damaged_archive_hides_nothing_else(journal, size):
    """Its samples are done with: a run goes on without them, and `inspect` names the file."""
    compact(journal, keep_from_step=2, archive_bytes=1)
    path = journal / "archive-000001.arrow"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    reader = JournalReader(journal)
    assert list(reader.damaged_archives) == [path]
    assert reader.segments() == segments(3, 4, 5, 6)
    assert [place.segment for place, _ in reader.batches()] == segments(2, 3, 4, 5, 6)
    with pytest.raises(RunError, match=r"it was lost, or belongs to another run; archive .* is damaged \("):
        reader.read(BatchPlace("scorer-000001", 0))
    found = inspect_run(journal.parent)
    assert (found.damaged, found.lost_steps) == (["archive-000001.arrow"], [0])


def test_a_file_of_somebody_elses_is_no_segment_of_a_producer(journal):
    (journal / "notes.arrows").write_bytes(b"")
    assert {name: sorted(found) for name, found in segment_numbers(journal).items()} == {
        "scorer": [1, 2, 3, 4, 5, 6]
    }


def test_a_damaged_archive_is_told(journal):
    compact(journal, keep_from_step=2, archive_bytes=1)
    os.truncate(journal / "archive-000001.arrow", 0)
    before = files(journal)
    assert compact(journal, keep_from_step=4, archive_bytes=1).problem is not None
    assert files(journal) == before


# -------------------------------------------------------------------------------------------------- size


def test_the_oldest_archives_are_deleted_while_the_journal_is_too_large(journal):
    compact(journal, keep_from_step=4, archive_bytes=1)
    archive_bytes = (journal / "archive-000001.arrow").stat().st_size
    max_bytes = JournalReader(journal).num_bytes() - archive_bytes
    done = compact(journal, keep_from_step=4, archive_bytes=1, max_bytes=max_bytes)
    assert done == Compaction([], ["archive-000001.arrow"])
    assert compact(journal, keep_from_step=4, max_bytes=1).archives_deleted == [
        f"archive-{number:06d}.arrow" for number in (2, 3, 4)
    ]
    assert read_table(journal.parent)["ordinal"].to_pylist() == [8, 9, 10, 11], "steps that may be repeated"


def test_what_is_deleted_is_written_down_before_and_on_a_full_disk_after(journal, monkeypatch):
    compact(journal, keep_from_step=4, archive_bytes=1)
    monkeypatch.setattr(os, "unlink", lambda _: (_ for _ in ()).throw(CrashError))
    with pytest.raises(CrashError):
        compact(journal, keep_from_step=0, max_bytes=1)
    monkeypatch.undo()
    assert JournalReader(journal).deleted_segments() == set(segments(1, 2, 3, 4))
    (journal / "deleted.jsonl").unlink()
    append, failures = compaction.JsonLinesLog.append, iter([StorageError("full")])

    def fail_once(log, records):
        for failure in failures:
            raise failure
        append(log, records)

    monkeypatch.setattr(compaction.JsonLinesLog, "append", fail_once)
    assert len(compact(journal, keep_from_step=0, max_bytes=1).archives_deleted) == 4
    assert JournalReader(journal).deleted_segments() == set(segments(1, 2, 3, 4))


def test_archives_are_compressed(journal, completion, scored):
    writer = JournalWriter(journal, "long", max_segment_bytes=1)
    for attempt in range(2):
        writer.append(scored([completion(0, length=5000, attempt=attempt)]))
    size = (journal / "long-000001.arrows").stat().st_size
    compact(journal, keep_from_step=1, archive_bytes=1)
    assert next(iter(JournalReader(journal).archives())).stat().st_size < 0.7 * size


def test_readers_and_their_selections_go_on_while_segments_move(journal):
    reader = JournalReader(journal)
    places = [place for place, _ in reader.batches()]
    batches = reader.batches()
    next(batches)
    late = JournalReader(journal)
    compact(journal, keep_from_step=4, archive_bytes=1)
    assert [place for place, _ in batches] == places[1:]
    for each in (reader, late):
        assert [each.read(place)["ordinal"][0].as_py() for place in places] == [0, 2, 4, 6, 8, 10]


# ---------------------------------------------------------------------------------------------- crashes


def crash_at(patch, number):
    """Have the process end before the file operation `number`; returns the operations that were reached."""
    reached = []

    def before(operation):
        original = getattr(os, operation)

        def wrapped(*args, **kwargs):
            if len(reached) == number:
                raise CrashError
            reached.append(operation)
            return original(*args, **kwargs)

        return wrapped

    for operation in ("fsync", "rename", "unlink"):
        patch.setattr(os, operation, before(operation))
    return reached


def test_a_crash_between_any_two_file_operations_loses_and_doubles_nothing(journal, monkeypatch):
    size = (journal / "scorer-000001.arrows").stat().st_size
    before = contents(journal)
    keys = read_table(journal.parent).select(["ordinal", "sample", "attempt"]).sort_by("ordinal")
    options = {"keep_from_step": 4, "archive_bytes": 2 * size}
    number = 0
    while True:
        copy = journal.with_name(f"crash-{number}") / JOURNAL_FOLDER
        shutil.copytree(journal, copy)
        with monkeypatch.context() as patch:
            reached = crash_at(patch, number)
            try:
                compact(copy, **options)
                break
            except CrashError:
                pass
        assert contents(copy) == before, reached
        assert read_table(copy.parent).select(keys.column_names).sort_by("ordinal").equals(keys), reached
        compact(copy, **options)
        assert contents(copy) == before, reached
        assert JournalReader(copy).segments() == segments(5, 6), reached
        assert list(copy.glob("*.tmp")) == []
        number += 1
    assert reached.count("rename") == 2
    assert reached.count("unlink") == 4
    assert number == len(reached) >= 11


def test_a_half_written_archive_is_nothing(journal):
    compact(journal, keep_from_step=1, archive_bytes=1)
    content = (journal / "archive-000001.arrow").read_bytes()
    before = contents(journal)
    (journal / "archive-000002.arrow.tmp").write_bytes(content[: len(content) // 2])
    assert contents(journal) == before
    compact(journal, keep_from_step=2, archive_bytes=1)
    assert contents(journal) == before
    assert pc.count_distinct(read_table(journal.parent)["ordinal"]).as_py() == 12
