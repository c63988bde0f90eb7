"""A reader for LLVM's textual IR: basic blocks, loops, liveness, and what every block costs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

# A multiply by one of these decodes one weight: 3INST, MCG and MUL1 (csrc/format.h).
CODEBOOK_MULTIPLIERS = {89226354, 0xCBAC1FED, 0x83DCD12D}
_NAME = r'[%@](?:[\w.$-]+|"[^"]*")'
_INSTRUCTION = re.compile(rf"\s+(?:(?P<result>{_NAME}) = )?(?:(?:tail|musttail|notail) )?(?P<op>[a-z]\w*)(?P<rest>.*)")
_LABEL = re.compile(r'^(?P<label>[\w.$-]+|"[^"]*"):')
_DEFINE = re.compile(r"^define .*?(?P<name>@(?:[\w.$-]+|\"[^\"]*\"))\((?P<rest>.*)\{")
_VECTOR = re.compile(r"<(\d+) x ([\w*]+)>")
_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}
_FLAGS = re.compile(
    r"\b(?:nuw|nsw|exact|disjoint|nneg|samesign|inbounds|contract|fast|nnan|ninf|nsz|arcp|afn|reassoc)\b"
)

_FREE = {
    "trunc",
    "zext",
    "sext",
    "bitcast",
    "freeze",
    "phi",
    "extractelement",
    "insertelement",
    "shufflevector",
} | {
    "fpext",
    "fptrunc",
    "fneg",
    "ptrtoint",
    "inttoptr",
    "addrspacecast",
    "extractvalue",
    "insertvalue",
    "alloca",
    "unreachable",
    "ret",
    "fence",
}
_INTEGER = {"add", "sub", "and", "or", "xor", "icmp", "select"}
_FLOAT = {"fadd", "fsub", "fmul", "fcmp"}
_CONVERT = {"fptosi", "fptoui", "sitofp", "uitofp"}
_SPECIAL = {"fdiv", "frem"}
# Without an instruction for it: a float reciprocal, two conversions, three or four multiplies, corrections. About 48
# clocks, as six of `special`.
_DIVISION = {"udiv", "sdiv", "urem", "srem"}
_DIVISION_COST = 6
# 64-bit adds take 4 clocks on M1 and M2 (metal-benchmarks), two registers of bits 2.
_WIDE = {"add": 4, "sub": 4}
_ANNOTATIONS = {"lifetime", "assume", "experimental.noalias.scope.decl", "dbg"}
_INTRINSIC = {
    "fma": "float",
    "fmuladd": "float",
    "minnum": "float",
    "maxnum": "float",
    "minimum": "float",
    "maximum": "float",
    "fabs": None,
    "copysign": "integer",
    "umin": "integer",
    "umax": "integer",
    "smin": "integer",
    "smax": "integer",
    "abs": "integer",
    "bswap": "shift",
    "bitreverse": "shift",
    "ctpop": "shift",
    "ctlz": "shift",
    "cttz": "shift",
    "floor": "convert",
    "ceil": "convert",
    "trunc": "convert",
    "rint": "convert",
    "nearbyint": "convert",
    "sqrt": "special",
    "exp": "special",
    "exp2": "special",
    "log": "special",
    "log2": "special",
    "sin": "special",
    "cos": "special",
    "tanh": "special",
    "pow": "special",
}


@dataclass
class Instruction:
    result: str | None
    op: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r'%(?:[\w.$-]+|"[^"]*")', self.rest)

    @property
    def lanes(self) -> int:
        """Elements of a vector operation: Apple's ALUs are scalar."""
        vector = _VECTOR.search(self.rest)
        return int(vector[1]) if vector else 1

    @property
    def bits(self) -> int:
        """Width of one element of the first type that is named; of ``select``'s, of the values."""
        text = _FLAGS.sub("", self.rest)
        if self.op == "select":
            text = text.split(",", 1)[1]
        found = re.search(r"\bi(\d+)\b|\b(half|bfloat|float|double|ptr)\b", text)
        return 32 if not found else int(found[1]) if found[1] else _BITS[found[2]]


