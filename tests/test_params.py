"""Conversion of parameters between our checkpoints, DeepMind's .npz and OpenFold's .pt."""

import functools
import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foldcore import checkpoint, openfold
from foldcore.config import Config, DataConfig, ModelConfig
from foldcore.deepmind import PREFIX, write_npz
from parity import params
from tests import openfold_names
from torchfold.evoformer import OuterProductMean
from torchfold.params import load_parameters
from torchfold.params import parameters as named_parameters
from torchfold.primitives import Attention
from torchfold.step import Network
from torchfold.triangle import TriangleMultiplicationIncoming, TriangleMultiplicationOutgoing

# every part, no two sizes alike where they could be confused
SMALL = ModelConfig(
    c_m=12,
    c_z=10,
    c_s=14,
    c_e=6,
    c_t=8,
    evoformer_blocks=3,
    extra_msa_blocks=2,
    template_blocks=2,
    msa_heads=2,
    msa_head_dim=5,
    extra_msa_heads=3,
    extra_msa_head_dim=7,
    pair_heads=3,
    pair_head_dim=2,
    template_pair_heads=2,
    template_pair_head_dim=3,
    template_pointwise_head_dim=3,
    outer_product_hidden=5,
    triangle_hidden=9,
    template_triangle_hidden=11,
    ipa_heads=3,
    ipa_scalar_dim=5,
    ipa_query_points=2,
    ipa_value_points=3,
    sidechain_channels=7,
    plddt_channels=9,
    max_relative_position=4,
    pae_enabled=True,
)
VARIANTS = {
    "model_1_ptm": SMALL,
    "model_1": replace(SMALL, pae_enabled=False),
    "model_3_ptm": replace(SMALL, templates_enabled=False),
    "model_3": replace(SMALL, templates_enabled=False, pae_enabled=False),
}
TRANSITION = "evoformer/evoformer_iteration/msa_transition/transition1//weights"
KEY = "evoformer.blocks.1.msa_transition.linear_1.weight"


def random_params(model: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    layout = Network(model).layout
    return {name: draw.standard_normal(shape, np.float32) for name, shape, _ in layout}


def assert_same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert two[name].dtype == array.dtype == np.float32
        assert two[name].shape == array.shape, name
        assert two[name].tobytes() == array.tobytes(), name


def save_pt(path: Path, arrays: dict[str, np.ndarray], **around: Any) -> Path:
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    torch.save({name: make(tensors) for name, make in around.items()} or tensors, path)
    return path


def load(path: Path) -> params.Parameters:
    return params.interpret(params.read(path))


# Names, by a second list --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("templates", "ptm", "count"),
    [(True, False, 93_229_082), (True, True, 93_237_338), (False, False, 92_899_674)],
)
def test_names_and_shapes_are_openfolds(templates: bool, ptm: bool, count: int) -> None:
    layout = Network(ModelConfig(templates_enabled=templates, pae_enabled=ptm)).layout
    ours = {key: place.shape for key, place in openfold.places(layout).items()}
    theirs = openfold_names.state_dict(templates, ptm)
    assert ours == theirs
    assert sum(math.prod(shape) for shape in theirs.values()) == count


@pytest.mark.parametrize("wrapper", ["", "model.", "module.model.", "_forward_module.model."])
def test_names_of_the_released_weights_are_understood(wrapper: str) -> None:
    released = openfold_names.state_dict(True, True, released=True)
    current = openfold_names.state_dict(True, True)
    assert len(released) == len(current) and released.keys() != current.keys()
    found = openfold.current_names(
        {wrapper + key: np.broadcast_to(np.float32(0), shape) for key, shape in released.items()}
    )
    assert {key: array.shape for key, array in found.items()} == current


def test_names_of_the_first_generation_are_understood() -> None:
    released = openfold_names.state_dict(True, True, released=True)
    first = {
        key.replace(".core.", ".")
        .replace("._msa_att.", ".")
        .replace("extra_msa_stack.", "extra_msa_stack.stack."): shape
        for key, shape in released.items()
    }
    assert len(first.keys() - released.keys()) > len(first) / 2
    found = openfold.current_names(
        {key: np.broadcast_to(np.float32(0), shape) for key, shape in first.items()}
    )
    assert found.keys() == openfold_names.state_dict(True, True).keys()


# What the arrays mean -----------------------------------------------------------------------------

BLOCK = "evoformer.blocks.0"


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return nn.functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    size = x.shape[-1:]
    return nn.functional.layer_norm(x, size, state[f"{name}.weight"], state[f"{name}.bias"])


