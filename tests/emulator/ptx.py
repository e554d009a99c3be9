"""PTX text -> C++ calls of the emulator, one ``asm`` statement at a time.

An instruction is one function below, registered under a regular expression of its whole opcode; a modifier that none
of them knows is an error that quotes the instruction. To add one: write the function here and, where the host has no
word for what it does, its C++ in cpp/.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_TYPES = {
    "pred": "bool",
    "b8": "uint8_t",
    "u8": "uint8_t",
    "s8": "int8_t",
    "b16": "uint16_t",
    "u16": "uint16_t",
    "s16": "int16_t",
    "f16": "uint16_t",
    "bf16": "uint16_t",
    "b32": "uint32_t",
    "u32": "uint32_t",
    "s32": "int32_t",
    "f16x2": "uint32_t",
    "bf16x2": "uint32_t",
    "b64": "uint64_t",
    "u64": "uint64_t",
    "s64": "int64_t",
    "f32": "float",
    "f64": "double",
}
_CONSTRAINTS = {"r": "uint32_t", "l": "uint64_t", "h": "uint16_t", "f": "float", "d": "double"}
_SPECIAL = {
    "%laneid": "uint32_t(emu::lane_id())",
    "%warpid": "uint32_t(emu::lane_id(true))",
    "%tid.x": "uint32_t(emu::self->thread.x)",
    "%ctaid.x": "uint32_t(emu::self->block.x)",
    "%ntid.x": "uint32_t(emu::block.x)",
    "%nctaid.x": "uint32_t(emu::grid.x)",
    "%smid": "uint32_t(emu::self->block.x)",
    "%cluster_ctarank": "emu::cluster_rank()",
}


class PtxError(Exception):
    """An instruction, or a form of one, that the emulator does not have."""


@dataclass(frozen=True)
class Operand:
    """One ``"constraint"(expression)`` of an asm statement."""

    constraint: str
    expression: str

    @property
    def is_output(self) -> bool:
        return self.constraint[0] in "=+"

    @property
    def kind(self) -> str:
        return self.constraint.lstrip("=+&")


@dataclass
class Instruction:
    """An instruction with its operands as text; methods give them as C++."""

    text: str
    opcode: str
    operands: list[str]
    statement: Statement

    def value(self, index: int, ptx_type: str) -> str:
        """An operand as an rvalue of a type."""
        return self._value(self.operands[index], ptx_type)

    def _value(self, operand: str, ptx_type: str) -> str:
        kind = _TYPES[ptx_type]
        if operand.startswith("!"):
            return f"!({self._value(operand[1:], ptx_type)})"
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            return f"emu::as<{kind}>(0x{match[1]}u)"
        if match := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand):
            return f"emu::as<{kind}>(0x{match[1]}ull)"
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)[uU]?", operand):
            literal = f"{operand.rstrip('uU')}{'ull' if not operand.startswith('-') else 'll'}"
            return f"static_cast<{kind}>({literal})"
        name = self.name(operand)
        if operand in _SPECIAL or name.startswith("emu_n"):  # immediates have no size
            return f"static_cast<{kind}>({name})"
        return f"emu::as<{kind}>({name})"

    def name(self, operand: str) -> str:
        """The C++ name of a register."""
        if operand in _SPECIAL:
            return _SPECIAL[operand]
        if match := re.fullmatch(r"%(\d+)", operand):
            return self.statement.operand_name(int(match[1]), self.text)
        if operand in self.statement.registers:
            return f"ptx_{operand.replace('%', '')}"
        raise PtxError(f"unknown operand {operand!r} in: {self.text}")

    def assign(self, index: int, value: str) -> str:
        """A statement that sets a register; nothing for the bit bucket."""
        return self.assign_to(self.operands[index], value)

    def assign_to(self, operand: str, value: str) -> str:
        if operand == "_":
            return f"(void)({value});"
        return f"emu::set({self.name(operand)}, {value});"

    def vector(self, index: int) -> list[str]:
        """The elements of ``{a, b}``; a lone register is a vector of one."""
        operand = self.operands[index]
        return split_commas(operand[1:-1]) if operand.startswith("{") else [operand]

    def address(self, index: int, inner: str | None = None) -> str:
        """``[register + offset]`` as a 64-bit number."""
        text = (self.operands[index] if inner is None else inner).strip("[] ")
        base, _, offset = text.partition("+")
        return f"(uint64_t({self.name(base.strip())})" + (f" + {offset.strip()})" if offset else ")")

    def shared(self, index: int) -> str:
        """``[register + offset]``, an address of the CTA's own shared memory, as an offset into it."""
        return f"emu::own_offset(uint32_t({self.address(index)}))"

    def tensor(self, index: int) -> tuple[str, list[str]]:
        """``[map, {coordinates}]``."""
        match = re.fullmatch(r"\[\s*([^,{]+?)\s*,\s*\{(.*)\}\s*\]", self.operands[index], re.DOTALL)
        if match is None:
            raise PtxError(f"expected [map, {{coordinates}}] in: {self.text}")
        return self.address(0, match[1]), [self._value(c, "s32") for c in split_commas(match[2])]

    def expect(self, *counts: int) -> None:
        if len(self.operands) not in counts:
            raise PtxError(f"{len(self.operands)} operands in: {self.text}")


Handler = Callable[[Instruction, re.Match[str]], str]
_HANDLERS: list[tuple[re.Pattern[str], Handler]] = []


