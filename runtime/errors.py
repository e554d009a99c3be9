"""Every error and warning that jagtile raises on purpose. Messages name the thing, what it was and what helps."""

from __future__ import annotations


class JagtileError(RuntimeError):
    """Base of all run-time failures of jagtile."""


class CompilerNotFoundError(JagtileError):
    """No compiler for a target: the message lists every place tried and the command that helps."""


class BuildError(JagtileError):
    """The compiler refused a rendered source: the message carries its output and where the source lies."""


class RejectedVariantError(JagtileError):
    """The compiler accepted a variant that must not be used (spills, serialised wgmma, ...): says which rule."""


class CorruptArtifactError(JagtileError):
    """An artifact, record or choices file failed verification and could not be repaired."""


class CacheError(JagtileError):
    """A built kernel can be kept nowhere: the message names the folders, why, and what helps."""


class DatabaseError(JagtileError):
    """Tuning records or choices can't be written: the message names the file and what helps."""


class TuningError(JagtileError):
    """Tuning can't go on, for a reason that is no single config's: no config works, the inputs do not fit, ..."""


class PackError(JagtileError):
    """A kernel pack can't be made, or must not be used: the message names it, what is wrong and what helps."""


class NoKernelError(JagtileError):
    """No artifact exists for the case at hand and none can be built: the message says the ways out."""


class IllegalConfigError(ValueError):
    """A TileConfig breaks a rule of its space: the message gives the arithmetic."""


class SettingError(ValueError):
    """An environment variable or an override of a setting holds what it can't: says what it may hold."""


class UnsupportedError(NotImplementedError):
    """A valid request that jagtile does not serve (yet): the message says what is served."""


class JagtileWarning(UserWarning):
    """Something was repaired or a slower way was taken; never silent, said once."""