@pytest.fixture(scope="module")
def both() -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """The same parameters by our names and by OpenFold's."""
    ours = random_params(SMALL)
    return ours, {k: torch.from_numpy(a) for k, a in openfold.to_openfold(ours).items()}


def layer(module: nn.Module, ours: dict[str, np.ndarray], scope: str) -> nn.Module:
    """A module of ours with the first layer's arrays under a scope of the Evoformer."""
    prefix = f"evoformer/evoformer_iteration/{scope}"
    names = {name: (prefix + name).replace("///", "//") for name in named_parameters(module)}
    load_parameters(module, {name: ours[place][0] for name, place in names.items()})
    return module


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("ours_class", "scope", "name", "product"),
    [  # Alg. 11 and 12, line 4
        (TriangleMultiplicationOutgoing, "outgoing", "tri_mul_out", "bikc,bjkc->bijc"),
        (TriangleMultiplicationIncoming, "incoming", "tri_mul_in", "bkic,bkjc->bijc"),
    ],
)
def test_triangle_multiplications_compute_the_same(
    both: tuple[dict[str, np.ndarray], dict[str, Tensor]],
    ours_class: type,
    scope: str,
    name: str,
    product: str,
) -> None:
    ours, state = both
    prefix = f"{BLOCK}.pair_stack.{name}."
    here = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    pair = noise(1, 6, 6, SMALL.c_z)
    z = norm(here, "layer_norm_in", pair)
    a = linear(here, "linear_a_g", z).sigmoid() * linear(here, "linear_a_p", z)
    b = linear(here, "linear_b_g", z).sigmoid() * linear(here, "linear_b_p", z)
    x = norm(here, "layer_norm_out", torch.einsum(product, a, b))
    expected = linear(here, "linear_g", z).sigmoid() * linear(here, "linear_z", x)

    module = layer(
        ours_class(SMALL.c_z, SMALL.triangle_hidden), ours, f"triangle_multiplication_{scope}/"
    )
    torch.testing.assert_close(module(pair, torch.ones(1, 6, 6)), expected)


def test_attention_computes_the_same(both: tuple[dict[str, np.ndarray], dict[str, Tensor]]) -> None:
    ours, state = both
    heads, name = SMALL.msa_heads, f"{BLOCK}.msa_att_row.mha"
    x = noise(1, 4, 6, SMALL.c_m)
    query, key, value, gate = (  # [b g h k d]: heads are the outer part of the wide axis
        linear(state, f"{name}.linear_{letter}", x).unflatten(-1, (heads, -1)).transpose(2, 3)
        for letter in "qkvg"
    )
    mixed = nn.functional.scaled_dot_product_attention(query, key, value) * gate.sigmoid()
    expected = linear(state, f"{name}.linear_o", mixed.transpose(2, 3).flatten(-2))

    c_m = SMALL.c_m
    scope = "msa_row_attention_with_pair_bias/attention/"
    module = layer(Attention(c_m, c_m, c_m, heads, SMALL.msa_head_dim), ours, scope)
    found = module.within(module.project(x), torch.ones(1, 4, 6), x)
    torch.testing.assert_close(found, expected)


def test_outer_product_mean_computes_the_same(
    both: tuple[dict[str, np.ndarray], dict[str, Tensor]],
) -> None:
    ours = {name: array.astype(np.float64) for name, array in both[0].items()}
    state = {key: value.double() for key, value in both[1].items()}
    name, msa = f"{BLOCK}.outer_product_mean", noise(1, 4, 6, SMALL.c_m).double()
    x = norm(state, f"{name}.layer_norm", msa)
    a, b = linear(state, f"{name}.linear_1", x), linear(state, f"{name}.linear_2", x)
    outer = torch.einsum("bsic,bsje->bijce", a, b).flatten(-2)
    weight, bias = state[f"{name}.linear_out.weight"], state[f"{name}.linear_out.bias"]
    # Alg. 10 with the norm of 4 rows, whose epsilon is 1e-3
    expected = (outer @ weight.T + bias) / (4 + 1e-3)

    module = OuterProductMean(SMALL.c_m, SMALL.c_z, SMALL.outer_product_hidden)
    found = layer(module, ours, "outer_product_mean/")(msa, torch.ones(1, 4, 6))
    torch.testing.assert_close(found, expected)


# Round trips --------------------------------------------------------------------------------------

