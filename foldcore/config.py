"""Run configuration: frozen dataclasses, read from TOML, the same file for both tracks.

``load(path, overrides)`` merges a file with command-line assignments such as ``train.steps=10``;
both are TOML. An unknown key, a value of the wrong type or one outside ``limits.py`` raises
:class:`ConfigError` naming what is allowed, or the nearest valid key.
Defaults are the paper's initial training (Jumper et al. 2021, supplement 1.11).
"""

import difflib
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeVar

from foldcore import limits

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration file or override that cannot be used; says where, and what to write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes of the network (supplement section 1); symbols as in the supplement."""

    c_m: int = 256  # MSA channels
    c_z: int = 128  # pair channels
    c_s: int = 384  # single channels
    c_e: int = 64  # extra-MSA channels
    c_t: int = 64  # template-pair channels
    evoformer_blocks: int = 48
    extra_msa_blocks: int = 4
    template_blocks: int = 2
    structure_iterations: int = 8
    msa_heads: int = 8
    msa_head_dim: int = 32
    extra_msa_heads: int = 8
    extra_msa_head_dim: int = 8
    pair_heads: int = 4
    pair_head_dim: int = 32
    template_pair_heads: int = 4
    template_pair_head_dim: int = 16
    template_pointwise_heads: int = 4
    template_pointwise_head_dim: int = 16
    outer_product_hidden: int = 32
    triangle_hidden: int = 128
    template_triangle_hidden: int = 64
    transition_factor: int = 4
    template_transition_factor: int = 2
    ipa_heads: int = 12
    ipa_scalar_dim: int = 16
    ipa_query_points: int = 4
    ipa_value_points: int = 8
    sidechain_channels: int = 128
    plddt_channels: int = 128
    max_relative_position: int = 32  # relpos is clipped to +- this (Alg. 4)
    templates_enabled: bool = True
    pae_enabled: bool = False  # the predicted-aligned-error head of the *_ptm models
    msa_dropout: float = 0.15
    pair_dropout: float = 0.25
    structure_dropout: float = 0.1
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"  # trunk weights and activations
    matmul_precision: Literal["ieee", "tf32"] = "tf32"  # for the float32 products that remain
    recompute: Literal["none", "block"] = (
        "none"  # "block": recompute each block in the backward pass
    )
    unroll: bool = False  # JAX: write out the blocks of the pass with gradient, not loop over them
    implementation: Literal["reference", "triton"] = "reference"  # which kernels ops.py runs

    def __post_init__(self) -> None:
        sizes = {f.name: limits.COUNT for f in fields(self) if f.type is int}
        _check(self, sizes | limits.MODEL)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where examples come from and how they are cut (supplement section 1.2)."""

    # "embedded", a packed store, or a raw source: a folder in OpenProteinSet / OpenFold layout, or
    # whatever else foldcore.data.prepare can pack, URLs included
    path: str = "embedded"
    distillation_path: str = ""  # optional second source, self-distillation structures
    # raw sources are packed before training: "auto" those of more than 200 alignments, and those
    # that cannot be read otherwise, once, into a store in ~/.cache/twinfold (or TWINFOLD_CACHE)
    pack: Literal["auto", "always", "never"] = "auto"
    distillation_probability: float = 0.75  # share of examples from the second source
    validation_path: str = (
        ""  # empty: held out of `path` by split.tsv or by a hash of the linkage group
    )
    validation_fraction: float = 0.1
    crop_size: int = 256
    num_msa_clusters: int = 124  # cluster rows; the templates' torsion rows come on top
    num_extra_msa: int = 1024
    num_templates: int = 4
    max_template_hits: int = 20
    max_template_date: str = "2018-04-30"  # used where the chain's own release date is unknown
    masked_msa_fraction: float = 0.15
    block_deletion_fraction: float = 0.3
    block_deletion_count: int = 5
    max_msa_rows: int = 16384  # rows read per alignment file; more are counted in the report
    distillation_msa_rows: int = 1000
    # of the B-factor column, 0..100: atoms of residues at or below it are masked in the second
    # source, as OpenFold does (the paper: KL-divergence confidence below 0.5); -1 masks none
    distillation_min_plddt: float = 50.0
    unclamped_fraction: float = 0.1  # share of examples with unclamped backbone FAPE
    max_resolution: float = 9.0  # angstrom
    max_single_residue_fraction: float = 0.8
    accept_unknown: bool = False  # keep chains of unknown resolution or date
    cluster_weighting: Literal["inverse", "inverse_sqrt", "none"] = "inverse"
    min_length: int = 10  # residues
    workers: int = 4  # loader processes; 0 prepares in the training process
    prefetch: int = 16  # batches prepared ahead; of large ones fewer: 64 examples, or 2 batches
    ordered: bool = False  # wait for slow examples, so that the order is always the plan's
    reorder_window: int = 1024  # examples of a rank that may overtake a slow one
    example_timeout: float = 600.0  # seconds, after which a loader process counts as hung
    replay: str = ""  # a run folder: take the examples that its ledger lists

    def __post_init__(self) -> None:
        _check(self, limits.DATA)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the loss terms (supplement section 1.9); 0 switches a term off."""

    backbone_fape: float = 0.5
    sidechain_fape: float = 0.5
    chi: float = 0.5
    angle_norm: float = 0.01
    violation: float = 0.0
    distogram: float = 0.3
    masked_msa: float = 2.0
    plddt: float = 0.01
    experimentally_resolved: float = 0.0
    aligned_error: float = 0.0
    scale_by_sqrt_length: bool = True  # multiply an example's loss by sqrt(residues in the crop)
    ca_c_n_stddev: float = 0.0311  # cosine; 0.014 reproduces AlphaFold 2.0.0 and OpenFold
    min_resolution: float = 0.1  # angstrom; confidence losses count within these
    max_resolution: float = 3.0
    accept_unknown_resolution: bool = False  # unknown resolution (0) passes that window

    def __post_init__(self) -> None:
        _check(self, limits.LOSS)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Adam, its schedule, clipping and the averaged weights (supplement section 1.11.3)."""

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    warmup_start: float = 0.0  # learning rate at step 0
    warmup_steps: int = 1000
    decay_after_steps: int = 50_000  # 0: never
    decay_factor: float = 0.95
    clip: Literal["example", "global"] = "example"  # before, or after, the mean over examples
    clip_norm: float = 0.1
    ema_decay: float = 0.999
    ema_warmup: bool = False  # decay = min(ema_decay, (1 + n) / (10 + n))

    def __post_init__(self) -> None:
        _check(self, limits.OPTIMIZER)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run: length, seed, and when it logs, evaluates and saves."""

    name: str = "initial_training"  # the run folder is out/name
    out: str = "runs"
    steps: int = 75_000
    seed: int = 0
    batch_size: int = 128  # examples a step over all devices
    max_recycling_iters: int = 3  # extra passes are drawn from 0..this
    dropout: bool = True
    log_every: int = 10
    eval_every: int = 1000  # 0: only at the end
    eval_chains: int = 64
    eval_recycling_iters: int = 3
    save_every: int = 1000
    keep: int = 3  # newest checkpoints kept
    deterministic: bool = False
    cuda_graphs: bool = True  # PyTorch on a GPU: capture the whole step in CUDA graphs
    # PyTorch on a GPU, what torch.compile sees: nothing, all but the trunk's blocks, or these too
    compile: Literal["none", "structure", "blocks"] = "none"
    initial_params: str = (
        ""  # to start from: a DeepMind params_model_*.npz, a run or one of its checkpoints
    )

    def __post_init__(self) -> None:
        _check(self, limits.TRAIN)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that identifies a run; written beside its checkpoints as ``config.toml``."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.model.templates_enabled != (self.data.num_templates > 0):
            raise ConfigError(
                f"model.templates_enabled={self.model.templates_enabled} but data.num_templates="
                f"{self.data.num_templates}: set num_templates to 0 or templates_enabled=true"
            )
        if self.data.num_extra_msa == 0:
            raise ConfigError("data.num_extra_msa=0: the extra-MSA stack needs at least 1 row")
        if self.loss.aligned_error and not self.model.pae_enabled:
            raise ConfigError("loss.aligned_error needs model.pae_enabled=true")


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a TOML file and apply ``section.key=value`` overrides, each a TOML assignment."""
    tree = _parse(_read(path), str(path))
    for override in overrides:
        _merge(tree, _parse_override(override))
    return _build(Config, tree, "")


