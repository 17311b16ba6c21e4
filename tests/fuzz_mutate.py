"""Damages files knowingly: GGUF and safetensors by their structure, JSON by its values, anything by its bytes."""

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Files = dict[str, bytes]
INTEGERS = (0, 1, 2, 3, 7, 31, 32, 255, 256, 65535, *((1 << bits) - low for bits in (20, 31, 32, 40, 62, 63, 64)
            for low in (1, 0) if bits < 64 or low))  # fmt: skip
TEXTS = ("", " ", "a", "..", "../../etc/passwd", "/dev/zero", "\x00", "\n", "\x1b[2J", "▁", "🙂" * 50, "\u202e",
         "a" * 5000, "%s%n", "{{ 1 }}", "model.layers.0.self_attn.q_proj.weight", "F32", "llama", "<s>",
         "é\u0301")  # fmt: skip
NUMBERS = (0, -1, 1, 1.5, -0.0, 1e308, float("inf"), float("nan"), 1 << 31, 1 << 63, 1 << 64, 10**30)
VALUES: tuple[Any, ...] = (None, True, False, *NUMBERS, "", "x", "1", "\ud800", [], {}, [[]], [None], {"a": 1},
                           [1, 2, 3], ["a"], "a" * 5000)  # fmt: skip


def mutate(files: Files, chance: random.Random) -> Files:
    """A copy with one to three kinds of damage, in files of its own choice."""
    out = dict(files)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        name = chance.choice(sorted(out))
        how = _BYTES if chance.random() < 0.15 else _BY_KIND.get(_kind(name, out[name]), _BYTES)
        try:
            out[name] = chance.choice(how)(out[name], chance)
        except (ValueError, struct.error, LookupError, RecursionError, AttributeError, TypeError, OverflowError):
            out[name] = chance.choice(_BYTES)(out[name], chance)  # damaged beyond its structure already
    if chance.random() < 0.02 and len(out) > 1:
        del out[chance.choice(sorted(out))]
    return out


def _kind(name: str, data: bytes) -> str:
    """What a file is, by its first bytes; a safetensors file only has its name."""
    return "gguf" if data[:4] == b"GGUF" else "json" if data[:1] in (b"{", b"[") else Path(name).suffix.lstrip(".")


# -- bytes ------------------------------------------------------------------------------------------------------------


def flip(data: bytes, chance: random.Random) -> bytes:
    raw = bytearray(data)
    head = max(1, min(len(raw), 4096))
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        if raw:
            at = chance.randrange(head if chance.random() < 0.8 else len(raw))
            raw[at] = chance.choice(
                (0, 1, 0x7F, 0x80, 0xFF, raw[at] ^ (1 << chance.randrange(8)), chance.randrange(256))
            )
    return bytes(raw)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.choice((0, 1, 7, 8, chance.randrange(len(data) + 1), max(0, len(data) - 1)))]


def insert(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(min(len(data), 4096) + 1)
    return data[:at] + chance.choice((b"\0", b"\xff" * 8, b"\xc3\x28", bytes(64), data[:at])) + data[at:]


def word(data: bytes, chance: random.Random) -> bytes:
    """Four or eight bytes of the first kilobytes replaced by a telling number."""
    raw, form = bytearray(data), chance.choice(("<I", "<Q"))
    size = struct.calcsize(form)
    if len(raw) >= size:
        at = chance.randrange(min(len(raw) - size, 4096) + 1)
        raw[at : at + size] = struct.pack(form, chance.choice(INTEGERS) & ((1 << 8 * size) - 1))
    return bytes(raw)


def grow(data: bytes, chance: random.Random) -> bytes:
    return data + chance.choice((b"\0", b" ", bytes(4096), data[:100]))


# -- JSON -------------------------------------------------------------------------------------------------------------


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:400]:
        found += _places(item, (*path, key))
    return found


