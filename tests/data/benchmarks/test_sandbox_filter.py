"""The filter of system calls: its numbers, and what its instructions come to."""

from __future__ import annotations

import ctypes
import re
import struct
from pathlib import Path

import pytest

from sdft_lightning.data.benchmarks.sandbox import LOOKED_AT, REFUSED, filter_program
from sdft_lightning.errors import UserError

pytestmark = pytest.mark.attack

TABLE = {**REFUSED, **LOOKED_AT}
ALLOW, KILL, REFUSE, UNKNOWN = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
MACHINES = [("x86_64", 0xC000003E, 0), ("aarch64", 0xC00000B7, 1)]


def decided(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What the filter returns for a call: the instructions one after the other."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *(*arguments, *([0] * 6))[:6])
    steps = list(struct.iter_unpack("=HBBI", program))
    at = register = 0
    while True:
        code, when, otherwise, value = steps[at]
        at += 1
        if code == 0x20:
            (register,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            register &= value
        elif code == 0x06:
            return value
        else:
            true = {0x15: register == value, 0x35: register >= value, 0x45: register & value}[code]
            at += when if true else otherwise


@pytest.mark.parametrize(("machine", "architecture", "column"), MACHINES)
def test_the_filter_decides_as_its_table_says(machine: str, architecture: int, column: int) -> None:
    program = filter_program(machine)
    numbers = {name: each[column] for name, each in TABLE.items() if each[column] is not None}
    refused = {numbers[name] for name in REFUSED if name in numbers}
    for number in set(range(463)) - {numbers[name] for name in LOOKED_AT}:
        expected = REFUSE if number in refused else ALLOW
        assert decided(program, architecture, number) == expected, number
    for number in (463, 4096, 0x40000000, 0x40000000 | 41, 0xFFFFFFFF, numbers["clone3"]):
        assert decided(program, architecture, number) == UNKNOWN
    other = {each for _, each, _ in MACHINES} - {architecture} | {0x40000003, 0x40000028}
    for each in other:  # also the 32-bit kinds
        assert decided(program, each, 1) == KILL


@pytest.mark.parametrize(("machine", "architecture", "column"), MACHINES)
def test_clone_and_socketpair_are_looked_at(machine: str, architecture: int, column: int) -> None:
    program = filter_program(machine)
    clone, pair = LOOKED_AT["clone"][column], LOOKED_AT["socketpair"][column]
    assert clone is not None
    assert pair is not None
    thread, fork = 0x003D0F00, 0x01200011
    for flags in (thread, fork, 0x4111):
        assert decided(program, architecture, clone, flags) == ALLOW
        for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 1 << 28, 1 << 29, 1 << 30):
            assert decided(program, architecture, clone, flags | namespace) == REFUSE
    blocking, close_on_exec = 0x800, 0x80000
    assert decided(program, architecture, pair, 1, 1 | blocking | close_on_exec) == ALLOW
    assert decided(program, architecture, pair, 1, 1) == ALLOW
    for family, kind in ((1, 2), (1, 5), (1, 3), (2, 1), (16, 1), (40, 1)):
        assert decided(program, architecture, pair, family, kind) == REFUSE


@pytest.mark.parametrize("machine", ["riscv64", "i686", "armv7l", "ppc64le"])
def test_other_machines_are_refused_by_name(machine: str) -> None:
    with pytest.raises(UserError, match=f"x86_64 and aarch64, this is {machine}"):
        filter_program(machine)


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0),
        ("/usr/include/asm-generic/unistd.h", 1),
    ],
)
def test_the_numbers_are_those_of_the_kernel_s_headers(header: str, column: int) -> None:
    if not Path(header).is_file():
        pytest.skip(f"no {header} here (linux-libc-dev)")
    known = {
        name: int(number)
        for name, number in re.findall(
            r"#define\s+__NR_(?:3264_)?(\w+)\s+(\d+)\b", Path(header).read_text()
        )
    }
    for name, numbers in TABLE.items():
        if name in known:
            assert numbers[column] == known[name], name
        else:
            assert numbers[column] is None or numbers[0] == numbers[1], name


@pytest.mark.parametrize(("machine", "architecture", "column"), MACHINES)
def test_the_numbers_are_those_of_libseccomp(machine: str, architecture: int, column: int) -> None:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("no libseccomp here")
    for name, numbers in TABLE.items():
        found = library.seccomp_syscall_resolve_name_arch(
            ctypes.c_uint32(architecture), name.encode()
        )
        if found >= 0:
            assert numbers[column] == found, name