def dumps(config: Config) -> str:
    """The whole configuration as TOML; ``load`` reads it back to an equal value."""
    lines = []
    for section, values in asdict(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this configuration: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot read this configuration: {error}") from None


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from None


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override {text!r}: write section.key=value, e.g. train.steps=10")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        pass  # a bare word on a shell command line is a string: data.path=/my/data
    if value.strip().startswith(("[", "{", '"', "'")):
        raise ConfigError(f"override {text!r}: the value is not valid TOML")
    return _parse(f"{key}={_toml(value)}", f"override {text!r}")


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _build(cls: type[T], tree: Any, where: str) -> T:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where.rstrip('.')}: expected a section, got {tree!r}")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ConfigError(f"unknown key {where + key!r}; {_nearest(key, where, hints)}")
    values = {key: _convert(hints[key], value, where + key) for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, value, where + ".")  # type: ignore[arg-type]
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{where}: {value!r} is not one of {list(typing.get_args(hint))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is str and type(value) is date:  # as TOML reads YYYY-MM-DD without quotes
        return value.isoformat()
    if type(value) is not hint:
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _nearest(key: str, where: str, hints: dict[str, Any]) -> str:
    everywhere = {
        f.name: f"{s.name}.{f.name}" for s in fields(Config) for f in fields(_section(s.name))
    }
    if key in everywhere:  # without its section
        return f"did you mean {everywhere[key]!r}?"
    if close := difflib.get_close_matches(key, hints, n=1, cutoff=0.5):
        return f"did you mean {where + close[0]!r}?"
    if close := difflib.get_close_matches(key, everywhere, n=1, cutoff=0.6):
        return f"did you mean {everywhere[close[0]]!r}?"
    return f"valid keys: {', '.join(hints)}"


def _section(name: str) -> Any:
    return typing.get_type_hints(Config)[name]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _check(section: object, rules: Mapping[str, limits.Rule]) -> None:
    if mistake := limits.mistake(section, rules):
        raise ConfigError(mistake)