def _parent(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def change_json(value: Any, chance: random.Random) -> Any:
    """One place of a JSON value: another value, gone, nested, or under another key."""
    places = _places(value)
    if not places or chance.random() < 0.02:
        return chance.choice(VALUES)
    path = chance.choice(places)
    parent, key = _parent(value, path), path[-1]
    kind = chance.random()
    if kind < 0.55:
        parent[key] = chance.choice(VALUES)
    elif kind < 0.65:
        del parent[key]
    elif kind < 0.75 and isinstance(parent[key], int | float):
        old = parent[key]
        parent[key] = chance.choice((-old, old + 1, old * 2, old // 2, old * 10**6, str(old), [old], float(old)))
    elif kind < 0.85:
        parent[key] = [parent[key]] if chance.random() < 0.5 else {"x": parent[key]}
    elif kind < 0.95 and isinstance(parent, dict):
        parent[chance.choice(TEXTS)] = parent.pop(key)
    else:
        parent[key] = json.loads(json.dumps(value))
    return value


def json_value(data: bytes, chance: random.Random) -> bytes:
    value = change_json(json.loads(data), chance)
    return json.dumps(value, ensure_ascii=chance.random() < 0.7).encode(errors="surrogatepass")


def json_text(data: bytes, chance: random.Random) -> bytes:
    """What no serializer writes: deep nesting, huge numbers, a name twice, another encoding."""
    deep = chance.choice((b"[", b'{"a":')) * chance.choice((50, 900, 3000, 100_000))
    long = b"9" * chance.choice((20, 400, 5000))
    middle = data.find(b":") + 1
    return chance.choice(
        (
            data[:middle] + deep,
            deep,
            data[:middle] + long + b"," + data[data.find(b",") + 1 :],
            b"{" + data.strip()[1:-1] + b"," + data.strip()[1:],
            data.decode(errors="replace").encode("utf-16"),
            b"\xef\xbb\xbf" + data,
            data.replace(b'"', b'"\xff', 1),
            data.replace(b"true", b"NaN").replace(b"null", b"Infinity"),
        )
    )


# -- safetensors ------------------------------------------------------------------------------------------------------


def safetensors_header(data: bytes, chance: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    kind, name = chance.random(), chance.choice(names)
    if kind < 0.4:
        header = change_json(header, chance)
    elif kind < 0.6:
        header[name]["shape"] = [chance.choice((0, 1, 2, -1, 1 << 31, 1 << 62, 3)) for _ in range(chance.randrange(5))]
    elif kind < 0.75:
        header[name]["data_offsets"] = [
            chance.choice((*INTEGERS, -1, len(body))),
            chance.choice((*INTEGERS, len(body))),
        ]
    elif kind < 0.85:
        header[name]["dtype"] = chance.choice(
            ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "F32", "", "C64")
        )
    elif kind < 0.95:
        header[chance.choice((*TEXTS, *names))] = header[name] if chance.random() < 0.5 else header.pop(name)
    else:
        return _with_header(json.dumps(header).encode().replace(b":", b":" + b"[" * 100_000, 1), body)
    return _with_header(json.dumps(header).encode(), body)


def safetensors_consistent(data: bytes, chance: random.Random) -> bytes:
    """A tensor of another shape or type, with the offsets of all made to fit: damage that the container hides."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = chance.choice([name for name in header if name != "__metadata__"])
    start, stop = header[name]["data_offsets"]
    raw, kind = body[start:stop], header[name]["dtype"]
    if chance.random() < 0.3:
        kind, size = chance.choice(
            (("F16", 2), ("F64", 8), ("U8", 1), ("I64", 8), ("BOOL", 1), ("F8_E5M2", 1), ("I32", 4))
        )
    else:
        size = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I64": 8, "F64": 8}.get(kind, 1)
    shape = chance.choice(([], [0], [0, 5], [1], [1, 1], [2, 3], [3, 1, 2], header[name]["shape"][::-1], [1 << 40, 0]))
    count = size
    for side in shape:
        count *= side
    new = (raw * (count // max(1, len(raw)) + 1))[:count] if count <= 1 << 20 else b""
    if chance.random() < 0.3:
        new = bytes(chance.choice((0, 0xFF, 0x7F)) for _ in range(len(new)))
    header[name] |= {"dtype": kind, "shape": shape}
    parts = []
    at = 0
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        piece = new if key == name else body[entry["data_offsets"][0] : entry["data_offsets"][1]]
        entry["data_offsets"] = [at, at + len(piece)]
        at += len(piece)
        parts.append(piece)
    return _with_header(json.dumps(header).encode(), b"".join(parts))


def safetensors_length(data: bytes, chance: random.Random) -> bytes:
    return struct.pack("<Q", chance.choice((*INTEGERS, len(data), len(data) - 8))) + data[8:]


def _with_header(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


# -- GGUF -------------------------------------------------------------------------------------------------------------

_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass
class Gguf:
    """A parsed file: `pairs` of (key, type, value; an array's value is (type, list)), `tensors` of [name, dims, type,
    offset], and the bytes after the header. The counts are written as they are here."""

    version: int
    counts: list[int]
    pairs: list[tuple[bytes, int, Any]]
    tensors: list[list[Any]]
    data: bytes

    def to_bytes(self) -> bytes:
        out = [b"GGUF", struct.pack("<IQQ", self.version, *(count % (1 << 64) for count in self.counts))]
        for key, kind, value in self.pairs:
            out += [_text(key), struct.pack("<I", kind), _value(kind, value)]
        for name, dims, kind, offset in self.tensors:
            out += [_text(name), struct.pack("<I", len(dims) % (1 << 32))]
            out += [struct.pack("<Q", dim % (1 << 64)) for dim in dims]
            out.append(struct.pack("<IQ", kind % (1 << 32), offset % (1 << 64)))
        head = b"".join(out)
        return head + bytes(-len(head) % 32) + self.data


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _value(kind: int, value: Any) -> bytes:
    if kind == 8:
        return _text(value)
    if kind == 9:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, item) for item in items)
    return struct.pack(_FORMS[kind], value)


def parse_gguf(data: bytes) -> Gguf:
    """A valid file's structure."""
    at = 4

    def unpack(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return values[0] if len(values) == 1 else list(values)

    def text() -> bytes:
        nonlocal at
        size = unpack("<Q")
        at += size
        return data[at - size : at]

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = unpack("<IQ")
            return inner, [value(inner) for _ in range(count)]
        return unpack(_FORMS[kind])

    version, tensor_count, pair_count = unpack("<IQQ")
    pairs = []
    for _ in range(pair_count):
        key, kind = text(), unpack("<I")
        pairs.append((key, kind, value(kind)))
    tensors = []
    for _ in range(tensor_count):
        name, dims = text(), unpack("<I")
        sizes = [unpack("<Q") for _ in range(dims)]
        tensors.append([name, sizes, *unpack("<IQ")])
    return Gguf(version, [tensor_count, pair_count], pairs, tensors, data[-(-at // 32) * 32 :])


def gguf_metadata(data: bytes, chance: random.Random) -> bytes:
    """A metadata value of another type or size, gone, twice, or under another key."""
    file = parse_gguf(data)
    at = chance.randrange(len(file.pairs))
    key, kind, value = file.pairs[at]
    choice = chance.random()
    if choice < 0.55:
        file.pairs[at] = (key, *_any_value(kind, value, chance))
    elif choice < 0.7:
        del file.pairs[at]
    elif choice < 0.8:
        file.pairs.append((key, kind, value))
    elif choice < 0.9:
        file.pairs[at] = (chance.choice(TEXTS).encode(), kind, value)
    else:
        file.pairs[at] = (chance.choice(file.pairs)[0], kind, value)
    file.counts[1] = len(file.pairs)
    return file.to_bytes()


def _any_value(kind: int, value: Any, chance: random.Random) -> tuple[int, Any]:
    choice = chance.random()
    if kind == 9 and choice < 0.6:
        return 9, _any_array(*value, chance)
    if kind in _FORMS and choice < 0.6:
        return kind, _number(kind, chance)
    other = chance.choice((*_FORMS, 8, 9))
    if other == 8:
        return 8, chance.choice((*(text.encode() for text in TEXTS), b"\xff\xfe", b"\xed\xa0\x80"))
    if other == 9:
        inner = chance.choice((4, 5, 6, 7, 8, 10))
        items = [b"x" if inner == 8 else _number(inner, chance) for _ in range(chance.choice((0, 1, 5)))]
        return 9, (inner, items)
    return other, _number(other, chance)


def _number(kind: int, chance: random.Random) -> Any:
    if kind in (6, 12):
        return chance.choice((0.0, -1.0, 1e-6, 1.0, 1e4, 1e30, float("inf"), float("nan")))
    if kind == 7:
        return chance.random() < 0.5
    bits = {0: 8, 1: 7, 2: 16, 3: 15, 4: 32, 5: 31, 10: 64, 11: 63}[kind]
    small = chance.choice((0, 1, 2, 3, 5, 16, 64, 100))
    return min(chance.choice((small, small, *INTEGERS)), (1 << bits) - 1)


def _any_array(inner: int, items: list[Any], chance: random.Random) -> tuple[int, list[Any]]:
    items = list(items)
    choice = chance.random()
    if choice < 0.25 or not items:
        return inner, items[: chance.randrange(len(items) + 1)]
    if choice < 0.4:
        return inner, items + items[: chance.choice((1, 3, len(items)))]
    if choice < 0.5:
        return 4, [chance.choice(INTEGERS) % (1 << 32) for _ in items]
    for _ in range(chance.choice((1, 3, 20))):
        at = chance.randrange(len(items))
        texts = (*(text.encode() for text in TEXTS), b"\xff", items[chance.randrange(len(items))], b"<0x41>", b"a b c")
        items[at] = chance.choice(texts) if inner == 8 else _number(inner, chance)
    return inner, items


def gguf_tensor(data: bytes, chance: random.Random) -> bytes:
    """A row of the tensor table: name, dimensions, type, offset."""
    file = parse_gguf(data)
    row = chance.choice(file.tensors)
    choice = chance.random()
    if choice < 0.3:
        row[1] = [chance.choice((0, 1, 2, 32, 64, 256, 1 << 31, 1 << 40, 1 << 62)) for _ in range(chance.randrange(6))]
    elif choice < 0.45:
        row[1] = chance.choice((row[1][::-1], [*row[1], 1], row[1][:1], [], [0, *row[1][1:]], [*row[1][:-1], 0]))
    elif choice < 0.65:
        row[2] = chance.choice((*range(42), 255, 1 << 31))
    elif choice < 0.8:
        row[3] = chance.choice((*INTEGERS, len(file.data), chance.choice(file.tensors)[3], row[3] + 1))
    elif choice < 0.95:
        other = chance.choice(file.tensors)[0]
        names = (other, b"blk.99999999999.attn_q.weight", b"blk.-1.attn_q.weight", b"rope_freqs.weight", b"\xff", b"")
        row[0] = chance.choice((*names, *(text.encode() for text in TEXTS)))
    else:
        file.tensors.append(list(row))
        file.counts[0] += 1
    return file.to_bytes()


def gguf_counts(data: bytes, chance: random.Random) -> bytes:
    file = parse_gguf(data)
    choice = chance.random()
    if choice < 0.6:
        file.counts[chance.randrange(2)] = chance.choice(INTEGERS)
    elif choice < 0.8:
        file.version = chance.choice((0, 1, 2, 4, 3 << 24, (1 << 32) - 1))
    else:
        file.data = file.data[: chance.randrange(len(file.data) + 1)]
    return file.to_bytes()


def gguf_numbers(data: bytes, chance: random.Random) -> bytes:
    """Other weights: NaN, infinities, random scales."""
    file = parse_gguf(data)
    raw = bytearray(file.data)
    for _ in range(chance.choice((1, 8, 64))):
        at = chance.randrange(max(1, len(raw) - 8))
        raw[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\x00\x7c\x00\x7c", bytes(4)))
    file.data = bytes(raw)
    return file.to_bytes()


Mutation = Callable[[bytes, random.Random], bytes]
_BYTES: tuple[Mutation, ...] = (flip, flip, cut, insert, word, word, grow)
_BY_KIND: dict[str, tuple[Mutation, ...]] = {
    "json": (json_value, json_value, json_value, json_value, json_text),
    "safetensors": (safetensors_header, safetensors_header, safetensors_consistent, safetensors_length),
    "gguf": (gguf_metadata, gguf_metadata, gguf_tensor, gguf_counts, gguf_numbers),
}
