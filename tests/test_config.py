"""Configuration: every shipped file loads, mistakes are named, and values survive a round trip."""

from pathlib import Path

import pytest

from foldcore.config import Config, ConfigError, dumps, load
from jaxfold.step import Network

CONFIGS = sorted(Path("configs").resolve().glob("*.toml")) or sorted(
    (Path(__file__).parent.parent / "configs").glob("*.toml")
)


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
