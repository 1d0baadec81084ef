"""Files of a checkpoint: what other programs read, pieces of tensors, digests, and a disk that is full."""

from __future__ import annotations

import json

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from rlhf_dist.engines.checkpoint_files import FolderWriter, TensorFile, digest_of
from rlhf_dist.errors import StorageError
from rlhf_dist.types import FileDigest


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(5, 3, generator=generator),
        "a.bias": torch.randn(7, generator=generator),
        "nothing": torch.zeros(0, 4),
        "one": torch.tensor(float("nan")),
    }


def write(folder, tensors, piece_elements):
    writer = FolderWriter(folder)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    writer.write_tensors("model/x.safetensors", shapes, flat.split(piece_elements))
    return writer.finish()


@pytest.mark.parametrize("piece_elements", [1, 4, 100])
def test_tensors_are_as_safetensors_reads_them_however_they_came(piece_elements, tensors, tmp_path):
    write(tmp_path, tensors, piece_elements)
    read = load_file(tmp_path / "model" / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].view(torch.int32), tensor.view(torch.int32)), name


@pytest.mark.parametrize("by", ["this", "safetensors"])
def test_a_piece_of_a_tensor_is_read_alone(by, tensors, tmp_path):
    path = tmp_path / "model" / "x.safetensors"
    if by == "this":
        write(tmp_path, tensors, 4)
    else:
        path.parent.mkdir()
        save_file(tensors, path)
    file = TensorFile(path)
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert torch.equal(file.read("b.weight", 4, 6), tensors["b.weight"].flatten()[4:10])
    assert torch.equal(file.read("a.bias", 0, 7), tensors["a.bias"])
    assert file.read("nothing", 0, 0).numel() == 0


def test_a_file_that_ends_early_is_not_read(tensors, tmp_path):
    write(tmp_path, tensors, 4)
    path = tmp_path / "model" / "x.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"x\.safetensors ends within tensor a\.bias"):
        TensorFile(path).read("a.bias", 0, 7)


def test_digests_are_those_of_the_files(tensors, tmp_path):
    files = write(tmp_path, tensors, 4)
    path = tmp_path / "model" / "x.safetensors"
    content = path.read_bytes()
    expected = FileDigest(len(content), xxhash.xxh3_128_hexdigest(content))
    assert files == {"model/x.safetensors": expected}
    assert digest_of(path) == expected


def test_a_writer_writes_several_files_and_json(tmp_path):
    writer = FolderWriter(tmp_path)
    writer.write("a", [b"one", b"two"])
    writer.write_json("b/c.json", {"steps": 3})
    assert writer.finish().keys() == {"a", "b/c.json"}
    assert (tmp_path / "a").read_bytes() == b"onetwo"
    assert json.loads((tmp_path / "b" / "c.json").read_text()) == {"steps": 3}


def test_after_a_failure_nothing_is_written_and_everything_is_drawn(tmp_path):
    """Whoever draws the pieces takes part in collectives."""
    (tmp_path / "full").symlink_to("/dev/full")
    writer = FolderWriter(tmp_path)
    drawn = []
    for name in ("full", "later"):
        writer.write(name, (drawn.append((name, piece)) or b"x" * 100_000 for piece in range(3)))
    assert drawn == [(name, piece) for name in ("full", "later") for piece in range(3)]
    assert not (tmp_path / "later").exists()
    with pytest.raises(StorageError, match=rf"{tmp_path} cannot be written \(No space left on device\)"):
        writer.finish()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    writer = FolderWriter(tmp_path / "gone")
    writer.write("a", [b"one"])
    with pytest.raises(StorageError, match=r"gone.* cannot be written \(No such file or directory\)"):
        writer.finish()


def test_a_rank_that_does_not_write_draws_everything(tmp_path):
    writer = FolderWriter(None)
    drawn = []
    writer.write("a", (drawn.append(piece) or b"" for piece in range(3)))
    assert drawn == [0, 1, 2]
    assert writer.finish() == {}
    assert list(tmp_path.iterdir()) == []
