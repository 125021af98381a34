"""The C side of a launch, called by XLA on the host, with a driver that has no GPU."""

import ctypes
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton

from jaxfold import _launcher
from jaxfold._launcher import TARGET, Kernel
from jaxfold.ops import UnsupportedOp

HEADERS = f"{Path(triton.__file__).parent}/backends/nvidia/include"
SIZE = 5


class Driver:
    """The launcher and the driver it found."""

    def __init__(self, folder: Path) -> None:
        path = folder / "libfake_cuda.so"
        source = Path(__file__).with_name("fake_cuda.c")
        command = ["gcc", "-shared", "-fPIC", f"-I{HEADERS}", "-o", str(path), str(source)]
        subprocess.run(command, check=True)
        self.driver = ctypes.CDLL(str(path))
        built = _launcher.build(folder, "-DWITHOUT_STREAMS", "-Wall", "-Wextra", "-Werror")
        self.library = _launcher.load(built, str(path))
        _launcher.register(self.library, "cpu")

    def __getattr__(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.driver, name).value

    def refuse(self, refuse: bool) -> None:
        ctypes.c_int.in_dll(self.driver, "refuse").value = refuse

    def add(
        self,
        key: str,
        *,
        inputs: int = 1,
        scalars: int = 0,
        outputs: int = 1,
        overlapped: bool = False,
    ) -> None:
        image = struct.pack("4i", inputs, scalars, outputs, SIZE)
        _launcher.add(self.library, Kernel(key, "sum", image, 128, 50_000, overlapped))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    yield Driver(tmp_path_factory.mktemp("launcher"))


def launch(
    key: str,
    *inputs: jax.Array,
    outputs: int = 1,
    grid: tuple[int, ...] = (1, 1, 1),
    scalars: np.ndarray | None = None,
    in_place: dict[int, int] | None = None,
) -> tuple[jax.Array, ...]:
    shapes = [jax.ShapeDtypeStruct((SIZE,), np.float32)] * outputs
    given = {} if scalars is None else {"scalars": scalars}
    call = jax.ffi.ffi_call(TARGET, shapes, input_output_aliases=in_place)
    return tuple(call(*inputs, kernel=key, grid=np.array(grid, np.int32), **given))


def array(*, start: float = 0) -> jax.Array:
    return jnp.arange(SIZE, dtype=jnp.float32) + start


def test_arguments_arrive_in_the_order_of_a_launch(driver: Driver) -> None:
    driver.add("all", inputs=2, scalars=2, outputs=2)
    scalars = np.array([np.float32(-0.5).view(np.int32), -7], np.int64)

    def run(x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        return launch("all", x, y, outputs=2, grid=(2, 3, 4), scalars=scalars)

    first, second = jax.jit(run)(array(), array(start=10))
    np.testing.assert_array_equal(first, 2 * array() + 10 - 0.5 - 7 + 24)
    np.testing.assert_array_equal(second, first + 1)
    assert (driver.threads, driver.shared, driver.dynamic) == (128, 50_000, 50_000)
    assert not driver.relaxed


def test_a_kernel_is_loaded_once(driver: Driver) -> None:
    driver.add("once")
    loads, launches = driver.loads, driver.launches
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: launch("once", y)[0], x))
    np.testing.assert_array_equal(program(array()), array(start=3))
    driver.add("once", inputs=0)  # a key that is known keeps its kernel
    np.testing.assert_array_equal(jax.jit(lambda x: launch("once", x)[0])(array()), array(start=1))
    assert (driver.loads, driver.launches) == (loads + 1, launches + 4)


def test_a_launch_overlaps_the_one_before_if_its_kernel_says_so(driver: Driver) -> None:
    for overlapped in (True, False, True):
        key = f"overlapped: {overlapped}"
        driver.add(key, overlapped=overlapped)
        jax.block_until_ready(jax.jit(lambda x, key=key: launch(key, x)[0])(array()))
        assert driver.overlapped == overlapped


def test_an_output_takes_the_place_of_a_donated_input(driver: Driver) -> None:
    driver.add("in place")
    program = jax.jit(lambda x: launch("in place", x, in_place={0: 0})[0], donate_argnums=0)
    x = jax.device_put(np.arange(SIZE, dtype=np.float32)) + 0  # memory of JAX's own, not numpy's
    place = x.unsafe_buffer_pointer()
    assert "output_to_operand_aliasing" in program.lower(x).compile().as_text()
    result = program(x)
    assert result.unsafe_buffer_pointer() == place
    np.testing.assert_array_equal(result, array(start=1))


def test_an_unknown_kernel_is_named(driver: Driver) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="kernel gone is not compiled.*delete JAX"):
        jax.jit(lambda x: launch("gone", x))(array())


def test_what_the_driver_says_is_reported(driver: Driver) -> None:
    driver.add("refused")
    driver.refuse(True)
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="launch .* refused: invalid argument"):
            jax.jit(lambda x: launch("refused", x))(array())
    finally:
        driver.refuse(False)


@pytest.mark.parametrize("wrong", [{"grid": (1, 1)}, {"scalars": np.zeros(1, np.int32)}])
def test_a_wrong_call_is_refused(driver: Driver, wrong: dict) -> None:
    driver.add("wrong")
    with pytest.raises(jax.errors.JaxRuntimeError, match="called wrongly"):
        jax.jit(lambda x: launch("wrong", x, **wrong))(array())


def test_too_many_arguments_are_refused(driver: Driver) -> None:
    driver.add("many")
    with pytest.raises(jax.errors.JaxRuntimeError, match="called wrongly"):
        jax.jit(lambda x: launch("many", *[x] * 64))(array())


def test_without_a_driver_the_error_says_so(driver: Driver, tmp_path: Path) -> None:
    built = _launcher.build(tmp_path)
    with pytest.raises(UnsupportedOp, match=r"NVIDIA's driver: .*libmissing\.so"):
        _launcher.load(built, "libmissing.so")
    with pytest.raises(UnsupportedOp, match="NVIDIA's driver: cuGetErrorString"):
        _launcher.load(built, str(built))


def test_without_a_compiler_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnsupportedOp, match="install gcc"):
        _launcher.build(tmp_path)
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(UnsupportedOp, match="/bin/false cannot compile"):
        _launcher.build(tmp_path)


def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = _launcher.build(tmp_path)
    monkeypatch.setenv("CC", "/bin/false")
    assert _launcher.build(tmp_path) == built
    assert [path.name for path in tmp_path.iterdir()] == [built.name]
