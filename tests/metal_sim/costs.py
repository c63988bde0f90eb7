"""What instructions of LLVM's IR cost on an Apple GPU: operations of every basic block, by class."""

from __future__ import annotations

import re

from .ir import FLAGS, NAME, Function

# A multiply by one of these decodes one weight: 3INST, MCG and MUL1 (csrc/format.h).
CODEBOOK_MULTIPLIERS = {89226354, 0xCBAC1FED, 0x83DCD12D}
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
_ANNOTATIONS = ("llvm.lifetime.", "llvm.assume", "llvm.experimental.noalias.scope.decl", "llvm.dbg.")
_INTRINSIC = {
    "memset": None,  # kernels have no memory of their own: operands of simdgroup operations for the runtime
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


def _constants(instruction):
    return [int(x) for x in re.findall(r"(?<![\w.%-])-?\d+\b(?! x)", FLAGS.sub("", instruction.rest))]


def classify(function: Function) -> None:
    """Fill in what every block of a function costs, and how many weights it decodes."""
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
    found = {pointer for i in calls for pointer in re.findall(rf"\bptr (?:\w+ )*({NAME})", i.rest)}
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
    if not callee or callee[1].startswith(_ANNOTATIONS):
        return None, 0
    name = re.match(r"llvm\.([a-z0-9]+)", callee[1])
    if not name:
        return _library_call(callee[1])
    if name[1] in ("fshl", "fshr"):
        amount = i.rest.rsplit(",", 1)[-1]
        if "%" in amount:
            return "variable_shift", i.lanes
        return (None, 0) if re.search(r"\b16\)", amount) else ("shift", i.lanes)
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