@dataclass
class Block:
    label: str
    instructions: list[Instruction] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    operations: Counter = field(default_factory=Counter)
    weights: int = 0

    @property
    def successors(self) -> list[str]:
        last = self.instructions[-1] if self.instructions else None
        return re.findall(r'label %([\w.$-]+|"[^"]*")', last.rest) if last and last.op in ("br", "switch") else []


@dataclass
class Function:
    name: str
    blocks: list[Block]
    block_ids: range
    arguments: list[str]


class Module:
    """Functions of a module; ``blocks`` lists the blocks of all of them.

    Args:
        text: What ``clang -S -emit-llvm`` printed.
    """

    def __init__(self, text: str):
        self._lines = text.split("\n")
        self.functions, self.blocks = [], []
        current = None
        for number, line in enumerate(self._lines):
            define = _DEFINE.match(line)
            if define:
                current = [Block("entry")]
                name = define["name"][1:].strip('"')
                arguments = re.findall(_NAME, define["rest"])
            elif line == "}" and current is not None:
                first = len(self.blocks)
                self.blocks += current
                self.functions.append(Function(name, current, range(first, len(self.blocks)), arguments))
                current = None
            elif current is not None:
                self._read(line, number, current)
        for function in self.functions:
            _classify(function)

    @staticmethod
    def _read(line, number, blocks):
        label = _LABEL.match(line)
        if label:
            if not blocks[-1].instructions and len(blocks) == 1:
                blocks[-1].label = label["label"]
            else:
                blocks.append(Block(label["label"]))
            return
        found = _INSTRUCTION.match(line)
        if found and not line.lstrip().startswith(";"):
            if blocks[-1].instructions and blocks[-1].instructions[-1].op == "switch" and not found["result"]:
                if found["op"][0] == "i" and "label" in line:  # a line of the switch's table
                    blocks[-1].instructions[-1].rest += " " + line.strip()
                    return
            blocks[-1].instructions.append(Instruction(found["result"], found["op"], found["rest"].split(", !")[0]))
            blocks[-1].lines.append(number)
        elif "label %" in line and blocks[-1].instructions:
            blocks[-1].instructions[-1].rest += " " + line.strip()

    def instrumented(self) -> str:
        """The same module, in which every block first calls ``msl_block`` with its number."""
        lines = list(self._lines)
        for number, block in enumerate(self.blocks):
            places = [n for n, i in zip(block.lines, block.instructions) if i.op not in ("phi", "alloca")]
            lines[places[0]] = f"  call void @msl_block(i32 {number})\n" + lines[places[0]]
        return "\n".join(lines) + "\ndeclare void @msl_block(i32)\n"


def _constants(instruction):
    return [int(x) for x in re.findall(r"(?<![\w.%-])-?\d+\b(?! x)", _FLAGS.sub("", instruction.rest))]


def _classify(function):
    users, definitions = {}, {}
    for block in function.blocks:
        for instruction in block.instructions:
            definitions[instruction.result] = instruction
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
    passed = _passed_through_memory(function, users)
    for block in function.blocks:
        for i in block.instructions:
            if i.op in ("load", "store") and i.operands and i.operands[-1] in passed:
                continue
            name, times = _cost(i, users.get(i.result, []))
            if name == "integer" and (_joins_a_multiply(i, definitions, users) or _pairs_registers(i, definitions)):
                continue
            if name:
                block.operations[name] += times
            if i.op == "mul":
                constants = {c & 0xFFFFFFFF for c in _constants(i)}
                block.weights += _used_lanes(i, users.get(i.result, [])) * bool(constants & CODEBOOK_MULTIPLIERS)


def _passed_through_memory(function, users):
    """Addresses of the operands and results of simdgroup operations: in memory only for the simulator's runtime."""
    calls = (i for b in function.blocks for i in b.instructions if i.op == "call" and "@msl_simd(" in i.rest)
    found = {pointer for i in calls for pointer in re.findall(rf"\bptr (?:\w+ )*({_NAME})", i.rest)}
    inside = (u for a in found for u in users.get(a, []) if u.op == "getelementptr" and u.operands[0] == a)
    return found | {u.result for u in inside}


