"""Read what a compiled CUDA kernel needs from its cubin: registers and bytes of stack a thread, as ptxas wrote them.

A cubin is an ELF file for 64 bits. Its section `.nv.info` is a list of attributes; those read here name a function and
a number. ptxas itself is inside NVIDIA's compiler for CuTe and newer than triton's, which refuses its PTX.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REGISTERS, FRAME_BYTES = 0x2F, 0x11  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE
SIZED = 4  # the format of attributes that have a body; others are four bytes
SECTION = struct.Struct("<IIQQQQIIQQ")


@dataclass(frozen=True)
class Cubin:
    """Holds what one compiled kernel needs.

    target: architecture in the file's name, sm_90a. registers, stack: of a thread; stack in bytes, spills among them.
    """

    name: str
    target: str
    registers: int
    stack: int


def read_cubin(path: Path) -> Cubin:
    """Return what the kernel of a file `NAME.TARGET.cubin` needs."""
    data = path.read_bytes()
    found = list(_read_attributes(data))
    assert found, f"no .nv.info in {path}"
    name, target, _ = path.name.rsplit(".", 2)
    most = {kind: max((value for other, value in found if other == kind), default=0) for kind, _ in found}
    return Cubin(name, target, most[REGISTERS], most[FRAME_BYTES])


def _read_attributes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield kind and number of every attribute of a function."""
    for name, start, size in _list_sections(data):
        position, stop = start, start + size
        while name == ".nv.info" and position < stop:
            form, kind, length = struct.unpack_from("<BBH", data, position)
            position += 4
            if form == SIZED:
                if kind in (REGISTERS, FRAME_BYTES):
                    _, value = struct.unpack_from("<II", data, position)
                    yield kind, value
                position += length


def _list_sections(data: bytes) -> list[tuple[str, int, int]]:
    """Return name, first byte and size of every section."""
    assert data[:5] == b"\x7fELF\x02", "not an ELF file for 64 bits"
    [table] = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    sections = [SECTION.unpack_from(data, table + number * size) for number in range(count)]
    names_start = sections[names][4]

    def name_of(offset: int) -> str:
        start = names_start + offset
        return data[start : data.index(b"\0", start)].decode()

    return [(name_of(section[0]), section[4], section[5]) for section in sections]
