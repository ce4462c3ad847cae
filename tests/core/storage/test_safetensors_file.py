"""Safetensors files: refused when damaged, never half written."""

import hashlib
import json
import logging
import os
import re

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aclora_core.storage import safetensors_file

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.5), "c": torch.ones(3, 2, dtype=torch.bfloat16)}


def header_of(path):
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + length]), length, blob[8 + length :]


def test_tensors_and_metadata_are_read_back_exactly(tmp_path):
    safetensors_file.write_safetensors(tmp_path / "x.safetensors", TENSORS, {"title": "Tusche 墨 🖌"})
    tensors, metadata = safetensors_file.read_safetensors(tmp_path / "x.safetensors")
    assert tensors.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert tensors[key].dtype == tensor.dtype
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=0)
    assert metadata["title"] == "Tusche 墨 🖌"


def test_the_safetensors_library_reads_the_file(tmp_path):
    safetensors_file.write_safetensors(tmp_path / "x.safetensors", TENSORS, {"one": "1"})
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata()["one"] == "1" and file.metadata()["format"] == "pt"


def test_the_hashes_cover_the_tensors_and_not_the_metadata(tmp_path):
    safetensors_file.write_safetensors(tmp_path / "one.safetensors", TENSORS, {"title": "one"})
    safetensors_file.write_safetensors(tmp_path / "two.safetensors", TENSORS, {"title": "another"})
    header, length, data = header_of(tmp_path / "one.safetensors")
    digest = hashlib.sha256(data).hexdigest()
    assert length % 8 == 0
    assert header["__metadata__"]["sshs_model_hash"] == digest
    assert header["__metadata__"]["modelspec.hash_sha256"] == "0x" + digest
    assert header_of(tmp_path / "two.safetensors")[0]["__metadata__"]["sshs_model_hash"] == digest


def test_missing_folders_are_created_and_no_partial_file_is_left(tmp_path):
    safetensors_file.write_safetensors(tmp_path / "styles" / "ink" / "x.safetensors", TENSORS, {})
    assert os.listdir(tmp_path / "styles" / "ink") == ["x.safetensors"]


def test_a_full_disk_keeps_the_old_file_and_leaves_no_partial_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.safetensors"
    safetensors_file.write_safetensors(path, TENSORS, {})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(OSError, match=r"x\.safetensors could not be written: .* is unchanged"):
            safetensors_file.write_safetensors(path, {"big": torch.zeros(1 << 20)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_folder_in_the_place_of_the_file_is_reported_and_left_alone(tmp_path):
    (tmp_path / "x.safetensors" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="could not be written"):
        safetensors_file.write_safetensors(tmp_path / "x.safetensors", TENSORS, {})
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_file_can_be_replaced_while_its_tensors_are_in_use(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_file.write_safetensors(path, TENSORS, {})
    old, _ = safetensors_file.read_safetensors(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(old["a"], TENSORS["a"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"x\.safetensors is an empty file \(0 bytes\)"),
        (b"{}", r"x\.safetensors is not a safetensors file"),
        (b"\x00\x00\x00\x80\x00\x00\x00\x00{}", r"header should take 2,147,483,648 bytes and the whole file has 10"),
        (b"\xff" * 8 + b"{" * 100, r"header should take 18,446,744,073,709,551,615 bytes"),
        (b"PK\x03\x04" + b"a zip, as torch.save writes it" * 40, r"x\.safetensors is not a safetensors file"),
        (b"\x08" + b"\x00" * 7 + b"[1,2,3] ", r"x\.safetensors is not a safetensors file"),
        (b"\x08" + b"\x00" * 7 + b"{broken ", r"x\.safetensors is damaged"),
    ],
)
def test_other_and_damaged_files_are_refused(tmp_path, content, sentence):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        safetensors_file.read_safetensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("x.safetensors was not found")):
        safetensors_file.read_safetensors(tmp_path / "x.safetensors")


def test_every_truncated_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_file.write_safetensors(path, TENSORS, {})
    blob = path.read_bytes()
    for length in range(0, len(blob), 7):
        path.write_bytes(blob[:length])
        with pytest.raises(ValueError, match=r"x\.safetensors is"):
            safetensors_file.read_safetensors(path)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_gives_tensors_or_a_value_error(tmp_path_factory, position, byte):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    safetensors_file.write_safetensors(path, TENSORS, {})
    blob = bytearray(path.read_bytes())
    blob[position % len(blob)] = byte
    path.write_bytes(blob)
    try:
        tensors, _ = safetensors_file.read_safetensors(path)
    except ValueError as error:
        assert "fuzzed.safetensors is" in str(error)
    else:
        assert len(tensors) == len(TENSORS)


@pytest.mark.parametrize("metadata", [{"steps": 100}, {7: "seven"}, {"nothing": None}])
def test_metadata_that_is_not_text_is_refused(tmp_path, metadata):
    with pytest.raises(TypeError, match="Metadata must be text"):
        safetensors_file.write_safetensors(tmp_path / "x.safetensors", TENSORS, metadata)
    assert os.listdir(tmp_path) == []


def test_metadata_over_one_mebibyte_is_refused_and_the_key_named(tmp_path):
    with pytest.raises(ValueError, match=r"Shorten 'notes' \(1,100,000 characters\)"):
        safetensors_file.write_safetensors(
            tmp_path / "x.safetensors", TENSORS, {"short": "x", "notes": "n" * 1_100_000}
        )
    assert os.listdir(tmp_path) == []


def test_the_thumbnail_is_dropped_if_the_header_gets_too_long(tmp_path, caplog):
    metadata = {"modelspec.thumbnail": "t" * 600_000, "aclora.trajectory": "r" * 600_000, "title": "ink"}
    with caplog.at_level(logging.WARNING, logger="aclora"):
        safetensors_file.write_safetensors(tmp_path / "x.safetensors", TENSORS, metadata)
    header, length, _ = header_of(tmp_path / "x.safetensors")
    assert length <= safetensors_file.HEADER_LIMIT
    assert "modelspec.thumbnail" not in header["__metadata__"]
    assert header["__metadata__"]["aclora.trajectory"] == metadata["aclora.trajectory"]
    assert "'modelspec.thumbnail' is left out" in caplog.text


def test_a_file_with_thousands_of_layers_can_be_written(tmp_path):
    tensors = {f"{'block.' * 20}{index}": torch.tensor(float(index)) for index in range(6000)}
    safetensors_file.write_safetensors(tmp_path / "x.safetensors", tensors, {"title": "wide"})
    read, metadata = safetensors_file.read_safetensors(tmp_path / "x.safetensors")
    assert len(read) == 6000 and metadata["title"] == "wide"
