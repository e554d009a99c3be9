"""CUDA text -> C++ text: asm statements, shared variables and kernel signatures; the rest is macros of cpp/cuda.h."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from emulator.ptx import Operand, PtxError, Statement, split_commas

_ASM = re.compile(r"\basm\s*(?:volatile\s*)?\(")
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s*(?:__cluster_dims__\((\w+)\)\s*)?(?:__launch_bounds__\(([^)]*)\)\s*)?(\w+)\s*\('
)
_DECLARATOR = r"\w+(?:\s*\[[^\]]*\])*"
_STATIC_SHARED = re.compile(
    r"(?<!extern )__shared__\s+(?:(?:__align__|alignas)\((\d+)\)\s*)?([\w:<>]+(?: [\w:<>]+)*?)\s+"
    rf"({_DECLARATOR}(?:\s*,\s*{_DECLARATOR})*)\s*;"
)
_DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+(?:(?:__align__|alignas)\(\d+\)\s*)?([\w: ]+?)\s+(\w+)\s*\[\s*\]\s*;"
)


@dataclass
class Translation:
    """Counters that run through all files of a kernel, and the kernels found."""

    statements: int = 0
    shared_variables: int = 0
    kernels: dict[str, list[str]] = field(default_factory=dict)  # name -> types of parameters
    bounds: dict[str, str] = field(default_factory=dict)  # name -> threads and CTAs an SM
    clusters: dict[str, str] = field(default_factory=dict)  # name -> CTAs of a cluster

    def translate(self, text: str) -> str:
        text = self._asm_statements(text)
        text = _DYNAMIC_SHARED.sub(r"\1* const \2 = static_cast<\1*>(emu::dynamic_shared());", text)
        text = _STATIC_SHARED.sub(self._static_shared, text)
        text = self._kernel_signatures(text)
        if leftover := re.search(r"^.*\b(?:__shared__|asm)\b.*$", _without_comments(text), re.MULTILINE):
            raise PtxError(f"cannot translate: {leftover[0].strip()}")
        return text

    def _asm_statements(self, text: str) -> str:
        result, position = [], 0
        while match := _ASM.search(text, position):
            end = _closing(text, match.end() - 1)
            result.append(text[position : match.start()])
            self.statements += 1
            code, operands = _parse_asm(text[match.end() : end])
            lines = text[match.start() : end].count("\n")
            result.append(Statement(code, operands, self.statements).translate() + "\n" * lines)
            position = end + 1
        return "".join([*result, text[position:]])

    def _static_shared(self, match: re.Match[str]) -> str:
        alignment, kind, declarators = match.groups()
        lines = []
        for declarator in split_commas(declarators):
            name, bracket, extents = declarator.partition("[")
            self.shared_variables += 1
            number = self.shared_variables
            align = alignment or f"alignof({kind})"
            place = f"emu::static_shared({number}, sizeof(emu_shared_{number}), {align})"
            lines.append(
                f"using emu_shared_{number} = {kind}{bracket}{extents}; "
                f"emu_shared_{number}& {name} = *static_cast<emu_shared_{number}*>({place});"
            )
        return " ".join(lines)

    def _kernel_signatures(self, text: str) -> str:
        """Parameters stay where the launch put them, so that a tensor map's address is one into the parameter block."""
        result, position = [], 0
        while match := _KERNEL.search(text, position):
            end = _closing(text, match.end() - 1)
            types, parameters = [], []
            for parameter in split_commas(text[match.end() : end]):
                kind, name = re.fullmatch(
                    r"(.*?[\s*&])(\w+)", parameter.replace("__grid_constant__", ""), re.DOTALL
                ).groups()  # type: ignore[union-attr]
                kind = " ".join(kind.split())
                types.append(kind.removeprefix("const ") if not kind.endswith("*") else kind)
                by_reference = "__grid_constant__" in parameter
                parameters.append(f"const {types[-1]}& {name}" if by_reference else f"{kind} {name}")
            cluster, bounds, kernel = match.groups()
            self.kernels[kernel] = types
            self.bounds[kernel] = bounds or "0"
            self.clusters[kernel] = cluster or "1"
            result.append(text[position : match.start()] + f'extern "C" void {kernel}({", ".join(parameters)})')
            position = end + 1
        return "".join([*result, text[position:]])

    def entries(self) -> str:
        """One function a kernel that takes what cuLaunchKernel takes: an array of pointers to parameters."""
        lines = []
        for name, types in self.kernels.items():
            arguments = ", ".join(f"*static_cast<{t}*>(arguments[{i}])" for i, t in enumerate(types))
            sizes = "".join(f"sizeof({t}), " for t in types)
            lines.append(f'extern "C" void emu_entry_{name}(void** arguments) {{ {name}({arguments}); }}')
            lines.append(f'extern "C" const unsigned emu_sizes_{name}[] = {{{sizes}0}};')
            lines.append(f'extern "C" const unsigned emu_bounds_{name}[2] = {{{self.bounds[name]}}};')
            lines.append(f'extern "C" const unsigned emu_cluster_{name} = {self.clusters[name]};')
        return "\n".join(lines) + "\n"


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def _closing(text: str, opening: int) -> int:
    """The place of the parenthesis that closes the one at ``opening``; strings are skipped."""
    depth, i = 0, opening
    while i < len(text):
        char = text[i]
        if char == '"':
            i = _string_end(text, i)
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return i
        i += 1
    raise PtxError(f"an unclosed parenthesis: {text[opening : opening + 80]}")


def _string_end(text: str, start: int) -> int:
    i = start + 1
    while text[i] != '"':
        i += 2 if text[i] == "\\" else 1
    return i


def _parse_asm(text: str) -> tuple[str, list[Operand]]:
    """The template string and the operands of what is inside the parentheses of an asm statement."""
    sections, strings, start, depth, i = [], [], 0, 0, 0
    while i < len(text):
        char = text[i]
        if char == '"':
            end = _string_end(text, i)
            if not sections:
                strings.append(text[i + 1 : end])
            i = end
        elif text[i : i + 2] == "::" and depth > 0:
            i += 1
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == ":" and depth == 0:
            sections.append(text[start:i])
            start = i + 1
        i += 1
    sections.append(text[start:])
    code = "".join(strings).encode().decode("unicode_escape")
    operands = []
    for section in sections[1:3]:
        for operand in split_commas(section):
            match = re.fullmatch(r'"([^"]+)"\s*\((.*)\)', operand, re.DOTALL)
            if match is None:
                raise PtxError(f"cannot read the asm operand {operand!r}")
            operands.append(Operand(match[1], match[2]))
    return code, operands
