"""Configs of the language models: reading and writing the config.json of published checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

from moe_ops._fields import Fields, overridden
from moe_ops.layers.rotary import Yarn

# As a default, it stands for the default of the config's field.
OWN: Any = object()


class Key(NamedTuple):
    """Name of a field in config.json and the method that reads it.

    method: of `Fields`. names: the first one is written, all are read. options: of the method.
    """

    method: str
    names: tuple[str, ...]
    options: dict[str, Any]

    def read(self, published: Fields, own: Any) -> Any:
        options = {n: own if value is OWN else value for n, value in self.options.items()}
        return getattr(published, self.method)(*self.names, **options)


def size(*names: str, **options: Any) -> Key:
    return Key("size", names, options)


def number(*names: str, **options: Any) -> Key:
    return Key("number", names, options)


def flag(*names: str, **options: Any) -> Key:
    return Key("flag", names, options)


# Names derived from Llama's config.
LLAMA_KEYS = {
    "vocab_size": size("vocab_size"),
    "hidden_size": size("hidden_size"),
    "num_layers": size("num_hidden_layers"),
    "context": size("max_position_embeddings", default=OWN),
    "norm_eps": number("rms_norm_eps", default=OWN, least=0),
    "init_std": number("initializer_range", default=OWN, least=0),
}
# The sizes of `LatentAttention`.
LATENT_KEYS = {
    "q_rank": size("q_lora_rank", default=None),
    "kv_rank": size("kv_lora_rank"),
    "nope_size": size("qk_nope_head_dim"),
    "rope_size": size("qk_rope_head_dim"),
    "v_size": size("v_head_dim"),
}

Config = TypeVar("Config", bound="LMConfig")


@dataclass(frozen=True)
class LMConfig:
    """Sizes and options shared by all language models, with reading and writing.

    Attributes:
        vocab_size: V.
        hidden_size: H.
        num_layers: blocks.
        context: context length in training; not enforced.
        init_std: of the weights.
        KEYS: field -> its `Key` in config.json. `rope_theta` and `yarn` are not in it: a config
            that has them reads and writes them as `published_rope` and `publish_rope` do.
        FIXED: entries of config.json with only one supported value.
        LOSSES: names of the auxiliary losses; the coefficient of each is the field of its name with
            "_coefficient" behind it.
    """

    KEYS: ClassVar[Mapping[str, Key]]
    FIXED: ClassVar[Mapping[str, Any]] = {}
    LOSSES: ClassVar[tuple[str, ...]] = ()

    vocab_size: int = 256
    hidden_size: int = 64
    num_layers: int = 2
    context: int = field(default=128, kw_only=True)
    init_std: float = field(default=0.02, kw_only=True)

    def aux_coefficients(self) -> dict[str, float]:
        """Returns coefficients of auxiliary losses by name."""
        return {name: getattr(self, f"{name}_coefficient") for name in self.LOSSES}

    @classmethod
    def read_more(cls, published: Fields) -> dict[str, Any]:
        """Returns values of fields that `KEYS` does not read."""
        return {}

    def write_more(self) -> dict[str, Any]:
        """Returns entries of config.json in addition to `KEYS`, or replacing them."""
        return {}

    @classmethod
    def from_published(cls: type[Config], published: Mapping[str, Any], **overrides: Any) -> Config:
        """Creates a config from the contents of a published config.json, with some fields replaced.

        Raises:
            ValueError: an entry that is missing, of another type or range, or not supported.
        """
        read = Fields(published, cls.__name__)
        for name, wanted in cls.FIXED.items():
            read.must_be(name, wanted)
        names = _names(cls)
        values = {name: key.read(read, getattr(cls, name)) for name, key in cls.KEYS.items()}
        values |= cls.read_more(read)
        if "rope_theta" in names:
            values["rope_theta"], yarn = published_rope(read)
            if "yarn" in names:
                values["yarn"] = yarn
            elif yarn is not None:
                raise ValueError(f"{cls.__name__}: rope_scaling must be none, got yarn.")
        return overridden(cls(**values), {n: _tuples(value) for n, value in overrides.items()})

    def to_published(self) -> dict[str, Any]:
        """Returns the contents of config.json, with the published names."""
        written = {key.names[0]: getattr(self, name) for name, key in self.KEYS.items()}
        written |= self.FIXED
        if "rope_theta" in _names(type(self)):
            written |= publish_rope(getattr(self, "rope_theta"), getattr(self, "yarn", None))  # noqa: B009
        return written | self.write_more()


def _names(config_class: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def _tuples(value: Any) -> Any:
    """Converts lists to tuples: JSON has lists where configs have tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def published_rope(config: Fields) -> tuple[float, Yarn | None]:
    """Returns theta and YaRN scaling from a published config.json, stored in `rope_parameters`, or
    in `rope_theta` and `rope_scaling`.

    Raises:
        ValueError: a scaling other than YaRN.
    """
    older, newer = config.section("rope_scaling"), config.section("rope_parameters")
    read = Fields({**older.values, **newer.values}, config.reader, "rope_scaling")
    theta = config.number("rope_theta", default=10_000.0, above=1)
    theta = read.number("rope_theta", default=theta, above=1)
    kind = read.choice("rope_type", "type", of=("default", "yarn"), default="default")
    if kind == "default":
        return theta, None
    old = read.size("original_max_position_embeddings")
    if "factor" in read:
        factor = read.number("factor", above=0)
    else:
        factor = config.size("max_position_embeddings") / old
    yarn = Yarn(
        factor=factor,
        original_context=old,
        beta_fast=read.number("beta_fast", default=32.0, above=0),
        beta_slow=read.number("beta_slow", default=1.0, above=0),
        mscale=read.number("mscale", default=0.0, least=0),
        mscale_all_dim=read.number("mscale_all_dim", default=0.0, least=0),
    )
    return theta, yarn


def publish_rope(theta: float, yarn: Yarn | None) -> dict[str, Any]:
    """Returns the entries of config.json that `published_rope` reads, in both styles."""
    kind, fields, scaling = "default", {}, None
    if yarn is not None:
        kind, fields = "yarn", dataclasses.asdict(yarn)
        fields["original_max_position_embeddings"] = fields.pop("original_context")
        scaling = {"type": kind, **fields}
    parameters = {"rope_type": kind, "rope_theta": theta, **fields}
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}
