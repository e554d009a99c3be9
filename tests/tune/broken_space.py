"""Spaces of one template that has a knob more: the way in which it goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

import jinja2
import pytest

from jagtile.generator import spaces
from jagtile.generator.render import environment

SOUND = ("none", "no")


def broken_space(base: Any, template: str, faults: Sequence[str]) -> Any:
    """``base`` with ``template``, whose only knob is ``fault``: all others have their default."""
    knob = ("fault", "str", field(default=SOUND[0], metadata={"short": "f"}))
    config_type = make_dataclass("BrokenConfig", [knob], bases=(base.config_type,), frozen=True, order=True)
    config_type.algorithm = "broken"

    class BrokenSpace(base):
        algorithm = "broken"

        def knobs(self, spec):
            fixed = {name: (value,) for name, value in self._usual(spec).items()}
            return {**fixed, "fault": (*SOUND, *faults)}

        def default(self, spec):
            return config_type(**self._usual(spec), fault=SOUND[0])

        def _usual(self, spec):
            return {name: value for name, value in super().default(spec).to_dict().items() if name != "algorithm"}

    BrokenSpace.template, BrokenSpace.config_type = template, config_type
    return BrokenSpace()


def only(space: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a broken space the only one there is."""
    folders = [*environment().loader.searchpath, Path(__file__).with_name("broken")]
    monkeypatch.setattr(environment(), "loader", jinja2.FileSystemLoader(folders))
    monkeypatch.setattr(spaces, "ALL", (space,))
