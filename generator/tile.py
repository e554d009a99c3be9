"""TileConfig (how a kernel computes), Variant (one source, one artifact) and the Space that says which are legal.

A space belongs to one template. The template's knobs live in its TileConfig class, their legality and the numbers that
the template prints live in its Space; the builder, the tuner and the CLI know no knob by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Protocol, cast

from jagtile.generator.spec import Direction, KernelSpec
from jagtile.runtime.errors import IllegalConfigError

Knob = int | str | bool


@dataclass(frozen=True, order=True)
class TileConfig:
    """Base of all tile configs. Each field is a knob with a small finite domain; ``short`` metadata names it.

    ``name`` is canonical and can be parsed back: ``persistent_m128_n128_s2``. A knob at its default, if it has one, is
    left out of names and records: those from before the knob existed mean what they meant.
    """

    algorithm: ClassVar[str]

    @property
    def name(self) -> str:
        """Canonical name: the algorithm and every knob that is said, in field order."""
        knobs = (f"{f.metadata['short']}{_text(getattr(self, f.name))}" for f in self._said())
        return "_".join((self.algorithm, *knobs))

    def to_dict(self) -> dict[str, Knob]:
        """The config as plain JSON values, the algorithm included."""
        return {"algorithm": self.algorithm, **{f.name: getattr(self, f.name) for f in self._said()}}

    def _said(self) -> list[Field[Knob]]:
        """The fields that are not at their default; most have none."""
        return [f for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default]


def _text(value: Knob) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


class Space(Protocol):
    """The tile configs of one template for one target."""

    target: str
    algorithm: str
    template: str  # path below templates/
    config_type: type[TileConfig]

    def serves(self, spec: KernelSpec) -> str | None:
        """None where the template can compute the spec, else the reason why it can't."""
        ...

    def knobs(self, spec: KernelSpec) -> Mapping[str, tuple[Knob, ...]]:
        """The finite domain of every field of ``config_type``, most promising values first."""
        ...

    def rejection(self, spec: KernelSpec, config: TileConfig) -> str | None:
        """None where the config is legal for the spec, else the rule it breaks with its arithmetic."""
        ...

    def default(self, spec: KernelSpec) -> TileConfig:
        """The safe config where nothing is recorded."""
        ...

    def context(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, object]:
        """Every derived number or name the template prints, beside ``spec``, ``config`` and ``symbol``."""
        ...

    def launch(self, spec: KernelSpec, config: TileConfig) -> Mapping[str, int]:
        """What the launcher must know (threads, shared memory, block sizes); stored in the artifact's metadata."""
        ...

    def compile_flags(self, spec: KernelSpec, config: TileConfig) -> tuple[str, ...]:
        """Flags beyond the target's own, e.g. instruction-set flags; part of the artifact's key."""
        ...

    def predicted_registers(self, spec: KernelSpec, config: TileConfig) -> int:
        """Registers a thread, by arithmetic (0 where the target has no such limit)."""
        ...


@dataclass(frozen=True)
class Rule:
    """What the values of a few knobs forbid, whatever the others are. A space that has ``rules(spec)`` applies them in
    its ``rejection``; where the grid is gone through, one that is broken cuts off all that the other knobs could be.
    """

    knobs: tuple[str, ...]
    reason: Callable[..., str | None]  # of these knobs' values

    def broken_by(self, config: TileConfig) -> str | None:
        """The reason against a config, if it breaks the rule."""
        return self.reason(*(getattr(config, knob) for knob in self.knobs))


@dataclass(frozen=True)
class Variant:
    """(target, spec, config): one rendered source, one artifact."""

    target: str
    spec: KernelSpec
    config: TileConfig

    @property
    def name(self) -> str:
        """Readable and unique, e.g. ``sm_90a/fwd_bf16_d128_causal/persistent_m128_n128_s2``."""
        return f"{self.target}/{self.spec.name}/{self.config.name}"

    @property
    def symbol(self) -> str:
        """The C symbol of the kernel."""
        return f"jagtile_{self.spec.name}_{self.config.name}"

    @cached_property
    def space(self) -> Space:
        """The space that the config belongs to."""
        return space_for(self.target, self.config.algorithm)

    def check(self) -> None:
        """Raise IllegalConfigError, with the reason, unless the space serves the spec and allows the config."""
        reason = refusal(self.space, self.spec) or self.space.rejection(self.spec, self.config)
        if reason:
            raise IllegalConfigError(f"{self.name}: {reason}")

    @staticmethod
    def parse(name: str) -> Variant:
        """The variant of a canonical ``target/spec/config`` name."""
        try:
            target, spec, config = name.split("/")
        except ValueError:
            raise ValueError(f"variant {name!r} is not target/spec/config") from None
        return Variant(target, KernelSpec.parse(spec), parse_config(target, config))


def spaces() -> tuple[Space, ...]:
    """All spaces, in order of preference within a target."""
    from jagtile.generator.spaces import ALL

    return ALL


def targets() -> tuple[str, ...]:
    """The targets that have at least one space."""
    return tuple(dict.fromkeys(space.target for space in spaces()))


def space_for(target: str, algorithm: str) -> Space:
    """The space of one algorithm on one target; ValueError lists what exists."""
    for space in spaces():
        if (space.target, space.algorithm) == (target, algorithm):
            return space
    known = ", ".join(f"{space.target}/{space.algorithm}" for space in spaces())
    raise ValueError(f"no algorithm {algorithm!r} for target {target!r}; known: {known}")