ENDINGS = (".npz", ".pt", ".safetensors", "")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_direction_is_exact(tmp_path: Path, variant: str) -> None:
    original = random_params(VARIANTS[variant])
    paths = {ending: tmp_path / f"first{ending}" for ending in ENDINGS}
    for path in paths.values():
        params.write(path, params.Parameters(original, VARIANTS[variant]))
    for start in ENDINGS:
        for end in ENDINGS:
            again = tmp_path / f"again{start.replace('.', '_')}{end}"
            params.write(again, load(paths[start]))
            found = load(again)
            assert_same(found.params, original)
            assert params.layout_of(found.model) == params.layout_of(VARIANTS[variant])


def test_half_precision_is_widened(tmp_path: Path) -> None:
    state = openfold.to_openfold(random_params(SMALL))
    halves = {key: torch.from_numpy(array).bfloat16() for key, array in state.items()}
    torch.save(halves, tmp_path / "x.pt")
    found = openfold.to_openfold(load(tmp_path / "x.pt").params)
    for key, half in halves.items():
        np.testing.assert_array_equal(found[key], half.float().numpy())


def test_double_precision_is_kept_or_refused(tmp_path: Path) -> None:
    single = random_params(SMALL)
    write_npz(tmp_path / "exact.npz", {n: a.astype(np.float64) for n, a in single.items()})
    assert_same(load(tmp_path / "exact.npz").params, single)
    write_npz(tmp_path / "more.npz", single | {TRANSITION: single[TRANSITION] / np.float64(3)})
    with pytest.raises(ValueError, match=f"'{TRANSITION}' has float64 values beyond float32"):
        load(tmp_path / "more.npz")


# OpenFold's files ---------------------------------------------------------------------------------

WRAPPED: dict[str, tuple[dict[str, Callable[[dict[str, Tensor]], Any]], str]] = {
    "bare": ({}, ""),
    "ema": (
        {
            "state_dict": lambda t: {"model." + k: torch.zeros_like(v) for k, v in t.items()},
            "ema": lambda t: {"params": OrderedDict(t), "decay": 0.999},
            "global_step": lambda t: 7,
        },
        "averaged",
    ),
    "lightning": ({"state_dict": lambda t: {"model." + k: v for k, v in t.items()}}, "raw"),
    "deepspeed": ({"module": lambda t: {"module.model." + k: v for k, v in t.items()}}, "raw"),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_training_checkpoints(tmp_path: Path, form: str) -> None:
    original = random_params(SMALL)
    around, note = WRAPPED[form]
    path = save_pt(tmp_path / "x.ckpt", openfold.to_openfold(original), **around)
    assert params.read(path).note.startswith(note)
    assert_same(load(path).params, original)


def test_deepspeed_folder(tmp_path: Path) -> None:
    original = random_params(SMALL)
    (tmp_path / "global_step5").mkdir()
    (tmp_path / "latest").write_text("global_step5\n")
    file = tmp_path / "global_step5" / "mp_rank_00_model_states.pt"
    save_pt(file, openfold.to_openfold(original), **WRAPPED["deepspeed"][0])
    assert_same(load(tmp_path).params, original)


def test_fused_triangle_multiplications(tmp_path: Path) -> None:
    original = random_params(SMALL)
    state = openfold.to_openfold(original)
    for key in [key for key in state if ".linear_a_" in key]:
        both = state.pop(key), state.pop(key.replace(".linear_a_", ".linear_b_"))
        state[key.replace(".linear_a_", ".linear_ab_")] = np.concatenate(both)
    assert_same(load(save_pt(tmp_path / "x.pt", state)).params, original)


# Files that are wrong -----------------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda arrays: {k: v for k, v in arrays.items() if k != name}


def with_array(name: str, shape: tuple[int, ...], value: float = 0.0) -> Callable[..., Any]:
    return lambda arrays: arrays | {name: np.full(shape, value, np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(TRANSITION), f"'{TRANSITION}' is missing"),
        (with_array(TRANSITION, (3, 12, 47)), r"shape \(3, 12, 47\), .* needs \(3, 12, 48\)"),
        (with_array("a/b//bias", (2,)), "'a/b//bias' is not part of this model"),
        (with_array(TRANSITION, (3, 12, 48), math.nan), f"{TRANSITION}' contains non-finite"),
        # what tells a variant apart is missing in part
        (without("evoformer/template_projection//bias"), "template_projection//bias' is missing"),
        (without("predicted_aligned_error_head/logits//bias"), "logits//bias' is missing"),
    ],
)
def test_wrong_arrays_of_deepmind_files_are_named(
    tmp_path: Path, change: Callable[..., Any], message: str
) -> None:
    write_npz(tmp_path / "x.npz", change(random_params(SMALL)))
    with pytest.raises(ValueError, match=f"x.npz: .*{message}"):
        load(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(KEY), f"'{KEY}' is missing"),
        (with_array(KEY, (12, 48)), r"shape \(12, 48\), .* needs \(48, 12\)"),
        (with_array("lm_head.weight", (2, 2)), "'lm_head.weight' is not part of OpenFold's"),
        (with_array(KEY, (48, 12), math.inf), f"{KEY}' contains non-finite"),
        (with_array("model." + KEY, (48, 12)), "is there twice"),
    ],
)
def test_wrong_arrays_of_openfold_files_are_named(
    tmp_path: Path, change: Callable[..., Any], message: str
) -> None:
    save_pt(tmp_path / "x.pt", change(openfold.to_openfold(random_params(SMALL))))
    with pytest.raises(ValueError, match=f"x.pt: .*{message}"):
        load(tmp_path / "x.pt")


