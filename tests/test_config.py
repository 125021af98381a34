"""Configuration: every shipped file loads, mistakes are named, and values survive a round trip."""

from dataclasses import asdict
from pathlib import Path

import pytest

from foldcore import limits
from foldcore.config import Config, ConfigError, dumps, load
from jaxfold.step import Network

CONFIGS = sorted(Path("configs").resolve().glob("*.toml")) or sorted(
    (Path(__file__).parent.parent / "configs").glob("*.toml")
)
DEFAULTS = {f"{s}.{k}": v for s, values in asdict(Config()).items() for k, v in values.items()}
TEXTS = "train.name", "data.max_template_date"
NO_NAMES = '""', '" "', ".", "..", "a/../../b", "a/b/..", "/tmp/x"
NO_DATES = '""', '"2018"', '"20180430"', "2018-4-30", "2018-02-30", "30-04-2018", "yesterday"
SHARES = [key for key, rule in limits.DATA.items() if rule is limits.SHARE]
WEIGHTS = [key for key, rule in limits.LOSS.items() if rule is limits.NOT_NEGATIVE][:-1]
COUNTS = "steps", "batch_size", "log_every", "eval_chains", "save_every", "keep"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_open_with_their_provenance(path: Path) -> None:
    config = load(path)
    assert config.train.name == path.stem
    head = path.read_text().split("[", 1)[0]
    assert head.startswith(f"# {path.stem}: ")
    for entry in ("Source:", "Command:", "Hardware:", "Expected:"):
        assert f"# {entry}" in head


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_dumped_config_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load(path, ["train.name='it is \"quoted\"'", "train.steps=7"])
    (tmp_path / "config.toml").write_text(dumps(config))
    assert load(tmp_path / "config.toml") == config


def test_defaults_are_the_papers_initial_training() -> None:
    config = Config()
    assert config.data.crop_size == 256
    assert config.data.num_msa_clusters + config.data.num_templates == 128
    assert config.model.evoformer_blocks == 48
    assert config.optimizer.clip_norm == 0.1


