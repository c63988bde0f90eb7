"""A reader for LLVM's textual IR: basic blocks, loops and liveness."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

NAME = r'[%@](?:[\w.$-]+|"[^"]*")'
_INSTRUCTION = re.compile(rf"\s+(?:(?P<result>{NAME}) = )?(?:(?:tail|musttail|notail) )?(?P<op>[a-z]\w*)(?P<rest>.*)")
_LABEL = re.compile(r'^(?P<label>[\w.$-]+|"[^"]*"):')
_DEFINE = re.compile(r"^define .*?(?P<name>@(?:[\w.$-]+|\"[^\"]*\"))\((?P<rest>.*)\{")
_VECTOR = re.compile(r"<(\d+) x ([\w*]+)>")
_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}
FLAGS = re.compile(
    r"\b(?:nuw|nsw|exact|disjoint|nneg|samesign|inbounds|contract|fast|nnan|ninf|nsz|arcp|afn|reassoc)\b"
)


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
        text = FLAGS.sub("", self.rest)
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
                arguments = re.findall(NAME, define["rest"])
            elif line == "}" and current is not None:
                first = len(self.blocks)
                self.blocks += current
                self.functions.append(Function(name, current, range(first, len(self.blocks)), arguments))
                current = None
            elif current is not None:
                self._read(line, number, current)

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
    found = re.search(r"\bi(\d+)\b|\b(half|bfloat|float|double|ptr)\b", FLAGS.sub("", text))
    bits = 32 if not found else int(found[1]) if found[1] else _BITS[found[2]]
    vector = _VECTOR.search(text)
    return max(16, bits) * (int(vector[1]) if vector else 1) / 32


def _widened_offsets(function: Function) -> dict[str, str]:
    """Offsets of 32 bits that are widened for an address only, and what they are made of: loads and stores add them to
    their base as they are.
    """
    users: dict[str, list] = {}
    for block in function.blocks:
        for i in block.instructions:
            for operand in i.operands:
                users.setdefault(operand, []).append(i)
    widened = (i for b in function.blocks for i in b.instructions if i.op == "zext" and i.operands)
    return {
        i.result: i.operands[0]
        for i in widened
        if "i32" in i.rest and all(u.op == "getelementptr" for u in users.get(i.result, []))
    }


def live_registers(function: Function, part: frozenset[int]) -> int:
    """The most 32-bit registers live at once, from liveness in the IR. An estimate: no scheduling, no
    spilling.

    Args:
        function: With all that it calls inlined.
        part: Numbers of its blocks. Of a loop's only what is live there counts, and of what comes from outside only
            what the loop uses (Apple's GPUs keep arguments and uniform values in other registers).
    """
    same = _widened_offsets(function)
    width = {i.result: _width(i) for b in function.blocks for i in b.instructions if i.result}
    own = [b for n, b in zip(function.block_ids, function.blocks) if n in part]
    mentioned = {v for b in own for i in b.instructions for v in (i.result, *i.operands)}
    width = {v: width[v] for v in mentioned & width.keys()}
    # Per block, from its end: (result, operands) of each instruction.
    uses = [
        [(i.result, {same.get(o, o) for o in i.operands} & width.keys()) for i in reversed(b.instructions)]
        for b in function.blocks
    ]
    position = {b.label.strip('"'): n for n, b in enumerate(function.blocks)}
    successors = [[position[s.strip('"')] for s in b.successors] for b in function.blocks]
    live_in: list[set] = [set() for _ in function.blocks]

    def live_at_begin(n, see=lambda live: None):
        """Of a block; `see` is given what is live after each of its instructions."""
        live = set().union(*(live_in[s] for s in successors[n]))
        for result, operands in uses[n]:
            see(live)
            live.discard(result)
            live |= operands
        return live

    changed = True
    while changed:
        changed = False
        for n in reversed(range(len(function.blocks))):
            live = live_at_begin(n)
            if live != live_in[n]:
                live_in[n], changed = live, True
    totals = [0.0]
    for n, block in enumerate(function.block_ids):
        if block in part:
            live_at_begin(n, lambda live: totals.append(sum(width[v] for v in live)))
    return round(max(totals))
