"""Render a variant's source: a pure function of the variant and the files below templates/.

The same variant renders to the same bytes everywhere: no dates, paths, hosts or versions go into the text.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jinja2

from jagtile.generator.tile import Variant

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
_STRING_OR_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_INCLUDE = re.compile(r'^\s*#\s*include\s+"(?P<path>[^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A rendered source and the project headers it includes, directly or not (path below templates/, text)."""

    text: str
    suffix: str  # ".cu" or ".cpp"
    headers: tuple[tuple[str, str], ...]

    @property
    def sha256(self) -> str:
        """Over the code of the text and of every header, without comments and layout: what the machine code depends on
        besides the compiler and its flags. What was measured outlives an edit of comments.
        """
        digest = hashlib.sha256(code_of(self.text).encode())
        for path, text in self.headers:
            digest.update(f"\0{path}\0{code_of(text)}".encode())
        return digest.hexdigest()


@lru_cache(maxsize=256)
def code_of(text: str) -> str:
    """The lines of a C++ text that are not empty, without comments, indentation and spaces at their ends."""
    code = _STRING_OR_COMMENT.sub(lambda found: found[1] or " ", text)
    return "\n".join(line for line in map(str.strip, code.splitlines()) if line)


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The one Jinja environment: undefined names are errors, whitespace control gives clang-format's layout."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(variant: Variant) -> Source:
    """The source of a variant. Raises IllegalConfigError for a variant that its space rejects."""
    variant.check()
    return render_unchecked(variant)


@lru_cache(maxsize=1024)
def render_unchecked(variant: Variant) -> Source:
    """As ``render``, without asking the space: for tests that compile what the arithmetic rejects."""
    space = variant.space
    text = (
        environment()
        .get_template(space.template)
        .render(
            variant=variant,
            spec=variant.spec,
            config=variant.config,
            symbol=variant.symbol,
            template=space.template,
            **space.context(variant.spec, variant.config),
        )
    )
    suffix = Path(space.template.removesuffix(".j2")).suffix
    return Source(text, suffix, _headers(text))


def _headers(text: str) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    pending = _INCLUDE.findall(text)
    while pending:
        path = pending.pop()
        if path not in found:
            found[path] = (TEMPLATES / path).read_text()
            pending += _INCLUDE.findall(found[path])
    return tuple(sorted(found.items()))
