"""Every JAGTILE_* variable: typed, read from the environment at each access; an empty value counts as unset.

Reading a setting imports nothing heavy and touches no disk, but for the cache folder of who has no home. With
``settings.override`` other values hold for a while, for tests and for callers that know better than the environment;
they hold for the whole process, threads included.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from jagtile.runtime.errors import JagtileWarning, SettingError

T = TypeVar("T")
NATIVE_HOST = ("auto", "wait", "off")
Value = Path | str | int | bool | tuple[Path, ...] | None


@dataclass(frozen=True)
class Setting:
    """One variable as ``jagtile doctor`` shows it."""

    name: str  # attribute of ``settings``
    variable: str
    value: Value
    default: str
    doc: str
    origin: Literal["override", "environment", "default"]


class Variable(Generic[T]):
    """Descriptor of one environment variable; reading it parses the environment anew."""

    def __init__(
        self, variable: str, parse: Callable[[str], T], default: Callable[[], T], shown: str, doc: str
    ) -> None:
        self.variable = variable
        self.doc = doc
        self.shown_default = shown
        self._parse = parse
        self._default = default

    def __set_name__(self, owner: type[Settings], name: str) -> None:
        self.name = name

    def __get__(self, instance: Settings, owner: type[Settings]) -> T:
        return self.read(instance)[0]

    def read(self, instance: Settings) -> tuple[T, Literal["override", "environment", "default"]]:
        """The value in force and where it comes from. SettingError where the environment's text makes no sense."""
        if self.name in instance.overrides:
            return instance.overrides[self.name], "override"  # type: ignore[return-value]
        text = os.environ.get(self.variable, "").strip()
        if not text:
            return self._default(), "default"
        try:
            return self._parse(text), "environment"
        except ValueError as error:
            raise SettingError(f"{self.variable} is {text!r}: {error}") from None


def _switch(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in words:
        raise ValueError(f"it must be one of {', '.join(words)}")
    return words[text.lower()]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("it must be a whole number of at least 1")
    return int(text)


def _native_host(text: str) -> str:
    if text not in NATIVE_HOST:
        raise ValueError(f"it must be one of {', '.join(NATIVE_HOST)}")
    return text


def _folder(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~ without a home, ~user of no user
        raise ValueError(str(error)) from None


def _user_cache() -> Path:
    import platformdirs

    try:
        folder = Path(platformdirs.user_cache_dir("jagtile", appauthor=False))
    except RuntimeError:  # no home folder is known
        return _homeless_cache()
    return folder if folder.is_absolute() else _homeless_cache()  # older platformdirs leave "~" as it is


def _homeless_cache() -> Path:
    from jagtile.runtime.scratch import private_folder

    try:
        folder = private_folder(create=True)
    except OSError as error:
        raise SettingError(f"no home folder is known, nor a temporary one ({error}): set JAGTILE_CACHE_DIR") from None
    assert folder is not None
    warnings.warn(
        f"no home folder is known: the cache is below {folder}; JAGTILE_CACHE_DIR may name another folder",
        JagtileWarning,
        stacklevel=2,
    )
    return folder / "home"


def _folders(text: str) -> tuple[Path, ...] | None:
    return None if text == "none" else tuple(_folder(part) for part in text.split(os.pathsep) if part)


def user_packs() -> tuple[Path, ...]:
    """Where ``jagtile pack install`` puts packs unless told otherwise; nowhere for who has no home."""
    import platformdirs

    try:
        folder = Path(platformdirs.user_data_dir("jagtile", appauthor=False)) / "packs"
    except RuntimeError:  # no home folder is known
        return ()
    return (folder,) if folder.is_absolute() else ()  # older platformdirs leave "~" as it is


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nothing() -> str | None:
    return None


class Settings:
    """The settings in force. Use the one instance, ``settings``."""

    cache_dir = Variable(
        "JAGTILE_CACHE_DIR",
        _folder,
        _user_cache,
        "the user's cache folder, e.g. ~/.cache/jagtile",
        "Where built kernels, the user's tuning records and choices are kept.",
    )
    nvcc = Variable[str | None](
        "JAGTILE_NVCC",
        str,
        _nothing,
        "found: pip or conda toolkit, PATH, /usr/local/cuda",
        "Path of the CUDA compiler, before every other place.",
    )
    jit = Variable(
        "JAGTILE_JIT",
        _switch,
        lambda: True,
        "1",
        "Whether the run time may build a kernel that it does not find (1) or must raise NoKernelError (0).",
    )
    jobs = Variable(
        "JAGTILE_JOBS",
        _count,
        _usable_cpus,
        "the number of CPUs this process may use",
        "How many compilers run side by side.",
    )
    native_host = Variable(
        "JAGTILE_NATIVE_HOST",
        _native_host,
        lambda: "auto",
        "auto",
        "Whether compiled host code serves eager calls on a GPU: `auto`: once a thread has built it; `wait`: the first "
        "call waits for the compiler; `off`: never.",
    )
    packs = Variable[tuple[Path, ...] | None](
        "JAGTILE_PACKS",
        _folders,
        user_packs,
        "the user's data folder, e.g. ~/.local/share/jagtile/packs",
        "Kernel packs, and folders of them, that are used before those installed as wheels; `none`: no packs at all.",
    )

    def __init__(self) -> None:
        self.overrides: dict[str, Value] = {}

    @contextmanager
    def override(self, **values: Value) -> Iterator[None]:
        """Use other values inside a ``with`` block, e.g. ``settings.override(cache_dir=tmp_path, jit=False)``."""
        unknown = values.keys() - self._variables().keys()
        if unknown:
            known = ", ".join(self._variables())
            raise SettingError(f"no setting is called {', '.join(sorted(unknown))}; there are {known}")
        before = self.overrides
        self.overrides = {**before, **values}
        try:
            yield
        finally:
            self.overrides = before

    def describe(self) -> tuple[Setting, ...]:
        """Every variable with its value, default and purpose. SettingError where one holds nonsense."""
        described = []
        for name, variable in self._variables().items():
            value, origin = variable.read(self)
            described.append(
                Setting(name, variable.variable, value, variable.shown_default, variable.doc, origin),
            )
        return tuple(described)

    @classmethod
    def _variables(cls) -> dict[str, Variable[Value]]:
        return {name: member for name, member in vars(cls).items() if isinstance(member, Variable)}


settings = Settings()
