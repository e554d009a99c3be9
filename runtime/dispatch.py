"""(spec, regime, device) -> variant, a pure function of the recorded choices, with the answer of every look-up step.

Order: the user's choices for this device, those of kernel packs for it, the shipped ones for it, the nearest
relative's (in the same order); on a GPU the same for the spec's twin in the other 16-bit dtype, as fast on tensor
cores; with dropout the same for the spec without it; the safe default of the space that is meant for the regime, else
of the first one. A regime without an entry takes its neighbour's, where it has a neighbour (``problem.LOOK_UPS``),
else the spec's default entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import jagtile.generator.spaces  # noqa: F401 - every first call needs them: not in its time
from jagtile.generator.spec import DType, KernelSpec
from jagtile.generator.tile import Variant, direction_of, recorded_variant, refusal, regimes_of, spaces, spaces_of
from jagtile.runtime.device import DeviceId, relatives
from jagtile.runtime.errors import UnsupportedError
from jagtile.runtime.problem import LookUp, Problem, look_up, look_up_of

if TYPE_CHECKING:
    from jagtile.tuning_db.schema import Choices, DeviceFacts

Origin = Literal["user", "shipped"]
ORIGINS: tuple[Origin, ...] = ("user", "shipped")
_TWINS: dict[DType, DType] = {"bf16": "fp16", "fp16": "bf16"}


class ChoiceSource(Protocol):
    """What dispatch reads; ``jagtile.tuning_db.store.Database`` is one."""

    def choices(self, origin: Origin, slug: str) -> Choices | None: ...

    def devices(self, origin: Origin) -> Sequence[DeviceFacts]: ...


class PackedChoices(Protocol):
    """Of a kernel pack what dispatch reads; ``jagtile.runtime.pack.Pack`` is one."""

    choices: Choices

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Step:
    """One look-up and its answer."""

    place: str  # e.g. "user choices for sm90-132sm"
    answer: str  # "taken: ...", "nothing recorded", "skipped: ..."


@dataclass(frozen=True)
class Decision:
    """The variant to run and how it was found."""

    variant: Variant
    look_up: LookUp
    source: str  # "user", "pack:<name>", "shipped", "relative:<slug>" or "default"
    steps: tuple[Step, ...]
    chosen_for: str = ""  # the regime of the look-up whose choice it is; "" where it is a default

    @property
    def regime(self) -> str:
        """The regime that was asked for."""
        return self.look_up[0]

    @property
    def is_borrowed(self) -> bool:
        """Whether it serves a regime that has a neighbour, and is not chosen for that regime itself."""
        return len(self.look_up) > 1 and self.chosen_for != self.regime


def choose(problem: Problem, device: DeviceId, database: ChoiceSource, packs: Sequence[PackedChoices] = ()) -> Decision:
    """The variant for a problem on a device. UnsupportedError where no space of the device's target serves the spec."""
    return choose_by_look_up(problem.spec, look_up(problem, device.target), device, database, packs)


def choose_for_regime(
    spec: KernelSpec, regime: str, device: DeviceId, database: ChoiceSource, packs: Sequence[PackedChoices] = ()
) -> Decision:
    """As ``choose``, for a regime by name."""
    return choose_by_look_up(spec, look_up_of(regime), device, database, packs)


def choose_by_look_up(
    spec: KernelSpec, look_up: LookUp, device: DeviceId, database: ChoiceSource, packs: Sequence[PackedChoices] = ()
) -> Decision:
    """As ``choose``, for regimes in the order in which they are asked for."""
    default = default_variant(spec, device.target, look_up[-1])
    steps: list[Step] = []
    for recorded in recorded_as(spec, device.target):
        for source, place, choices in _places(device, database, packs):
            entry = None if choices is None else choices.specs.get(f"{device.target}/{recorded.name}")
            if entry is None:
                if recorded == spec:
                    steps.append(Step(place, "nothing recorded" if choices is None else f"no entry for {spec.name}"))
                continue
            for regime, config in entry.serving(look_up):
                name = f"regime {regime}" if regime else "the spec's default entry"
                if recorded != spec:
                    name = f"{recorded.name}, {name}"
                variant, why_not = recorded_variant(device.target, spec, config)
                if variant is not None:
                    steps.append(Step(place, f"taken: {name}, {variant.config.name}"))
                    return Decision(variant, look_up, source, tuple(steps), regime)
                steps.append(Step(place, f"skipped: {name}: {why_not}"))
    steps.append(Step(f"default of {device.target}/{default.space.algorithm}", f"taken: {default.config.name}"))
    return Decision(default, look_up, "default", tuple(steps))


def default_variant(spec: KernelSpec, target: str, regime: str | None = None) -> Variant:
    """The safe variant of a spec: the default of the first space that serves it, one that is meant for the regime
    before the others. UnsupportedError with all reasons.
    """
    serving = spaces_of(target, spec)
    for space in (*(space for space in serving if regime in regimes_of(space)), *serving):
        return Variant(target, spec, space.default(spec))
    reasons: dict[str | None, list[str]] = {}
    for space in spaces():
        if space.target == target and direction_of(space) == spec.direction:
            reasons.setdefault(refusal(space, spec), []).append(space.algorithm)
    why = "; ".join(f"{', '.join(algorithms)}: {reason}" for reason, algorithms in reasons.items())
    raise UnsupportedError(
        f"no kernel for {spec.name} on target {target}: {why or f'the target has no {spec.direction} templates'}"
    )


def packed_variants(
    spec: KernelSpec, look_up: LookUp, device: DeviceId, packs: Sequence[PackedChoices]
) -> tuple[Variant, ...]:
    """The legal variants of a spec that packs name, those for the look-up first: for who can have no other."""
    found: dict[Variant, None] = {}
    for pack in packs:
        entry = pack.choices.specs.get(f"{device.target}/{spec.name}")
        if entry is not None:
            for config in (*(config for _, config in entry.serving(look_up)), *entry.regimes.values()):
                variant, _ = recorded_variant(device.target, spec, config)
                if variant is not None:
                    found[variant] = None
    return tuple(found)


def recorded_as(spec: KernelSpec, target: str) -> Iterator[KernelSpec]:
    """The specs whose choices fit, the spec itself first."""
    yield spec
    twin = _TWINS.get(spec.dtype)
    if twin is not None and target.startswith("sm_"):
        yield replace(spec, dtype=twin)
    if spec.dropout:
        yield from recorded_as(replace(spec, dropout=False), target)


def _places(
    device: DeviceId, database: ChoiceSource, packs: Sequence[PackedChoices]
) -> Iterator[tuple[str, str, Choices | None]]:
    for origin, name, choices in _of(device.slug, database, packs):
        yield origin, f"{name} for {device.slug}", choices
    known = {facts.slug: facts for origin in reversed(ORIGINS) for facts in database.devices(origin)}
    known = {pack.choices.device.slug: pack.choices.device for pack in packs} | known
    for relative in relatives(device, known.values()):
        for _, name, choices in _of(relative.slug, database, packs):
            if choices is not None:
                yield f"relative:{relative.slug}", f"{name} for the relative {relative.slug}", choices


def _of(slug: str, database: ChoiceSource, packs: Sequence[PackedChoices]) -> Iterator[tuple[str, str, Choices | None]]:
    """(source, its name, choices) of all that may have choices for a device, in look-up order."""
    yield "user", "user choices", database.choices("user", slug)
    for pack in packs:
        if pack.choices.device.slug == slug:
            yield f"pack:{pack.name}", "pack choices", pack.choices
    yield "shipped", "shipped choices", database.choices("shipped", slug)
