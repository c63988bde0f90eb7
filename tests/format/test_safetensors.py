"""The writer of safetensors: read back by itself and by MLX, whole or not at all."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin.storage.safetensors import NUMPY_DTYPES, Tensor, read_header, write, write_tensors

ARRAYS = {
    name: np.arange(-3, 9).astype(dtype).reshape(3, 4)
    for name, dtype in NUMPY_DTYPES.items()
    if name not in ("BF16", "F8_E4M3")
}


def test_every_dtype_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "a.safetensors"
    tensors = {f"größe.{name}": Tensor.of(array) for name, array in ARRAYS.items()}
    write_tensors(file, tensors)
    header, other = read_header(file), mx.load(str(file))
    for name, array in ARRAYS.items():
        info = header[f"größe.{name}"]
        assert info.dtype == name and np.array_equal(info.array(), array) and info.read() == array.tobytes()
        assert np.array_equal(np.array(other[f"größe.{name}"]), array)
    assert {info.file for info in header.values()} == {file} and list(tmp_path.iterdir()) == [file]
    assert min(info.start for info in header.values()) % 8 == 0


def test_floats_of_every_kind(tmp_path):
    file, values = tmp_path / "a.safetensors", np.array([[1.5, -2.0, 3.140625]], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    stored = {
        "BF16": Tensor("BF16", (1, 3), bits.tobytes()),
        "F32": Tensor.of(values),
        "I16": Tensor.of(bits.view("i2")),
    }
    write_tensors(file, {**stored, "F16": Tensor.of(values.astype(np.float16))})
    header = read_header(file)
    for name in ("F16", "BF16", "F32"):
        assert np.array_equal(header[name].floats(), values)
    with pytest.raises(ValueError, match="a.safetensors: a tensor is I16; F16, BF16 or F32 is wanted"):
        header["I16"].floats()


@pytest.mark.parametrize("data", [[b"1234"], [b"1234567"], [b"12345678", b"1"], []], ids=len)
def test_data_of_other_sizes_leave_nothing(tmp_path, data):
    with pytest.raises(ValueError):
        write(tmp_path / "a.safetensors", [("a", "F32", (2,))], data)
    assert not list(tmp_path.iterdir())


def test_a_file_that_shrank(tmp_path):
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": Tensor.of(np.zeros(8, np.float32))})
    info = read_header(file)["a"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends early: 32 bytes wanted at .*, 31 there"):
        info.read()
