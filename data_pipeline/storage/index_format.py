"""megatron-core's layout of an `.idx` file, for reading and writing it without megatron-core.

A header, then per sequence its length (int32) and byte offset in the `.bin` file (int64), then the number of the first
sequence of every document and one past the last (int64).
"""

import struct

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
BYTES_PER_SEQUENCE = 12
BYTES_PER_BOUNDARY = 8