def test_sizes_are_not_believed_of_one_array() -> None:
    """A published network whose array that tells c_m is cut is not one of another c_m."""
    layout = Network(ModelConfig()).layout
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape, _ in layout}
    name = "evoformer/preprocess_msa//weights"
    arrays[name] = arrays[name][:, :7]
    stored = params.Stored(Path("x.npz"), "DeepMind .npz", arrays)
    with pytest.raises(ValueError, match=rf"'{name}' has shape \(49, 7\).* needs \(49, 256\)"):
        params.interpret(stored)


PUBLISHED = ModelConfig(template_blocks=2, evoformer_blocks=4)  # but for the blocks
ROW = "evoformer/evoformer_iteration/msa_row_attention_with_pair_bias"
PAIR = "evoformer/evoformer_iteration/pair_transition/transition1//weights"


@functools.cache
def zeros(model: ModelConfig, ending: str) -> dict[str, np.ndarray]:
    layout = Network(model).layout
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    if ending == ".pt":
        shapes = {key: place.shape for key, place in openfold.places(layout).items()}
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def refusal(arrays: dict[str, np.ndarray], ending: str) -> str:
    form = "OpenFold .pt" if ending == ".pt" else "DeepMind .npz"
    with pytest.raises(params.EXPECTED) as caught:
        params.interpret(params.Stored(Path("x"), form, arrays))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (PAIR, (4, 128, 500)),
        (PAIR, (4, 128, 128)),
        (f"{ROW}/attention//query_w", (4, 256, 8, 14)),
        (f"{ROW}/attention//query_w", (4, 256, 4, 32)),
        (f"{ROW}//feat_2d_weights", (4, 128, 4)),
    ],
)
def test_the_array_that_disagrees_with_the_others_is_named(
    name: str, shape: tuple[int, ...]
) -> None:
    right = zeros(PUBLISHED, ".npz")
    arrays = right | {name: np.broadcast_to(np.float32(0), shape)}
    said = re.escape(f"'{name}' has shape {shape}, but this model needs {right[name].shape}")
    assert re.search(said, refusal(arrays, ".npz"))


@pytest.mark.parametrize("ending", [".npz", ".pt"])
def test_half_of_any_array_is_named(ending: str) -> None:
    right = zeros(SMALL, ending)
    names = [name for name in right if ".blocks." not in name or ".blocks.0.msa" in name]
    for name in names:
        half = right[name][..., : right[name].shape[-1] // 2]
        assert f"array {name!r} has shape {half.shape}" in refusal(right | {name: half}, ending)


class Surprise:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


@pytest.mark.parametrize("ending", [".npz", ".pt", ".safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    params.write(path, params.Parameters(random_params(SMALL), SMALL))
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0x40
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:-1], whole[: 3 * 1024]):
        path.write_bytes(content)
        with pytest.raises(params.EXPECTED, match=f"x{ending}: "):
            load(path)
    if ending == ".npz":  # a .safetensors has no checksums; in a .pt, this byte may be padding
        path.write_bytes(changed)
        with pytest.raises(params.EXPECTED, match="CRC-32"):
            load(path)


def test_nothing_is_executed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Surprise()}, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", **{PREFIX + "a//b": np.array([Surprise()], object)})  # type: ignore[arg-type]
    for name, reason in (("x.pt", r"Python objects \((builtins.)?print\)"), ("x.npz", "a//b'")):
        with pytest.raises(params.EXPECTED, match=reason) as caught:
            load(tmp_path / name)
        assert "weights_only" not in str(caught.value)
    assert "executed" not in capfd.readouterr().out