def _joins_a_multiply(i, definitions, users):
    """The add of a multiply-add: one instruction, IMAD, which also shifts its addend (Mesa's table of AGX opcodes)."""
    factors = [definitions[o] for o in i.operands if o in definitions and definitions[o].op == "mul"]
    return i.op == "add" and i.bits < 64 and any(len(users[f.result]) == 1 for f in factors)


def _pairs_registers(i, definitions):
    """Two registers named as one of 64 bits."""
    shifts = [definitions[o] for o in i.operands if o in definitions and definitions[o].op == "shl"]
    return i.op == "or" and i.bits == 64 and any(_constants(s)[-1:] == [32] for s in shifts)


def _used_lanes(i, users):
    """Elements of a vector operation that anybody reads."""
    if i.lanes > 1 and users and all(u.op == "extractelement" for u in users):
        return len({u.rest.rsplit(" ", 1)[-1] for u in users})
    return i.lanes


def _cost(i, users):
    """(class, operations) of one instruction; class None if it is free."""
    lanes = _used_lanes(i, users)
    # Most 64-bit integer operations are two of 32 bits, a multiply four.
    wide = 2 if i.bits == 64 else 1
    if i.op == "insertelement" and i.bits == 16 and "poison" not in i.rest:
        return "integer", 1  # of two halves that become a register one is moved
    if i.op in _FREE:
        return None, 0
    if i.op == "and" and 65535 in _constants(i):  # the low half of a register
        return None, 0
    if i.op in _INTEGER:
        return "integer", lanes * (_WIDE.get(i.op, 2) if i.bits == 64 else 1)
    if i.op in _FLOAT:
        return ("half" if i.bits == 16 else "float"), 0 if _is_contracted(i, users) else lanes
    if i.op in ("mul", "shl") and i.bits == 64 and _constants(i):
        return "integer", lanes  # the address of a loop: strength reduction makes it an add
    if i.op == "mul":
        return "multiply", lanes * wide * wide
    if i.op in ("shl", "lshr", "ashr"):
        return _shift(i, users, wide)
    if i.op in _CONVERT:
        return "convert", lanes
    if i.op in _SPECIAL:
        return "special", lanes
    if i.op in _DIVISION:  # by a constant: the high half of a product
        constant = not i.rest.rstrip().split(", ")[-1].startswith("%")
        return ("multiply", 2 * lanes) if constant else ("special", _DIVISION_COST * lanes * wide)
    if i.op in ("load", "store"):
        return i.op, 1
    if i.op == "getelementptr":  # loads and stores add a scaled index or a constant themselves
        addresses = all(u.op in ("load", "store") for u in users)
        return (None, 0) if addresses or len(i.operands) < 2 else ("integer", 1)
    if i.op == "br":
        return ("branch", 1) if "i1 " in i.rest else (None, 0)
    if i.op == "switch":
        return "branch", 1
    if i.op == "call":
        return _call(i)
    return None, 0


def _is_contracted(i, users):
    return i.op == "fmul" and len(users) == 1 and users[0].op in ("fadd", "fsub") and "contract" in users[0].rest


def _shift(i, users, wide):
    constants = _constants(i)
    amount = constants[-1] if constants and not i.rest.rstrip().split(", ")[-1].startswith("%") else None
    if amount is None:
        return ("wide_variable_shift" if wide > 1 else "variable_shift"), i.lanes
    if amount * 2 == i.bits >= 32:  # half of a register, or one register of a pair
        return None, 0
    sums = all(u.op in ("add", "sub", "getelementptr") or (u.op == "or" and "disjoint" in u.rest) for u in users)
    if i.op == "shl" and 1 <= amount <= 4 and sums:
        return None, 0
    return "shift", i.lanes * wide