def instruction(pattern: str) -> Callable[[Handler], Handler]:
    """Register the translation of every opcode that matches the whole pattern."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.append((re.compile(pattern), handler))
        return handler

    return register


def split_commas(text: str) -> list[str]:
    """At the commas outside of brackets, braces and parentheses."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return [*parts, rest] if rest or parts else []


class Statement:
    """Translates one asm statement."""

    def __init__(self, text: str, operands: Sequence[Operand], number: int) -> None:
        self.text = text.replace("%=", f"u{number}")
        self.operand_list = list(operands)
        self.registers: set[str] = set()

    def operand_name(self, index: int, text: str) -> str:
        if index >= len(self.operand_list):
            raise PtxError(f"there is no operand %{index} for: {text}")
        prefix = "n" if self.operand_list[index].kind == "n" else ""
        return f"emu_{prefix}{index}"

    def translate(self) -> str:
        body = self._body()
        if not body:
            return "do {} while (false)"  # it only pins values to a place: program order does that here
        return "do { " + " ".join([*self._operands(), *body]) + " } while (false)"

    def _operands(self) -> list[str]:
        lines = []
        for index, operand in enumerate(self.operand_list):
            expression = operand.expression
            if operand.kind == "n":
                lines.append(f"constexpr long long emu_n{index} = ({expression}); (void)emu_n{index};")
            elif operand.kind not in _CONSTRAINTS:
                raise PtxError(f"constraint {operand.constraint!r} in: {self.text}")
            elif operand.is_output:
                kind = _CONSTRAINTS[operand.kind]
                check = f'static_assert(sizeof(emu_{index}) == sizeof({kind}), "constraint {operand.constraint}");'
                lines.append(f"auto& emu_{index} = ({expression}); {check}")
            else:
                lines.append(f"const auto emu_{index} = emu::in_{operand.kind}({expression}); (void)emu_{index};")
        return lines

    def _body(self) -> list[str]:
        lines: list[str] = []
        text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", self.text, flags=re.DOTALL)
        position = 0
        while match := re.compile(r"\s*(?:([{}])|([\w$]+)\s*:(?!:)|([^;{}][^;]*);)").match(text, position):
            position = match.end()
            if match[1]:
                lines.append(match[1])
            elif match[2]:
                lines.append(f"{match[2]}: ;")
            else:
                lines.append(self._instruction(" ".join(match[3].replace("%%", "%").split())))
        if text[position:].strip():
            raise PtxError(f"cannot read {text[position:].strip()!r} in: {self.text}")
        return lines

    def _instruction(self, text: str) -> str:
        if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text):
            names = [self._declared(name) for group in split_commas(match[2]) for name in _expanded(group)]
            return f"{_TYPES[match[1]]} " + ", ".join(f"{name}{{}}" for name in names) + ";"
        guard, opcode, rest = re.fullmatch(r"(?:@(!?[\w%]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        parsed = Instruction(text, opcode, split_commas(rest), self)
        for pattern, handler in _HANDLERS:
            if match := pattern.fullmatch(opcode):
                code = handler(parsed, match)
                break
        else:
            raise PtxError(f"the emulator does not know: {text}")
        quoted = text.replace("\\", "\\\\").replace('"', '\\"')
        quoted = quoted if len(quoted) < 160 else f"{quoted[:90]} ... {quoted[-60:]}"
        code = f'EMU_AT("{quoted}"); {code}' if handler not in _QUIET else code
        if guard is None:
            return code
        return f"if ({parsed._value(guard, 'pred')}) {{ {code} }}"

    def _declared(self, name: str) -> str:
        self.registers.add(name)
        return f"ptx_{name.replace('%', '')}"


def _expanded(name: str) -> list[str]:
    match = re.fullmatch(r"([\w%$]+)<(\d+)>", name)
    return [name] if match is None else [f"{match[1]}{i}" for i in range(int(match[2]))]


def _call(function: str, *arguments: str) -> str:
    return f"emu::{function}({', '.join(arguments)});"


def _flag(value: object) -> str:
    return "true" if value else "false"


# ---- moves, arithmetic, predicates -----------------------------------------------------------------------------------

_ANY = "|".join(t for t in _TYPES if t not in ("f16", "bf16", "f16x2", "bf16x2"))
_BINARY = {"add": "+", "sub": "-", "mul": "*", "mul.lo": "*", "and": "&", "or": "|", "xor": "^", "div": "/", "rem": "%"}


@instruction(rf"(?:mov|cvta(?:\.to\.\w+)?)\.({_ANY})")
def _mov(i: Instruction, m: re.Match[str]) -> str:
    i.expect(2)
    sources, targets = i.vector(1), i.vector(0)
    if len(sources) == len(targets) == 1:
        return i.assign(0, i.value(1, m[1]))
    half = {"b64": "b32", "b32": "b16"}[m[1]]
    bits = 32 if half == "b32" else 16
    if len(sources) == 2:  # pack: the first is the low half
        low, high = (f"uint64_t({i._value(s, half)})" for s in sources)
        return i.assign(0, f"static_cast<{_TYPES[m[1]]}>({low} | {high} << {bits})")
    low, high = targets
    whole = i.value(1, m[1])
    kind = _TYPES[half]
    return i.assign_to(low, f"static_cast<{kind}>({whole})") + i.assign_to(
        high, f"static_cast<{kind}>({whole} >> {bits})"
    )


@instruction(rf"(add|sub|mul\.lo|mul|div|rem|and|or|xor)(?:\.(?:rn|ftz|approx|full|sat))*\.({_ANY})")
def _binary(i: Instruction, m: re.Match[str]) -> str:
    i.expect(3)
    kind = _TYPES[m[2]]
    if m[1] == "mul" and kind not in ("float", "double"):
        raise PtxError(f"mul of integers takes .lo, .hi or .wide: {i.text}")
    return i.assign(0, f"static_cast<{kind}>({i.value(1, m[2])} {_BINARY[m[1]]} {i.value(2, m[2])})")


@instruction(r"mul\.wide\.(u32|s32)")
def _mul_wide(i: Instruction, m: re.Match[str]) -> str:
    wide = {"u32": "uint64_t", "s32": "int64_t"}[m[1]]
    return i.assign(0, f"{wide}({i.value(1, m[1])}) * {wide}({i.value(2, m[1])})")


@instruction(r"mad\.lo\.(u32|s32|u64|s64)|fma\.rn(?:\.ftz)?\.(f32|f64)")
def _mad(i: Instruction, m: re.Match[str]) -> str:
    kind = m[1] or m[2]
    a, b, c = (i.value(k, kind) for k in (1, 2, 3))
    return i.assign(0, f"std::fma({a}, {b}, {c})" if m[2] else f"{a} * {b} + {c}")


@instruction(rf"(shl|shr)\.({_ANY})")
def _shift(i: Instruction, m: re.Match[str]) -> str:
    name = "shift_left" if m[1] == "shl" else "shift_right"
    return i.assign(0, f"emu::{name}({i.value(1, m[2])}, {i.value(2, 'u32')})")


@instruction(rf"not\.({_ANY})")
def _not(i: Instruction, m: re.Match[str]) -> str:
    return i.assign(0, ("!" if m[1] == "pred" else "~") + i.value(1, m[1]))


@instruction(r"(abs|neg)(?:\.ftz)?\.(f32|s32)")
def _sign(i: Instruction, m: re.Match[str]) -> str:
    return i.assign(0, f"std::abs({i.value(1, m[2])})" if m[1] == "abs" else f"-({i.value(1, m[2])})")


@instruction(r"(min|max)(?:\.ftz)?(\.NaN)?\.(f32|u32|s32|u64|s64|f16x2|bf16x2)")
def _min_max(i: Instruction, m: re.Match[str]) -> str:
    i.expect(3)
    a, b = i.value(1, m[3]), i.value(2, m[3])
    name = f"emu::{m[1]}_nan" if m[2] else f"std::f{m[1]}"
    if m[3].endswith("x2"):
        is_bf16 = _flag(m[3] == "bf16x2")
        return i.assign(
            0, f"emu::on_halves<{is_bf16}>({a}, {b}, 0, [](float x, float y, float) {{ return float({name}(x, y)); }})"
        )
    return i.assign(0, f"{name}({a}, {b})" if m[3] == "f32" else f"std::{m[1]}({a}, {b})")


@instruction(r"(add|sub|mul|fma)(?:\.rn)?(?:\.ftz)?\.(f16x2|bf16x2)")
def _halves(i: Instruction, m: re.Match[str]) -> str:
    formula = {"add": "x + y", "sub": "x - y", "mul": "x * y", "fma": "std::fma(x, y, z)"}[m[1]]
    c = i.value(3, m[2]) if m[1] == "fma" else "0"
    function = f"[](float x, float y, [[maybe_unused]] float z) {{ return {formula}; }}"
    return i.assign(
        0, f"emu::on_halves<{_flag(m[2] == 'bf16x2')}>({i.value(1, m[2])}, {i.value(2, m[2])}, {c}, {function})"
    )


def _comparison(name: str, a: str, b: str) -> str:
    symbols = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    symbols |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
    if name in symbols:
        # An ordered comparison is false of NaN, `ne` too, unlike C++'s.
        return f"({a} {symbols[name]} {b})" if name != "ne" else f"({a} < {b} || {a} > {b})"
    if name in ("num", "nan"):
        unordered = f"({a} != {a} || {b} != {b})"
        return unordered if name == "nan" else f"!{unordered}"
    return f"({a} != {a} || {b} != {b} || {a} {symbols[name[:-1]]} {b})"


@instruction(rf"setp\.(\w+?)(?:\.(and|or|xor))?(?:\.ftz)?\.({_ANY})")
def _setp(i: Instruction, m: re.Match[str]) -> str:
    i.expect(4 if m[2] else 3)
    both = i.operands[0].split("|")
    result = f"bool({_comparison(m[1], i.value(1, m[3]), i.value(2, m[3]))})"
    with_ = f" {'&&' if m[2] == 'and' else '||' if m[2] == 'or' else '!='} {i.value(3, 'pred')}" if m[2] else ""
    code = i.assign_to(both[0], f"{result}{with_}")
    return code + (i.assign_to(both[1], f"!{result}{with_}") if len(both) > 1 else "")


@instruction(r"setp\.(\w+?)(?:\.ftz)?\.(f16x2|bf16x2)")
def _setp_halves(i: Instruction, m: re.Match[str]) -> str:
    i.expect(3)
    is_bf16 = _flag(m[2] == "bf16x2")
    code = ""
    for which, target in enumerate(i.operands[0].split("|")):
        a, b = (f"emu::half_of<{is_bf16}>({i.value(k, m[2])}, {which})" for k in (1, 2))
        code += i.assign_to(target, f"bool({_comparison(m[1], a, b)})")
    return code


@instruction(rf"selp\.({_ANY})")
def _selp(i: Instruction, m: re.Match[str]) -> str:
    return i.assign(0, f"{i.value(3, 'pred')} ? {i.value(1, m[1])} : {i.value(2, m[1])}")


@instruction(r"(ex2|lg2|rcp|rsqrt|sqrt|tanh|sin|cos)\.(?:approx|rn)(\.ftz)?\.f32")
def _function(i: Instruction, m: re.Match[str]) -> str:
    i.expect(2)
    x = i.value(1, "f32")
    x = f"emu::flushed({x})" if m[2] else x
    formula = {"ex2": "std::exp2({})", "lg2": "std::log2({})", "rcp": "1.0f / {}", "rsqrt": "1.0f / std::sqrt({})"}
    result = formula.get(m[1], f"std::{m[1]}({{}})").format(x)
    return i.assign(0, f"emu::flushed({result})" if m[2] else result)


@instruction(r"cvt\.rn(\.relu)?\.(bf16x2|f16x2)\.f32")
def _cvt_pair(i: Instruction, m: re.Match[str]) -> str:
    i.expect(3)
    pair = [i.value(1, "f32"), i.value(2, "f32")]
    if m[1]:
        pair = [f"emu::max_nan({x}, 0.0f)" for x in pair]
    return i.assign(0, f"emu::pack_{m[2]}({', '.join(pair)})")


@instruction(r"cvt\.rn\.(bf16|f16)\.f32")
def _cvt_half(i: Instruction, m: re.Match[str]) -> str:
    return i.assign(0, f"emu::float_to_{m[1]}({i.value(1, 'f32')})")


@instruction(r"cvt\.f32\.(bf16|f16)")
def _cvt_from_half(i: Instruction, m: re.Match[str]) -> str:
    return i.assign(0, f"emu::{m[1]}_to_float({i.value(1, 'b16')})")


@instruction(r"cvt\.rna\.tf32\.f32")
def _cvt_tf32(i: Instruction, m: re.Match[str]) -> str:
    return i.assign(0, f"emu::tf32_rounded({i.value(1, 'f32')})")


@instruction(r"cvt(?:\.r[nz]i?)?\.(u32|s32|u64|s64|f32)\.(u32|s32|u64|s64|f32)")
def _cvt(i: Instruction, m: re.Match[str]) -> str:
    source = i.value(1, m[2])
    if m[2] == "f32" and ".rni." in i.opcode:
        source = f"std::nearbyint({source})"
    return i.assign(0, f"static_cast<{_TYPES[m[1]]}>({source})")


@instruction(r"lop3\.b32")
def _lop3(i: Instruction, m: re.Match[str]) -> str:
    return i.assign(0, f"emu::lop3({', '.join(i.value(k, 'b32') for k in (1, 2, 3, 4))})")


@instruction(r"prmt\.b32")
def _prmt(i: Instruction, m: re.Match[str]) -> str:
    return i.assign(0, f"emu::permute_bytes({', '.join(i.value(k, 'b32') for k in (1, 2, 3))})")


@instruction(r"bra(?:\.uni)?")
def _bra(i: Instruction, m: re.Match[str]) -> str:
    return f"goto {i.operands[0]};"


@instruction(r"trap|exit|brkpt")
def _trap(i: Instruction, m: re.Match[str]) -> str:
    return _call("fail", f'"{i.text}"')


@instruction(r"mapa(?:\.shared::cluster)?\.u(32|64)")
def _mapa(i: Instruction, m: re.Match[str]) -> str:
    return i.assign(0, f"emu::as<uint{m[1]}_t>(emu::in_cluster({i.value(1, f'u{m[1]}')}, {i.value(2, 'u32')}))")


_QUIET: set[Handler] = {
    handler for _, handler in _HANDLERS if handler not in (_trap,)
}  # what never waits and never fails needs no mark

# ---- memory ----------------------------------------------------------------------------------------------------------

_SCOPE = r"(?:\.(?:cta|cluster|gpu|sys))?"
_SPACE = r"(?:\.(global|shared(?:::cta|::cluster)?))?"
_CACHE = r"(?:\.(?:nc|ca|cg|cs|lu|cv|wb|wt|L1::[\w:]+|L2::[\w:]+))*"


def _space(match: str | None) -> str:
    return "emu::Space::" + {None: "kGeneric", "global": "kGlobal"}.get(match, "kShared")


@instruction(rf"ld(?:\.(volatile|relaxed|acquire|weak))?{_SCOPE}{_SPACE}{_CACHE}(?:\.v([24]))?\.({_ANY})")
def _ld(i: Instruction, m: re.Match[str]) -> str:
    i.expect(2, 3)
    targets = i.vector(0)
    if len(targets) != int(m[3] or 1):
        raise PtxError(f"{len(targets)} registers for: {i.text}")
    names = [i.name(t) for t in targets]
    strong = m[1] in ("volatile", "relaxed", "acquire")
    code = (
        f"emu::load{'_strong' if strong else ''}<{_TYPES[m[4]]}>({_space(m[2])}, {i.address(1)}, {', '.join(names)});"
    )
    return ("emu::poll(); " if strong else "") + code


@instruction(rf"st(?:\.(volatile|relaxed|release|weak))?{_SCOPE}{_SPACE}{_CACHE}(?:\.v([24]))?\.({_ANY})")
def _st(i: Instruction, m: re.Match[str]) -> str:
    i.expect(2, 3)
    values = [i._value(v, m[4]) for v in i.vector(1)]
    if len(values) != int(m[3] or 1):
        raise PtxError(f"{len(values)} registers for: {i.text}")
    place = f"{_space(m[2])}, {i.address(0)}"
    if m[1] in ("volatile", "relaxed", "release"):
        return f"emu::store_strong<{_TYPES[m[4]]}>({place}, {_flag(m[1] == 'release')}, {', '.join(values)});"
    return f"emu::store<{_TYPES[m[4]]}>({place}, {', '.join(values)});"


@instruction(rf"red(?:\.(relaxed|release))?{_SCOPE}{_SPACE}{_SCOPE}\.add(?:\.L2::cache_hint)?(?:\.v([24]))?\.({_ANY})")
def _red_add(i: Instruction, m: re.Match[str]) -> str:
    values = [i._value(v, m[4]) for v in i.vector(1)]
    if len(values) != int(m[3] or 1):
        raise PtxError(f"{len(values)} registers for: {i.text}")
    place = f"{_space(m[2])}, {i.address(0)}, {_flag(m[1] == 'release')}"
    return f"emu::reduce_add<{_TYPES[m[4]]}>({place}, {', '.join(values)});"


_ATOMIC = {
    "add": "old + {0}",
    "inc": "old >= {0} ? 0 : old + 1",
    "min": "std::min(old, {0})",
    "max": "std::max(old, {0})",
    "exch": "{0}",
    "and": "old & {0}",
    "or": "old | {0}",
    "xor": "old ^ {0}",
    "cas": "old == {0} ? {1} : old",
}


@instruction(
    rf"(atom|red)(?:\.(relaxed|acquire|release|acq_rel))?{_SCOPE}{_SPACE}{_SCOPE}"
    rf"\.(add|inc|min|max|exch|and|or|xor|cas)\.({_ANY})"
)
def _atom(i: Instruction, m: re.Match[str]) -> str:
    first = 1 if m[1] == "atom" else 0
    kind = _TYPES[m[5]]
    values = [i.value(k, m[5]) for k in range(first + 1, len(i.operands))]
    change = f"[&](const {kind} old) {{ return {kind}({_ATOMIC[m[4]].format(*values)}); }}"
    release = _flag(m[2] in ("release", "acq_rel"))
    code = f"emu::atomic<{kind}>({_space(m[3])}, {i.address(first)}, {release}, {change})"
    return i.assign(0, code) if first else f"{code};"


@instruction(r"prefetch(?:u)?\.(?:global\.)?(?:L1|L2)(?:::[\w:]+)?|discard\.global\.L2|applypriority[\w.:]*")
def _prefetch(i: Instruction, m: re.Match[str]) -> str:
    return ";"


@instruction(r"createpolicy\.[\w.:]+\.b64")
def _policy(i: Instruction, m: re.Match[str]) -> str:
    return i.assign(0, "uint64_t(0)")


@instruction(r"(?:fence|membar)(?:\.(?:sc|acq_rel|acquire|release))?(?:\.(?:cta|cluster|gpu|sys|gl))")
def _fence(i: Instruction, m: re.Match[str]) -> str:
    return "emu::global_fence(); emu::preempt();"


@instruction(r"fence\.proxy\.async(?:\.(global|shared::(?:cta|cluster)))?|fence\.proxy\.async::generic[\w.:]*")
def _fence_proxy(i: Instruction, m: re.Match[str]) -> str:
    return ";" if m[1] == "global" else _call("proxy_fence")


@instruction(r"fence\.proxy\.tensormap::generic\.[\w.:]+")
def _fence_tensormap(i: Instruction, m: re.Match[str]) -> str:
    return ";"


@instruction(r"griddepcontrol\.(wait|launch_dependents)")
def _griddepcontrol(i: Instruction, m: re.Match[str]) -> str:
    return _call("await_launches") if m[1] == "wait" else "emu::preempt();"


# ---- warps and barriers ----------------------------------------------------------------------------------------------


@instruction(r"elect\.sync")
def _elect(i: Instruction, m: re.Match[str]) -> str:
    leader, predicate = i.operands[0].split("|")
    code = f"uint32_t emu_leader; const bool emu_elected = emu::elect({i.value(1, 'u32')}, emu_leader);"
    return f"{{ {code} {i.assign_to(leader, 'emu_leader')} {i.assign_to(predicate, 'emu_elected')} }}"


@instruction(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32")
def _setmaxnreg(i: Instruction, m: re.Match[str]) -> str:
    return _call("set_registers", i.value(0, "s32"), _flag(m[1] == "inc"))


@instruction(r"(bar|barrier)(?:\.cta)?\.(sync|arrive)(\.aligned)?")
def _barrier(i: Instruction, m: re.Match[str]) -> str:
    i.expect(1, 2)
    threads = i.value(1, "s32") if len(i.operands) > 1 else "emu::kAllThreads"
    aligned = _flag(m[1] == "bar" or m[3])
    return _call("barrier", i.value(0, "s32"), threads, aligned, _flag(m[2] == "sync"), "emu::Reduce::kNone", "false")


@instruction(r"(bar|barrier)(?:\.cta)?\.red(\.aligned)?\.(or|and|popc)(\.aligned)?\.(pred|u32)")
def _barrier_reduce(i: Instruction, m: re.Match[str]) -> str:
    i.expect(3, 4)
    threads = i.value(2, "s32") if len(i.operands) > 3 else "emu::kAllThreads"
    reduce = {"or": "kOr", "and": "kAnd", "popc": "kPopc"}[m[3]]
    aligned = _flag(m[1] == "bar" or m[2] or m[4])
    vote = i.value(len(i.operands) - 1, "pred")
    result = f"emu::barrier({i.value(1, 's32')}, {threads}, {aligned}, true, emu::Reduce::{reduce}, {vote})"
    return i.assign(0, f"{result} != 0" if m[5] == "pred" else result)


@instruction(r"bar\.warp\.sync")
def _bar_warp(i: Instruction, m: re.Match[str]) -> str:
    return _call("sync_warp", i.value(0, "u32"))


@instruction(r"shfl\.sync\.(idx|up|down|bfly)\.b32")
def _shfl(i: Instruction, m: re.Match[str]) -> str:
    mode = {"idx": 0, "up": 1, "down": 2, "bfly": 3}[m[1]]
    if "|" in i.operands[0] or i.operands[3] not in ("31", "0x1f", "0"):
        raise PtxError(f"this form of shfl is not modelled: {i.text}")
    call = f"emu::shuffle({i.value(4, 'u32')}, {i.value(1, 'b32')}, {mode}, {i.value(2, 's32')}, 32)"
    return i.assign(0, call)


@instruction(r"vote\.sync\.(ballot|any|all)\.(b32|pred)")
def _vote(i: Instruction, m: re.Match[str]) -> str:
    vote, mask = i.value(1, "pred"), i.value(2, "u32")
    call = {"ballot": f"emu::ballot({mask}, {vote})", "any": f"emu::ballot({mask}, {vote}) != 0"}
    return i.assign(0, call.get(m[1], f"emu::ballot({mask}, !({vote})) == 0"))


@instruction(r"redux\.sync\.(add|min|max|and|or|xor)\.(u32|s32|b32)")
def _redux(i: Instruction, m: re.Match[str]) -> str:
    kind = _TYPES[m[2]]
    symbols = {"add": "a + b", "min": "b < a ? b : a", "max": "a < b ? b : a", "and": "a & b", "or": "a | b"}
    body = symbols.get(m[1], "a ^ b")
    return i.assign(
        0, f"emu::reduce_sync({i.value(2, 'u32')}, {i.value(1, m[2])}, []({kind} a, {kind} b) {{ return {body}; }})"
    )


@instruction(r"barrier\.cluster\.arrive(\.release|\.relaxed)?\.aligned")
def _cluster_arrive(i: Instruction, m: re.Match[str]) -> str:
    return _call("cluster_arrive", _flag(m[1] != ".relaxed"))


@instruction(r"barrier\.cluster\.wait(?:\.acquire)?\.aligned")
def _cluster_wait(i: Instruction, m: re.Match[str]) -> str:
    return _call("cluster_wait")


# ---- mbarriers -------------------------------------------------------------------------------------------------------

_SEMANTICS = r"(?:\.(?:release|acquire|relaxed))?(?:\.(?:cta|cluster))?"
_SHARED = r"(?:\.shared(?:::cta|::cluster)?)?"


@instruction(rf"mbarrier\.init{_SHARED}\.b64")
def _mbarrier_init(i: Instruction, m: re.Match[str]) -> str:
    i.expect(2)
    return _call("mbarrier_init", i.shared(0), i.value(1, "u32"))


@instruction(rf"mbarrier\.inval{_SHARED}\.b64")
def _mbarrier_inval(i: Instruction, m: re.Match[str]) -> str:
    return _call("mbarrier_invalidate", i.shared(0))


@instruction(rf"mbarrier\.arrive(\.expect_tx)?{_SEMANTICS}{_SHARED}\.b64")
def _mbarrier_arrive(i: Instruction, m: re.Match[str]) -> str:
    at = 1 if not i.operands[0].startswith("[") else 0
    barrier = f"uint32_t({i.address(at)})"
    rest = i.value(at + 1, "u32") if len(i.operands) > at + 1 else None
    if m[1] and rest is None:
        raise PtxError(f"expect_tx without a byte count: {i.text}")
    count, size = ("1", rest) if m[1] else (rest or "1", "0")
    call = f"emu::mbarrier_arrive({barrier}, {count}, {size})"
    return i.assign(0, call) if at else f"{call};"


@instruction(rf"mbarrier\.expect_tx{_SEMANTICS}{_SHARED}\.b64")
def _mbarrier_expect(i: Instruction, m: re.Match[str]) -> str:
    return _call("mbarrier_expect", i.shared(0), i.value(1, "u32"))


@instruction(rf"mbarrier\.(try_wait|test_wait)\.parity{_SEMANTICS}{_SHARED}\.b64")
def _mbarrier_wait(i: Instruction, m: re.Match[str]) -> str:
    i.expect(3, 4)
    parity = f"({i.value(2, 'u32')} & 1) != 0"
    return i.assign(0, f"emu::mbarrier_wait({i.shared(1)}, {parity}, {_flag(m[1] == 'try_wait')})")


@instruction(r"fence\.mbarrier_init\.release\.cluster")
def _mbarrier_fence(i: Instruction, m: re.Match[str]) -> str:
    return _call("mbarrier_init_fence")


# ---- asynchronous copies ---------------------------------------------------------------------------------------------

_HINT = r"(\.L2::cache_hint)?"


def _coordinates(i: Instruction, coordinates: list[str], rank: str) -> str:
    if len(coordinates) != int(rank):
        raise PtxError(f"{len(coordinates)} coordinates in: {i.text}")
    return f"const int emu_at[] = {{{', '.join(coordinates)}}};"


@instruction(r"prefetch\.(?:param\.)?tensormap")
def _prefetch_map(i: Instruction, m: re.Match[str]) -> str:
    return _call("tensor_prefetch", f"(const void*)({i.address(0)})")


@instruction(
    r"cp\.async\.bulk\.tensor\.([1-5])d\.shared::(?:cluster|cta)\.global(?:\.tile)?"
    r"\.mbarrier::complete_tx::bytes(\.multicast::cluster)?" + _HINT
)
def _tensor_load(i: Instruction, m: re.Match[str]) -> str:
    i.expect(3 + bool(m[2]) + bool(m[3]))
    source, coordinates = i.tensor(1)
    smem, barrier = i.shared(0), i.shared(2)
    ctas = i.value(3, "u16") if m[2] else "1u << emu::cluster_rank()"
    call = _call("tensor_load", smem, f"(const void*)({source})", barrier, m[1], "emu_at", ctas)
    return f"{{ {_coordinates(i, coordinates, m[1])} {call} }}"


_COMBINE = {"f32": "kAddF32", "bf16": "kAddBf16", "f16": "kAddF16"}


@instruction(
    r"cp\.(reduce\.)?async\.bulk\.tensor\.([1-5])d\.global\.shared::cta(?:\.(add))?(?:\.tile)?\.bulk_group" + _HINT
)
def _tensor_store(i: Instruction, m: re.Match[str]) -> str:
    i.expect(2 + bool(m[4]))
    if bool(m[1]) != bool(m[3]):
        raise PtxError(f"a reduction has an operation, a store has none: {i.text}")
    target, coordinates = i.tensor(0)
    combine = f"emu::tensor_addition((const void*)({target}))" if m[1] else "emu::Combine::kNone"
    call = _call("tensor_store", f"(const void*)({target})", i.shared(1), m[2], "emu_at", combine)
    return f"{{ {_coordinates(i, coordinates, m[2])} {call} }}"


@instruction(r"cp\.async\.bulk\.shared::(?:cluster|cta)\.global\.mbarrier::complete_tx::bytes" + _HINT)
def _bulk_load(i: Instruction, m: re.Match[str]) -> str:
    i.expect(4 + bool(m[1]))
    smem, barrier = i.shared(0), i.shared(3)
    return _call("bulk_load", smem, f"(const void*)({i.address(1)})", i.value(2, "u32"), barrier)


@instruction(r"cp\.async\.bulk\.global\.shared::cta\.bulk_group" + _HINT)
def _bulk_store(i: Instruction, m: re.Match[str]) -> str:
    i.expect(3 + bool(m[1]))
    target, smem = f"(void*)({i.address(0)})", i.shared(1)
    return _call("bulk_store", target, smem, i.value(2, "u32"), "emu::Combine::kNone")


@instruction(r"cp\.reduce\.async\.bulk\.global\.shared::cta\.bulk_group" + _HINT + r"\.add(?:\.noftz)?\.(f32|bf16|f16)")
def _bulk_reduce(i: Instruction, m: re.Match[str]) -> str:
    i.expect(3 + bool(m[1]))
    target, smem = f"(void*)({i.address(0)})", i.shared(1)
    return _call("bulk_store", target, smem, i.value(2, "u32"), f"emu::Combine::{_COMBINE[m[2]]}")


@instruction(r"cp\.async\.bulk\.prefetch\.tensor\.([1-5])d\.L2\.global(?:\.tile)?" + _HINT)
def _bulk_tensor_prefetch(i: Instruction, m: re.Match[str]) -> str:
    i.expect(1 + bool(m[2]))
    source, coordinates = i.tensor(0)
    call = _call("tensor_prefetch_box", f"(const void*)({source})", m[1], "emu_at")
    return f"{{ {_coordinates(i, coordinates, m[1])} {call} }}"


@instruction(r"cp\.async\.bulk\.prefetch\.L2\.global" + _HINT)
def _bulk_prefetch(i: Instruction, m: re.Match[str]) -> str:
    return ";"


@instruction(r"cp\.async\.bulk\.commit_group")
def _bulk_commit(i: Instruction, m: re.Match[str]) -> str:
    return _call("bulk_commit")


@instruction(r"cp\.async\.bulk\.wait_group(\.read)?")
def _bulk_wait(i: Instruction, m: re.Match[str]) -> str:
    return _call("bulk_wait", i.value(0, "s32"), _flag(m[1]))


@instruction(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global" + _HINT + r"(?:\.L2::\w+)?")
def _cp_async(i: Instruction, m: re.Match[str]) -> str:
    size = i.value(2, "u32")
    source = i.value(3, "u32") if len(i.operands) > 3 + bool(m[1]) else size
    return _call("async_copy", i.shared(0), f"(const void*)({i.address(1)})", size, source)


@instruction(r"cp\.async\.commit_group")
def _cp_async_commit(i: Instruction, m: re.Match[str]) -> str:
    return _call("async_commit")


@instruction(r"cp\.async\.wait_(group|all)")
def _cp_async_wait(i: Instruction, m: re.Match[str]) -> str:
    return _call("async_wait", i.value(0, "s32")) if m[1] == "group" else "emu::async_commit(); emu::async_wait(0);"


@instruction(r"cp\.async\.mbarrier\.arrive(\.noinc)?(?:\.shared(?:::cta)?)?\.b64")
def _cp_async_arrive(i: Instruction, m: re.Match[str]) -> str:
    return _call("async_arrive", i.shared(0), _flag(m[1]))


# ---- matrices --------------------------------------------------------------------------------------------------------


@instruction(r"ldmatrix\.sync\.aligned(?:\.m8n8)?\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _ldmatrix(i: Instruction, m: re.Match[str]) -> str:
    names = [f"&emu::word({i.name(t)})" for t in i.vector(0)]
    if len(names) != int(m[1]):
        raise PtxError(f"{len(names)} registers in: {i.text}")
    call = _call("load_matrix", i.shared(1), m[1], _flag(m[2]), "emu_to")
    return f"{{ uint32_t* const emu_to[] = {{{', '.join(names)}}}; {call} }}"


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _stmatrix(i: Instruction, m: re.Match[str]) -> str:
    values = [i._value(v, "b32") for v in i.vector(1)]
    if len(values) != int(m[1]):
        raise PtxError(f"{len(values)} registers in: {i.text}")
    call = _call("store_matrix", i.shared(0), m[1], _flag(m[2]), "emu_from")
    return f"{{ const uint32_t emu_from[] = {{{', '.join(values)}}}; {call} }}"


@instruction(r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16")
def _movmatrix(i: Instruction, m: re.Match[str]) -> str:
    return _call("transpose_matrix", f"emu::word({i.name(i.operands[0])})", i.value(1, "b32"))


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.(bf16|f16)\.f32")
def _mma(i: Instruction, m: re.Match[str]) -> str:
    if m[1] != m[2]:
        raise PtxError(f"operands of two types: {i.text}")
    d = ", ".join(f"&{i.name(t)}" for t in i.vector(0))
    a, b = (", ".join(i._value(t, "b32") for t in i.vector(k)) for k in (1, 2))
    c = ", ".join(i._value(t, "f32") for t in i.vector(3))
    arrays = f"float* const emu_d[4] = {{{d}}}; const uint32_t emu_a[4] = {{{a}}}; const uint32_t emu_b[2] = {{{b}}};"
    call = _call("mma_m16n8k16", "emu_d", "emu_a", "emu_b", "emu_c", _flag(m[1] == "bf16"))
    return f"{{ {arrays} const float emu_c[4] = {{{c}}}; {call} }}"


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.(bf16|f16)")
def _wgmma(i: Instruction, m: re.Match[str]) -> str:
    n, d = int(m[1]), i.vector(0)
    if n % 8 or not 8 <= n <= 256 or len(d) != n // 2 or m[2] != m[3]:
        raise PtxError(f"{len(d)} accumulators, types {m[2]} and {m[3]} in: {i.text}")
    from_registers = i.operands[1].startswith("{")
    i.expect(7 if from_registers else 8)
    scale = [_immediate(i, k, (-1, 1)) for k in (4, 5)]
    transpose = [_immediate(i, k, (0, 1)) for k in range(6, len(i.operands))]
    transpose = ["0", *transpose] if from_registers else transpose
    fragment = "static constexpr emu::RegisterA* emu_fragment = nullptr;"
    if from_registers:
        registers = i.vector(1)
        if len(registers) != 4:
            raise PtxError(f"{len(registers)} registers of A in: {i.text}")
        fragment = f"const emu::RegisterA emu_fragment[4] = {{{', '.join(_register(i, r) for r in registers)}}};"
    accumulate = i.value(3, "pred") if not i.operands[3].isdigit() else _flag(i.operands[3] != "0")
    a = "0" if from_registers else i.value(1, "u64")
    fields = [
        str(n),
        _flag(m[2] == "bf16"),
        _flag(from_registers),
        accumulate,
        *scale,
        *transpose,
    ]
    operation = f"const emu::Wgmma emu_operation = {{{', '.join(fields)}, {a}, {i.value(2, 'u64')}}};"
    accumulators = f"float* const emu_d[{n // 2}] = {{{', '.join('&' + i.name(r) for r in d)}}};"
    return f"{{ {accumulators} {fragment} {operation} emu::wgmma(emu_operation, emu_d, emu_fragment); }}"


def _immediate(i: Instruction, index: int, legal: tuple[int, int]) -> str:
    """A number in the text, or an operand of constraint "n"."""
    operand = i.operands[index]
    if re.fullmatch(r"-?\d+", operand) and int(operand) in legal:
        return operand
    if not operand.startswith("%") or not i.name(operand).startswith("emu_n"):
        raise PtxError(f"operand {index} must be one of {legal}, got {operand} in: {i.text}")
    return f"emu::immediate<{i.name(operand)}, {legal[0]}, {legal[1]}>()"


def _register(i: Instruction, register: str) -> str:
    """An element of an array is read when the product is carried out; any other expression may not live that long."""
    match = re.fullmatch(r"%(\d+)", register)
    if match is not None:
        operand = i.statement.operand_list[int(match[1])]
        if not operand.is_output and operand.expression.rstrip().endswith("]"):
            return f"{{reinterpret_cast<const uint32_t*>(&({operand.expression})), 0}}"
    return f"{{nullptr, {i._value(register, 'b32')}}}"


@instruction(r"wgmma\.fence\.sync\.aligned")
def _wgmma_fence(i: Instruction, m: re.Match[str]) -> str:
    return _call("wgmma_fence")


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def _wgmma_commit(i: Instruction, m: re.Match[str]) -> str:
    return _call("wgmma_commit")


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def _wgmma_wait(i: Instruction, m: re.Match[str]) -> str:
    return _call("wgmma_wait", i.value(0, "s32"))
