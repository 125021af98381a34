"""What is said of files of parameters that are cut short or altered."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from foldcore import checkpoint
from foldcore.deepmind import PREFIX
from parity import params
from tests.test_params import SMALL, load, random_params


def written(path: Path) -> Path:
    params.write(path, params.Parameters(random_params(SMALL), SMALL))
    return path


def largest_member(path: Path) -> zipfile.ZipInfo:
    with zipfile.ZipFile(path) as archive:
        return max(archive.infolist(), key=lambda info: info.file_size)


def message(path: Path) -> str:
    with pytest.raises(params.EXPECTED) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_altered_member_of_a_pt_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "x.pt")
    load(path)
    member = largest_member(path)
    content = bytearray(path.read_bytes())
    middle = member.header_offset + member.file_size // 2 + 200
    content[middle : middle + 100] = bytes(100)
    path.write_bytes(content)
    assert message(path) == (
        f"{path}: damaged: its member {member.filename!r} does not match its checksum (CRC-32)"
    )


def test_cut_pt_is_told_in_one_sentence(tmp_path: Path) -> None:
    path = written(tmp_path / "x.pt")
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 1, 100):
        path.write_bytes(whole[:size])
        reason = "the table of contents at its end cannot be read"
        assert message(path) == f"{path}: cut short or damaged: {reason}"


def test_array_at_the_cut_of_a_npz_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "x.npz")
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first, second, third = archive.infolist()[:3]
    names = [info.filename.removesuffix(".npy") for info in (first, second)]
    assert names[0].startswith(PREFIX)
    for size, place in [
        (third.header_offset - 1, f"within array {names[1]!r}"),
        (third.header_offset, f"after array {names[1]!r}"),
        (second.header_offset + 10, f"after array {names[0]!r}"),
    ]:
        path.write_bytes(whole[:size])
        assert message(path) == f"{path}: cut short {place}"


@pytest.mark.parametrize("folder", [False, True])
def test_array_at_the_cut_of_a_safetensors_is_named(tmp_path: Path, folder: bool) -> None:
    path = written(tmp_path / ("x" if folder else "x.safetensors"))
    file = path / checkpoint.TENSORS if folder else path
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    names = sorted(checkpoint.load_file(file))  # safetensors' order: all of one dtype
    sizes = np.cumsum([checkpoint.load_file(file)[name].nbytes for name in names])
    for index in (0, 3, len(names) - 1):
        file.write_bytes(whole[: header + int(sizes[index]) - 1])
        assert message(path) == f"{file}: cut short: array {names[index]!r} is not whole"
    file.write_bytes(whole)
    load(path)


@pytest.mark.parametrize("ending", [".pt", ".npz"])
def test_altered_name_of_a_member_is_refused(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"x{ending}")
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2")  # the last one of the directory
    content[entry + 9] |= 0x08  # names are UTF-8
    content[entry + 46] = 0xF5  # which no character begins with
    path.write_bytes(content)
    assert message(path).startswith(f"{path}: c")
