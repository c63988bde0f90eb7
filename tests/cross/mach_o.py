"""Reads what a macOS arm64 library needs and offers, from its load commands and its symbol table."""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGIC_64 = 0xFEEDFACF
CPU_ARM64 = 0x0100000C
# Load commands, <mach-o/loader.h>.
LC_SYMTAB = 0x2
LC_LOAD_DYLIB, LC_LOAD_WEAK_DYLIB, LC_REEXPORT_DYLIB = 0xC, 0x80000018, 0x8000001F
LC_RPATH = 0x8000001C
LC_BUILD_VERSION, LC_VERSION_MIN_MACOSX = 0x32, 0x24
# Symbol types, <mach-o/nlist.h>.
N_STAB, N_TYPE, N_EXT, N_UNDF = 0xE0, 0x0E, 0x01, 0x0


@dataclass(frozen=True)
class Library:
    """A parsed library.

    Attributes:
        libraries: Install names of the libraries that it loads.
        rpaths: Where @rpath looks.
        minimum_macos: Such as ``(14, 0)``.
        undefined: Symbols that others must define.
        defined: Symbols that it defines for others.
    """

    libraries: list[str]
    rpaths: list[str]
    minimum_macos: tuple[int, int]
    undefined: set[str]
    defined: set[str]


def _text(data, start):
    return data[start : data.index(b"\0", start)].decode()


def _symbols(data, command):
    symbols, count, strings, _ = struct.unpack_from("<4I", data, command + 8)
    undefined, defined = set(), set()
    for i in range(count):
        name, kind, _, _, value = struct.unpack_from("<IBBHQ", data, symbols + 16 * i)
        if kind & N_STAB or not kind & N_EXT:
            continue
        # An undefined symbol with a value is a common one: it defines itself.
        is_undefined = kind & N_TYPE == N_UNDF and not value
        (undefined if is_undefined else defined).add(_text(data, strings + name))
    return undefined, defined


def read(data: bytes) -> Library:
    """Parse a thin arm64 Mach-O file.

    Raises:
        ValueError: If it is anything else.
    """
    magic, cpu = struct.unpack_from("<II", data)
    if magic != MAGIC_64 or cpu != CPU_ARM64:
        raise ValueError(f"not a thin arm64 Mach-O file: magic {magic:#x}, cpu {cpu:#x}")
    count = struct.unpack_from("<I", data, 16)[0]
    libraries, rpaths, minimum, undefined, defined = [], [], (0, 0), set(), set()
    at = 32
    for _ in range(count):
        command, size = struct.unpack_from("<II", data, at)
        if command in (LC_LOAD_DYLIB, LC_LOAD_WEAK_DYLIB, LC_REEXPORT_DYLIB):
            libraries.append(_text(data, at + struct.unpack_from("<I", data, at + 8)[0]))
        elif command == LC_RPATH:
            rpaths.append(_text(data, at + struct.unpack_from("<I", data, at + 8)[0]))
        elif command in (LC_BUILD_VERSION, LC_VERSION_MIN_MACOSX):
            version = struct.unpack_from("<I", data, at + (12 if command == LC_BUILD_VERSION else 8))[0]
            minimum = (version >> 16, version >> 8 & 0xFF)
        elif command == LC_SYMTAB:
            undefined, defined = _symbols(data, at)
        at += size
    return Library(libraries, rpaths, minimum, undefined, defined)
