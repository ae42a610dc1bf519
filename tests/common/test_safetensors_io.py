from __future__ import annotations

import psutil
import pytest
import safetensors.torch
import torch

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors, streamed_file, write_streamed

TENSORS = {
    "scalar": torch.tensor(3.5),
    "bytes": torch.arange(7, dtype=torch.uint8),  # odd length: what follows must stay aligned
    "bf16": torch.randn(3, 5).bfloat16(),
    "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "fp8_wide": torch.randn(4, 4).to(torch.float8_e5m2),
    "empty": torch.empty(0, 3),
    "transposed": torch.randn(4, 6).t(),
    "index": torch.arange(5),
    "flags": torch.tensor([True, False]),
}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def test_written_files_are_what_the_safetensors_package_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(TENSORS, path, {"b": "1", "a": "ü"})
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(same(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"b": "1", "a": "ü"}


def test_files_of_the_safetensors_package_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({n: t.contiguous() for n, t in TENSORS.items()}, path, {"k": "v"})
    file = SafetensorsFile(path)
    assert file.metadata == {"k": "v"}
    assert {name: (i.dtype, i.shape) for name, i in file.tensors.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()
    }
    assert all(same(tensor, TENSORS[name]) for name, tensor in file.read())


def test_the_same_content_gives_the_same_bytes(tmp_path):
    metadata = {f"key{i}": str(i) for i in range(10)}
    save_safetensors(TENSORS, tmp_path / "a.safetensors", metadata)
    save_safetensors(TENSORS, tmp_path / "b.safetensors", dict(reversed(metadata.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_read_casts_floating_point_only_and_in_file_order(tmp_path, monkeypatch):
    monkeypatch.setattr("musubi_tuner.common.safetensors_io.STAGING_BYTES", 16)  # several chunks a tensor
    path = tmp_path / "x.safetensors"
    save_safetensors(TENSORS, path)
    file = SafetensorsFile(path)
    read = list(file.read(["index", "bf16", "transposed", "fp8"], dtype=torch.float32))
    order = list(file.tensors)
    assert [name for name, _ in read] == sorted((n for n, _ in read), key=order.index)
    for name, tensor in read:
        expected = TENSORS[name] if name == "index" else TENSORS[name].float()
        assert same(tensor, expected)


def test_streamed_writing_checks_what_was_announced(tmp_path):
    path = tmp_path / "x.safetensors"
    infos = {"a": (torch.float32, (2,)), "b": (torch.bfloat16, (3,))}
    a, b = torch.ones(2), torch.ones(3, dtype=torch.bfloat16)
    write_streamed(path, infos, iter([("b", b), ("a", a)]))
    before = path.read_bytes()
    for bad in ([("a", a)], [("a", a), ("a", a)], [("a", a.double()), ("b", b)]):
        with pytest.raises(ValueError, match="announced"):
            write_streamed(path, infos, iter(bad))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_metadata_may_be_known_last(tmp_path):
    path, infos = tmp_path / "x.safetensors", {"a": (torch.float32, (2,))}
    with streamed_file(path, infos, {"hash": "0000"}) as file:
        file.write("a", torch.ones(2))
        with pytest.raises(ValueError, match="length"):
            file.describe({"hash": "a" * 20})
        file.describe({"hash": "abcd"})
        assert not path.exists()
    with safetensors.safe_open(path, "pt") as written:
        assert written.metadata() == {"hash": "abcd"}
        assert torch.equal(written.get_tensor("a"), torch.ones(2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"GGUF" + bytes(100), "not a safetensors file"),
        (b"\x02" + bytes(7) + b"[]", "not a safetensors file"),
        (b"\xff\x01" + bytes(6) + b'{"a":', "truncated within its header"),
        (b"\x10" + bytes(7) + b'{"a":{"x":1}}   ', "bad header entry for 'a'"),
    ],
)
def test_foreign_and_damaged_files_are_told(tmp_path, content, message):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        SafetensorsFile(path)


def test_a_truncated_file_is_told_before_anything_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        SafetensorsFile(path)


def test_missing_files_and_folders_are_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        SafetensorsFile(tmp_path / "no.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        SafetensorsFile(tmp_path)


def test_reading_keeps_no_more_resident_than_is_kept(tmp_path):
    path = tmp_path / "big.safetensors"
    size = 16 * 2**20
    infos = {f"t{i}": (torch.uint8, (size,)) for i in range(16)}  # 256 MiB
    write_streamed(path, infos, ((name, torch.ones(size, dtype=torch.uint8)) for name in infos))
    process = psutil.Process()
    before = process.memory_info().rss
    peak = before
    kept = []
    for name, tensor in SafetensorsFile(path).read():
        peak = max(peak, process.memory_info().rss)
        if name == "t3":
            kept.append(tensor)
        del tensor
    assert kept[0].numel() == size
    # Kept, being read, and what the allocator has not given back; a map would hold all 16.
    assert peak - before < 9 * size


def test_tensors_are_read_into_memory_that_is_given(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.arange(6.0).view(2, 3), "y": torch.arange(4, dtype=torch.int32)}
    save_safetensors(tensors, path)
    given = {}

    def allocate(name, info):
        given[name] = torch.full(info.shape, 7).to(info.dtype)
        return given[name]

    read = dict(SafetensorsFile(path).read(allocate=allocate))
    assert all(read[name] is given[name] and torch.equal(read[name], tensors[name]) for name in tensors)