def direction_of(space: Space) -> Direction:
    """What a space's template computes: its ``direction``, the forward where it has none."""
    return getattr(space, "direction", "fwd")


def refusal(space: Space, spec: KernelSpec) -> str | None:
    """None where a space's template computes the spec, else the reason why it can't. Dropout is computed only where a
    space's ``dropout`` is true.
    """
    direction = direction_of(space)
    if spec.direction != direction:
        return f"it computes {direction} specs only"
    if spec.dropout and not getattr(space, "dropout", False):
        return "it computes no dropout"
    return space.serves(spec)


def regimes_of(space: Space) -> tuple[str, ...]:
    """The regimes that a space is meant for before others, by a ``regimes`` of its own; none unless it says so."""
    return cast("tuple[str, ...]", getattr(space, "regimes", ()))


def remark_on(space: Space, heads: int, heads_kv: int) -> str:
    """What a space says, by a ``remark`` of its own, that it makes of a call's heads; "" for nothing."""
    remark = getattr(space, "remark", None)
    return "" if remark is None else str(remark(heads, heads_kv))


def spaces_of(target: str, spec: KernelSpec) -> tuple[Space, ...]:
    """The spaces of a target whose template can compute the spec."""
    return tuple(space for space in spaces() if space.target == target and refusal(space, spec) is None)


def config_from_dict(target: str, values: Mapping[str, object]) -> TileConfig:
    """The config of a ``to_dict`` mapping; ValueError names an unknown, missing or ill-typed knob."""
    space = space_for(target, str(values.get("algorithm")))
    wanted = {f.name: type_name for f in fields(space.config_type) for type_name in (str(f.type),)}
    given = {name: value for name, value in values.items() if name != "algorithm"}
    optional = {f.name for f in fields(space.config_type) if f.default is not MISSING}
    if unlike := (wanted.keys() ^ given.keys()) - (optional - given.keys()):
        listed = ", ".join(sorted(unlike))
        raise ValueError(f"{target}/{space.algorithm} has the knobs {', '.join(wanted)}; missing or unknown: {listed}")
    for name, value in given.items():
        if type(value).__name__ != wanted[name]:
            raise ValueError(f"{target}/{space.algorithm}: {name} must be {wanted[name]}, got {value!r}")
    return space.config_type(**cast("dict[str, Knob]", given))


def recorded_variant(target: str, spec: KernelSpec, values: Mapping[str, object]) -> tuple[Variant | None, str]:
    """A recorded ``to_dict`` mapping as a legal variant, or None and the reason why it is none (any more)."""
    try:
        variant = Variant(target, spec, config_from_dict(target, values))
        variant.check()
    except ValueError as error:
        return None, str(error)
    return variant, ""


def parse_config(target: str, name: str) -> TileConfig:
    """The config of a canonical config name."""
    algorithm, _, rest = name.partition("_")
    space = space_for(target, algorithm)
    values: dict[str, Knob] = {}
    parts = rest.split("_") if rest else []
    all_fields = fields(space.config_type)
    for field in all_fields:
        short = str(field.metadata["short"])
        if parts and parts[0].startswith(short):
            text = parts.pop(0)[len(short) :]
            values[field.name] = text if field.type == "str" else bool(int(text)) if field.type == "bool" else int(text)
        elif field.default is MISSING:
            break
    if parts or any(f.default is MISSING and f.name not in values for f in all_fields):
        raise ValueError(f"config {name!r} is not of the form {'_'.join((algorithm, *map(_form, all_fields)))}")
    return space.config_type(**values)


def _form(knob: Field[Knob]) -> str:
    """How a name says a knob, in brackets where it may leave it out."""
    text = f"{knob.metadata['short']}<{knob.name}>"
    return text if knob.default is MISSING else f"[{text}]"


def all_configs(space: Space, spec: KernelSpec) -> Iterator[TileConfig]:
    """Every point of the space's grid, legal or not."""
    knobs = space.knobs(spec)
    for values in itertools.product(*knobs.values()):
        yield space.config_type(**dict(zip(knobs, values, strict=True)))


def legal_configs(space: Space, spec: KernelSpec) -> list[TileConfig]:
    """Every legal point of the space's grid."""
    return list(_legal_configs(cast(Hashable, space), spec))


@lru_cache(maxsize=32)  # a search asks for every regime, and the largest grids have more than a million points
def _legal_configs(space: Any, spec: KernelSpec) -> tuple[TileConfig, ...]:
    knobs: Mapping[str, tuple[Knob, ...]] = space.knobs(spec)
    names, found = list(knobs), list[TileConfig]()
    rules: dict[str, list[Rule]] = {name: [] for name in names}
    for rule in space.rules(spec) if hasattr(space, "rules") else ():
        rules[max(rule.knobs, key=names.index)].append(rule)  # it is asked once all of its knobs have values

    def extend(given: dict[str, Knob]) -> None:
        if len(given) == len(names):
            config = space.config_type(**given)
            if space.rejection(spec, config) is None:
                found.append(config)
            return
        name = names[len(given)]
        for value in knobs[name]:
            values = {**given, name: value}
            if all(rule.reason(*(values[knob] for knob in rule.knobs)) is None for rule in rules[name]):
                extend(values)

    extend({})
    return tuple(found)