def test_sizes_that_a_file_claims_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open(PREFIX + "a//b.npy", "w") as member:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**6)}
        np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs 4000000000000000 bytes, but has 0"):
        load(path)
    torch.save({"a": torch.zeros(1).expand(10**9, 10**6)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="'a' is larger than what is stored"):
        load(tmp_path / "x.pt")


# The command, and runs that start from what it writes ---------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = random_params(SMALL)
    write_npz(tmp_path / "a.npz", original)
    arguments = [str(tmp_path / name) for name in ("a.npz", "b.pt")]
    assert params.main(["convert", *arguments]) == 0
    count = sum(array.size for array in original.values())
    told, wrote = capsys.readouterr().out.splitlines()
    assert told.endswith(
        f"a.npz: DeepMind .npz, templates, PAE head, 3 blocks of its own sizes, "
        f"{len(original)} arrays, {count:,} parameters"
    )
    assert wrote == f"wrote {tmp_path / 'b.pt'}: OpenFold .pt"
    assert params.main(["show", arguments[1]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{KEY}  [48, 12]  float32" in lines and "OpenFold .pt, templates" in lines[-1]

    assert params.main(["convert", *arguments]) == 2  # nothing is overwritten
    told, error = capsys.readouterr()
    assert "b.pt: exists already" in error and not told  # before anything is read
    assert params.main(["convert", arguments[0], str(tmp_path / "c.bin")]) == 2
    told, error = capsys.readouterr()
    assert "c.bin: ends in none of .npz, .pt, .safetensors" in error and not told
    assert params.main(["show", str(tmp_path / "absent")]) == 2
    assert "absent: cannot be read" in capsys.readouterr().err
    assert params.main(["show", str(tmp_path)]) == 2
    assert "neither a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "no command is given: give show or convert"),
        (["transform", "a"], "'transform' is no command: give show or convert"),
        (["show"], "show: FILE missing"),
        (["convert"], "convert: IN and OUT missing"),
        (["convert", "a.npz"], "convert: OUT missing"),
    ],
)
def test_an_incomplete_command_is_told_what_is_missing(
    argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert params.main(argv) == 2
    error = capsys.readouterr().err
    assert "convert IN OUT" in error and error.endswith(f"\nerror: {problem}\n")


def test_sizes_named_by_a_configuration(tmp_path: Path) -> None:
    model = replace(SMALL, template_pointwise_heads=3, template_pointwise_head_dim=4)
    original = random_params(model)
    state = save_pt(tmp_path / "x.pt", openfold.to_openfold(original))
    text = tmp_path / "config.toml"
    text.write_text(params.dumps(Config(model=model)))
    assert params.main(["convert", str(state), str(tmp_path / "y.npz"), str(text)]) == 0
    assert_same(load(tmp_path / "y.npz").params, original)


def test_runs_start_from_converted_parameters(tmp_path: Path) -> None:
    import jaxfold.step
    import jaxfold.train
    import torchfold.train

    original = random_params(SMALL)
    state = save_pt(tmp_path / "x.pt", openfold.to_openfold(original))
    for name in ("y.npz", "y"):
        assert params.main(["convert", str(state), str(tmp_path / name)]) == 0
    run = tmp_path / "run" / "checkpoints" / checkpoint.step_name(3)
    params.write(run, load(state))
    expected = Network(SMALL).layout.flatten(original)
    for start in ("y.npz", "y", "run"):
        base = Config(model=SMALL, data=DataConfig())
        config = replace(base, train=replace(base.train, initial_params=str(tmp_path / start)))
        for track, network in ((torchfold, Network(SMALL)), (jaxfold, jaxfold.step.Network(SMALL))):
            found = track.train.make_state(config, network)
            for section in ("params", "ema"):
                np.testing.assert_array_equal(getattr(found, section), expected)
            assert not found.mu.any() and int(found.step) == 0
    with pytest.raises(checkpoint.CheckpointError, match="parity.params convert"):
        checkpoint.read_params(str(state), Network(SMALL).layout)


@pytest.mark.slow
def test_the_published_size(tmp_path: Path) -> None:
    model = ModelConfig(pae_enabled=True)
    write_npz(tmp_path / "params_model_1_ptm.npz", random_params(model))
    chain = ["params_model_1_ptm.npz", "b.pt", "c", "d.npz"]
    for source, target in zip(chain, chain[1:], strict=False):
        assert params.main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 0
    found = load(tmp_path / "d.npz")
    assert_same(found.params, random_params(model))
    assert params.variant(found.model) == "templates, PAE head, as model_1_ptm/model_2_ptm"
