"""The model benchmark's file: parts that were measured one by one under the same circumstances."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import msgspec
import torch
from model_race import Part
from model_worker import MODES, TASKS

import jagtile
from jagtile.generator.measure import Trials
from jagtile.generator.spec import DType
from jagtile.tuning_db.schema import DeviceFacts
from jagtile.tuning_db.store import replace_file

_BESIDE = Path(__file__).resolve().parent
_SHARED = ("ragged_text.py", "transformer.py")  # of the examples


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """Parts, and what they have in common."""

    device: DeviceFacts
    driver: str
    torch: str
    python: str  # whose standard library is the text
    jagtile: str
    sources: str  # sha256 of jagtile's and the benchmark's
    size: str
    dtype: DType
    parts: tuple[Part, ...]

    def with_part(self, part: Part) -> ModelReport:
        """With one part more. It replaces those of which it raced all forms again."""
        kept = [old for old in self.parts if old.name != part.name or not old.forms <= part.forms]
        return msgspec.structs.replace(self, parts=tuple(sorted([*kept, part], key=_place)))


class OtherReportError(Exception):
    """A file does not hold what the parts at hand could be added to."""


def _place(part: Part) -> tuple[bool, int, int, str]:
    return part.model.is_causal, MODES.index(part.mode), TASKS.index(part.task), part.date


def empty_report(device: torch.device, size: str, dtype: DType) -> ModelReport:
    """Of what would be measured here and now."""
    known = Trials(str(device)).facts(lambda note: None)
    return ModelReport(
        device=known.device,
        driver=known.driver,
        torch=known.torch,
        python=platform.python_version(),
        jagtile=jagtile.__version__,
        sources=sources_sha256(),
        size=size,
        dtype=dtype,
        parts=(),
    )


def sources_sha256() -> str:
    """Of what decides what is run: code, templates and choices, not the records of what was tuned."""
    package, examples = Path(jagtile.__file__).parent, _BESIDE.parent / "examples"
    inside = (Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names)
    sources = {path.relative_to(package).as_posix(): path for path in inside if path.suffix not in (".pyc", ".jsonl")}
    sources |= {path.name: path for path in (*_BESIDE.glob("model*.py"), *(examples / name for name in _SHARED))}
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(f"{name}\0{hashlib.sha256(sources[name].read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def read_report(path: Path, here: ModelReport) -> ModelReport:
    """What a file holds, ``here`` where there is none. OtherReportError: the file is of something else."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=ModelReport)
    except FileNotFoundError:
        return here
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise OtherReportError(f"{path} holds no report of this benchmark ({error}); name another file") from None
    theirs, ours = _circumstances(found), _circumstances(here)
    if differing := [f"{name} {theirs[name]}, here {ours[name]}" for name in ours if theirs[name] != ours[name]]:
        raise OtherReportError(f"{path} was measured otherwise: {'; '.join(differing)}; name another file")
    return found


def write_report(path: Path, report: ModelReport) -> None:
    replace_file(path, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def _circumstances(report: ModelReport) -> dict[str, object]:
    facts = msgspec.to_builtins(msgspec.structs.replace(report, parts=()))
    del facts["parts"]
    return {f"device's {name}": value for name, value in facts.pop("device").items()} | facts