def _call(i):
    callee = re.search(r"@([\w.]+)", i.rest)
    name = re.match(r"llvm\.([a-z0-9]+)", callee[1]) if callee else None
    if not name:
        return _library_call(callee[1]) if callee else (None, 0)
    if name[1] in ("fshl", "fshr"):
        amount = i.rest.rsplit(",", 1)[-1]
        if "%" in amount:
            return "variable_shift", i.lanes
        return (None, 0) if re.search(r"\b16\)", amount) else ("shift", i.lanes)
    if name[1] in _ANNOTATIONS or callee[1].removeprefix("llvm.") in _ANNOTATIONS:
        return None, 0
    if name[1] not in _INTRINSIC:
        raise NotImplementedError(f"what does @llvm.{name[1]} cost? Add it to _INTRINSIC in {__file__}")
    kind = _INTRINSIC[name[1]]
    kind = "half" if kind == "float" and i.bits == 16 else kind
    return (kind, i.lanes) if kind else (None, 0)


def _library_call(callee):
    if callee == "msl_fma_half":
        return "half", 1
    # The runtime counts its own calls; the kernels' functions count themselves. The others are libm's.
    return (None, 0) if callee.startswith(("msl_", "_Z")) else ("special", 1)


def natural_loops(function: Function) -> list[set[int]]:
    """Block ids of every natural loop."""
    position = {b.label.strip('"'): n for n, b in enumerate(function.blocks)}
    successors = [[position[s.strip('"')] for s in b.successors] for b in function.blocks]
    predecessors = [[p for p, s in enumerate(successors) if n in s] for n in range(len(successors))]
    everything = set(range(len(successors)))
    dominators = [{0}] + [set(everything) for _ in successors[1:]]
    changed = True
    while changed:
        changed = False
        for n in range(1, len(successors)):
            inherited = [dominators[p] for p in predecessors[n]]
            new = (set.intersection(*inherited) if inherited else set()) | {n}
            if new != dominators[n]:
                dominators[n], changed = new, True
    loops = {}
    for tail, targets in enumerate(successors):
        for head in targets:
            if head in dominators[tail]:
                body, todo = {head}, [tail]
                while todo:
                    n = todo.pop()
                    if n not in body:
                        body.add(n)
                        todo += predecessors[n]
                loops.setdefault(head, set()).update(body)
    return [{function.block_ids[n] for n in body} for body in loops.values()]


def _width(instruction):
    """32-bit registers that the result takes."""
    if instruction.op in ("call", "store", "br", "switch", "ret", "alloca") and not instruction.result:
        return 0
    if instruction.op == "icmp" or instruction.op == "fcmp":
        return 0  # predicates
    cast = re.search(r" to (<\d+ x )?(\w+)", instruction.rest)
    text = cast[0] if cast else instruction.rest
    found = re.search(r"\bi(\d+)\b|\b(half|bfloat|float|double|ptr)\b", _FLAGS.sub("", text))
    bits = 32 if not found else int(found[1]) if found[1] else _BITS[found[2]]
    vector = _VECTOR.search(text)
    return max(16, bits) * (int(vector[1]) if vector else 1) / 32


def live_registers(function: Function, loop: set[int] | None = None) -> int:
    """The most 32-bit registers live at once, from liveness in the IR. An estimate: no scheduling, no
    spilling.

    Args:
        function: With all that it calls inlined.
        loop: Blocks of a loop: then only what is live there, and of what comes from outside only what the
            loop uses (Apple's GPUs keep arguments and uniform values in other registers).
    """
    width = {i.result: _width(i) for b in function.blocks for i in b.instructions if i.result}
    position = {b.label.strip('"'): n for n, b in enumerate(function.blocks)}
    inside = set(function.block_ids) if loop is None else set(loop)
    if loop is not None:
        own = [b for n, b in zip(function.block_ids, function.blocks) if n in inside]
        width = {v: width[v] for b in own for i in b.instructions for v in (i.result, *i.operands) if v in width}
    live_in = [set() for _ in function.blocks]
    changed, most = True, 0
    while changed:
        changed, most = False, 0
        for n in reversed(range(len(function.blocks))):
            block = function.blocks[n]
            live = set()
            for s in block.successors:
                live |= live_in[position[s.strip('"')]]
            for i in reversed(block.instructions):
                if function.block_ids[n] in inside:
                    most = max(most, sum(width[v] for v in live))
                live.discard(i.result)
                live |= {v for v in i.operands if v in width}
            if live != live_in[n]:
                live_in[n], changed = live, True
    return round(most)
