"""The configuration: engine fields and transforms, YAML fragments deep-merged over ``default.yaml``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError

from adkit.contract import ConfigError, EngineConfig, nearest
from adkit.passes import PassConfig, get_pass

Fragment = str | Path | Mapping[str, Any]


class AdkitConfig(EngineConfig):
    """Engine fields, and ``transforms``: each transform's config by key, in pipeline order."""

    transforms: dict[str, SerializeAsAny[PassConfig]] = Field(default_factory=dict)

    @property
    def engine(self) -> EngineConfig:
        """The engine fields alone."""
        return EngineConfig(**{name: getattr(self, name) for name in EngineConfig.model_fields})

    def usable_device(self) -> torch.device:
        """The device meant; ConfigError when this machine has no such device."""
        device = self.resolved_device()
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"device is {self.device!r} but torch sees {torch.cuda.device_count()} CUDA devices; use "
                "'auto' or 'cpu'"
            )
        return device

    def to_yaml(self) -> str:
        """The whole configuration as YAML; transform fields at their defaults are left out."""
        data = self.model_dump(mode="json", exclude={"transforms"})
        data["transforms"] = {
            key: {
                "stage": config.stage.value,
                **config.model_dump(mode="json", exclude_defaults=True, exclude={"stage"}),
            }
            for key, config in self.transforms.items()
        }
        return yaml.safe_dump(data, sort_keys=False)


def load_config(
    fragments: Iterable[Fragment] = (), overrides: Sequence[str] = (), **engine: Any
) -> AdkitConfig:
    """``default.yaml``, then each fragment (a YAML file or a mapping), then ``a.b.c=value`` overrides, then
    keywords.

    Settings of one transform merge field by field; a transform that ``default.yaml`` does not list comes
    after those of its stage. Raises ConfigError naming the nearest valid name for an unknown key, and the
    field for a value that cannot be.
    """
    merged = read_fragment(Path(str(files("adkit.passes") / "default.yaml")))
    for fragment in fragments:
        merged = deep_merge(merged, read_fragment(fragment))
    for text in overrides:
        merged = deep_merge(merged, parse_override(text))
    merged = deep_merge(merged, engine)
    return build_config(merged)


def build_config(data: Mapping[str, Any]) -> AdkitConfig:
    """Validate merged settings into a configuration."""
    fields = {k: v for k, v in data.items() if k != "transforms"}
    for key in fields:
        if key not in EngineConfig.model_fields:
            raise ConfigError(
                f"unknown setting {key!r}{nearest(str(key), (*EngineConfig.model_fields, 'transforms'))}"
            )
    given = data.get("transforms")
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"transforms must map transform keys to their fields, not be a {type(given).__name__}"
        )
    engine = _validate(EngineConfig, fields, "engine settings")
    transforms: dict[str, PassConfig] = {}
    for key, values in given.items():
        cls = get_pass(str(key))
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"transforms.{key} must be a mapping of fields, not {values!r}; to switch it off: "
                f"transforms.{key}.enabled=false"
            )
        transforms[key] = transform_config(key, cls.Config, {"stage": cls.stage, **values})
    return AdkitConfig(**engine.model_dump(), transforms=transforms)


def transform_config(key: str, cls: type[PassConfig], values: Mapping[str, Any]) -> PassConfig:
    """The config of transform ``key``; ConfigError for unknown fields and impossible values."""
    for name in values:
        if name not in cls.model_fields:
            raise ConfigError(f"transforms.{key} has no field {name!r}{nearest(str(name), cls.model_fields)}")
    config: PassConfig = _validate(cls, values, f"transforms.{key}")
    return config


def _validate(cls: type[BaseModel], values: Mapping[str, Any], where: str) -> Any:
    try:
        return cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name, given = ".".join(str(p) for p in first["loc"]), first["input"]
        expected = re.findall(r"'([^']*)'", str(first.get("ctx", {}).get("expected", "")))
        hint = nearest(given, expected) if isinstance(given, str) and expected else ""
        hint = hint if "did you mean" in hint else ""  # the message itself lists what is known
        raise ConfigError(
            f"{where}: {name} = {given!r}: {first['msg'][:1].lower()}{first['msg'][1:]}{hint}"
        ) from None


def read_fragment(fragment: Fragment) -> dict[str, Any]:
    """A mapping as it is, or the mapping a YAML file holds."""
    if isinstance(fragment, Mapping):
        return dict(fragment)
    if not isinstance(fragment, (str, Path)):
        raise ConfigError(
            f"a fragment of the configuration is {fragment!r}; expected a mapping or a YAML file"
        )
    path = Path(fragment)
    if not path.is_file():
        raise ConfigError(f"no configuration file {str(path)!r}; give a YAML file or a mapping")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path.name} is not valid YAML: {_one_line(error)}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path.name} must hold a mapping, not a {type(data).__name__}")
    return data


def parse_override(text: str) -> dict[str, Any]:
    """``transforms.fuse_gemms.enabled=false`` as a nested mapping; the value is read as YAML."""
    if not isinstance(text, str):
        raise ConfigError(f"override {text!r} is not a string of the form a.b.c=value")
    key, sep, value = text.partition("=")
    parts = key.strip().split(".")
    if not sep or not all(parts):
        raise ConfigError(f"override {text!r} is not of the form a.b.c=value")
    try:
        result: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {_one_line(error)}") from None
    for part in reversed(parts):
        result = {part: result}
    return dict(result)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, which would silently drop the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``: mappings merge key by key, anything else replaces; an empty key keeps a
    mapping."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, Mapping) and (value is None or isinstance(value, Mapping)):
            value = deep_merge(old, value or {})
        result[key] = value
    return result