def test_overrides_are_toml_assignments() -> None:
    config = load(CONFIGS[0], ["train.steps=10", "data.path=/my/data", "optimizer.learning_rate=1"])
    assert config.train.steps == 10
    assert config.data.path == "/my/data"
    assert config.optimizer.learning_rate == 1.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=10", ["'train.step'", "'train.steps'"]),
        ("steps=10", ["'steps'", "'train.steps'"]),
        ("train.steps=ten", ["train.steps", "int", "'ten'"]),
        ("train.steps=true", ["train.steps", "int", "True"]),
        ("train.steps", ["section.key=value"]),
        ("train=3", ["train", "section"]),
        ("model.dtype=float16", ["model.dtype", "bfloat16"]),
        ("data.path=[1,", ["not valid TOML"]),
        ("train.max_recycling_iters=4", ["max_recycling_iters=4", "0..3"]),
        ("model.evoformer_blocks=0", ["evoformer_blocks=0", "at least 1"]),
        ("data.num_templates=0", ["templates_enabled", "num_templates"]),
        ("data.num_extra_msa=0", ["num_extra_msa=0", "at least 1"]),
        ("loss.aligned_error=0.1", ["pae_enabled"]),
        ("zzz.qqq=1", ["'zzz'", "valid keys"]),
        ("crop_size=32", ["'data.crop_size'"]),
    ],
)
def test_mistakes_are_named(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(CONFIGS[0], [override])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("assignment", "allowed"),
    [
        *[(f"model.{key}=1.0", "lie in 0.0..0.99") for key in sorted(limits.MODEL)],
        *[(f"model.{key}=0", "be at least 1") for key in ("c_m", "msa_heads", "ipa_heads")],
        *[(f"data.{key}=1.5", "lie in 0.0..1.0") for key in SHARES],
        *[(f"data.{key}=nan", "lie in 0.0..1.0") for key in SHARES],
        ("data.crop_size=3", "lie in 4..100000"),
        ("data.num_msa_clusters=0", "lie in 1..100000"),
        ("data.num_extra_msa=-1", "lie in 0..1000000"),
        ("data.num_templates=-1", "lie in 0..1000000"),
        ("data.max_template_hits=-1", "be at least 0"),
        *[(f"data.max_template_date={text}", "be a date, YYYY-MM-DD") for text in NO_DATES],
        ("data.block_deletion_count=-1", "be at least 0"),
        ("data.max_msa_rows=0", "be at least 1"),
        ("data.distillation_msa_rows=0", "be at least 1"),
        ("data.distillation_min_plddt=nan", "lie in -1.0..100.0"),
        ("data.max_resolution=-1.0", "be at least 0"),
        ("data.max_resolution=nan", "be at least 0"),
        ("data.min_length=-5", "be at least 0"),
        ("data.workers=-1", "lie in 0..1000000"),
        ("data.prefetch=0", "lie in 1..10000"),
        ("data.reorder_window=0", "lie in 1..1000000"),
        ("data.example_timeout=0", "lie in 0.01..1000000.0"),
        *[(f"loss.{key}=-0.1", "be finite and at least 0") for key in WEIGHTS],
        *[(f"loss.{key}=nan", "be finite and at least 0") for key in WEIGHTS],
        *[(f"loss.{key}=inf", "be finite and at least 0") for key in WEIGHTS],
        ("loss.ca_c_n_stddev=0", "be finite and greater than 0"),
        ("loss.min_resolution=inf", "be finite and at least 0"),
        ("loss.max_resolution=nan", "be at least 0"),
        *[
            (f"optimizer.{key}={value}", "be finite and greater than 0")
            for key in ("learning_rate", "clip_norm", "eps")
            for value in ("-1", "0", "nan", "inf", "-inf")
        ],
        ("optimizer.beta1=-0.1", "be at least 0 and less than 1"),
        ("optimizer.beta2=1", "be at least 0 and less than 1"),
        ("optimizer.warmup_start=-1e-5", "be finite and at least 0"),
        ("optimizer.warmup_start=inf", "be finite and at least 0"),
        ("optimizer.warmup_steps=-1", "be at least 0"),
        ("optimizer.decay_after_steps=-1", "be at least 0"),
        ("optimizer.decay_factor=nan", "lie in 0.0..1.0"),
        ("optimizer.ema_decay=1.1", "lie in 0.0..1.0"),
        *[(f"train.name={name}", "name a folder inside train.out") for name in NO_NAMES],
        *[(f"train.{key}=0", "lie in 1..1000000000000") for key in COUNTS],
        ("train.seed=-1", "be at least 0"),
        ("train.eval_every=-1", "be at least 0"),
        ("train.max_recycling_iters=4", "lie in 0..3"),
        ("train.eval_recycling_iters=-1", "lie in 0..3"),
    ],
)
def test_senseless_values_are_refused(assignment: str, allowed: str) -> None:
    key, value = assignment.split("=", 1)
    shown = value.strip('"') if key in TEXTS else str(type(DEFAULTS[key])(value))
    with pytest.raises(ConfigError) as error:
        load(CONFIGS[0], [assignment])
    assert str(error.value).startswith(f"{key}={shown}: must {allowed}")
    assert "\n" not in str(error.value)


def test_every_number_has_limits() -> None:
    """A new key cannot be forgotten; and no table names a key that is gone."""
    tables = {name: getattr(limits, name.upper()) for name in asdict(Config())}
    limited = {f"{section}.{key}" for section, table in tables.items() for key in table}
    assert limited <= DEFAULTS.keys()
    numbers = {key for key, value in DEFAULTS.items() if type(value) in (int, float)}
    sizes = {key for key in numbers if key.startswith("model.") and type(DEFAULTS[key]) is int}
    assert numbers - sizes == limited - set(TEXTS)


@pytest.mark.parametrize(
    "assignment",
    ["train.name=a/b", "train.name=run..2", "data.max_resolution=inf", "loss.max_resolution=inf"]
    + ["train.eval_every=0", "data.validation_fraction=1", "data.max_template_date=2024-02-29"],
)
def test_unusual_values_with_a_meaning_are_allowed(assignment: str) -> None:
    assert load(CONFIGS[0], [assignment])


def test_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[train\nsteps = 1")
    with pytest.raises(ConfigError, match=r"x\.toml.*line 1"):
        load(tmp_path / "x.toml")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.toml: .*: No such file or directory$"):
        load(tmp_path / "nothing.toml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_models_are_of_the_size_that_is_promised(path: Path) -> None:
    """In the README, in docs/results and in the files' own first lines."""
    full = 93_229_082
    sizes = {"demo": 696_234, "small": 3_361_618, "initial_training": full}
    sizes |= {"finetuning": full, "initial_training_mlperf": full}
    assert Network(load(path).model).layout.size == sizes[path.stem]
    assert sizes["small"] <= 4_000_000
