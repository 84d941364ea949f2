"""Configuration: fragments, overrides, and what is refused."""

from __future__ import annotations

import pytest
import torch
import yaml

import adkit
from adkit.config import load_config
from adkit.contract import ConfigError, EngineConfig


def test_fragments_merge_in_order_and_overrides_come_last(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("max_seq_len: 100\ntransforms:\n  fuse_gemms: {enabled: false, skip_on_error: true}\n")
    two.write_text("max_seq_len: 200\npage_size: 8\ntransforms:\n  fuse_gemms: {enabled: true}\n")
    config = load_config(
        [one, two, {"page_size": 4}],
        ["max_batch_size=3", "transforms.fuse_moe.enabled=false"],
        dtype="float32",
    )
    assert (config.max_seq_len, config.page_size, config.max_batch_size, config.dtype) == (
        200,
        4,
        3,
        "float32",
    )
    fuse = config.transforms["fuse_gemms"]
    assert fuse.enabled
    assert fuse.skip_on_error, "fields that a later fragment does not name stay"
    assert not config.transforms["fuse_moe"].enabled
    assert load_config([two, one]).max_seq_len == 100


def test_an_empty_file_and_a_null_transform_change_nothing(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert load_config([empty, {"transforms": {"fuse_gemms": None}}]) == load_config()
    assert load_config([{"transforms": None}]) == load_config()


def test_the_yaml_it_writes_is_valid_input_and_says_the_same():
    config = load_config([], ["transforms.fuse_gemms.enabled=false", "max_seq_len=77"])
    again = load_config([yaml.safe_load(config.to_yaml())])
    assert again.to_yaml() == config.to_yaml()
    assert again == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_seq_length": 5}, "unknown setting 'max_seq_length'; did you mean 'max_seq_len'"),
        ({"transform": {}}, "did you mean 'transforms'"),
        ({1: 2}, "unknown setting 1"),
        ({"transforms": {"fuse_gems": {}}}, "no transform 'fuse_gems'; did you mean 'fuse_gemms'"),
        ({"transforms": {"fuse_gemms": {"enable": True}}}, "no field 'enable'; did you mean 'enabled'"),
        ({"transforms": {"fuse_gemms": False}}, "transforms.fuse_gemms.enabled=false"),
        ({"transforms": {"fuse_gemms": {"stage": "post_load_fuson"}}}, "did you mean 'post_load_fusion'"),
        ({"transforms": {"fuse_gemms": {"enabled": "perhaps"}}}, "enabled = 'perhaps'"),
        ({"transforms": ["fuse_gemms"]}, "must map transform keys"),
        ({"transforms": {"export_to_gm": {"attention": "interfaces"}}}, "did you mean 'interface'"),
        ({"max_seq_len": 0}, "max_seq_len = 0: .*greater than or equal to 1"),
        ({"max_batch_size": -3}, "max_batch_size = -3"),
        ({"page_size": "sixteen"}, "page_size = 'sixteen'"),
        ({"page_size": None}, "page_size = None"),
        ({"free_gpu_memory_fraction": 1.5}, "free_gpu_memory_fraction = 1.5"),
        ({"free_gpu_memory_fraction": 0}, "free_gpu_memory_fraction = 0"),
        ({"dtype": "float31"}, "dtype = 'float31'.*did you mean 'float32'"),
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"overlap": "x"}, "overlap = 'x': input should be 'auto', True or False$"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        load_config([given])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold a mapping, not a list"),
        ("max_seq_len: [1\n", "not valid YAML"),
        ("max_seq_len: 1\nmax_seq_len: 2\n", "'max_seq_len' is given twice"),
        ("transforms:\n  fuse_gemms: {enabled: false}\n  fuse_gemms: {}\n", "'fuse_gemms' is given twice"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config([path])
    assert "c.yaml" in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"no configuration file 'nowhere\.yaml'"):
        load_config(["nowhere.yaml"])


@pytest.mark.parametrize("text", ["max_seq_len", "=5", "a..b=1", "max_seq_len=[1"])
def test_an_override_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="override"):
        load_config([], [text])


def test_dtypes_and_devices_of_torch_become_their_names():
    config = load_config(dtype=torch.bfloat16, device=torch.device("cpu"))
    assert (config.dtype, config.device) == ("bfloat16", "cpu")
    assert yaml.safe_load(config.to_yaml())["dtype"] == "bfloat16"
    assert EngineConfig(device=torch.device("cuda", 1)).device == "cuda:1"
    with pytest.raises(ConfigError, match="dtype = 'int8': input should be 'auto'"):
        load_config(dtype=torch.int8)


@pytest.mark.parametrize("overlap", ["auto", True, False])
def test_overlap_is_auto_or_switched(overlap):
    assert load_config([], [f"overlap={overlap}"], overlap=overlap).overlap is overlap


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="CUDA devices; use 'auto' or 'cpu'"):
        load_config(device="cuda:99").usable_device()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": 5}, "fragment of the configuration is 5; expected a mapping or a YAML file"),
        ({"config": [None]}, "fragment of the configuration is None"),
        ({"overrides": 5}, "override 5 is not a string of the form a.b.c=value"),
        ({"overrides": [5]}, "override 5 is not a string"),
    ],
)
def test_settings_of_another_type_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        adkit.Workbench("demo", progress=False, **given)
