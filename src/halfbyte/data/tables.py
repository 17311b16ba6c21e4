"""CSV, TSV and Parquet: rows that are named columns."""

import csv
import io
import sys
from pathlib import Path

from halfbyte.data.json_files import decode_utf8
from halfbyte.data.records import BadRow, Origin, RawData, Record
from halfbyte.errors import UsageError


def read_csv(raw: bytes, file: str, delimiter: str) -> RawData:
    """A header and records (RFC 4180, newlines allowed inside quotes). A row's line is the one it begins on."""
    text = decode_utf8(raw, file)
    previous_limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 kB; it is process-wide
    try:
        return _read_csv(text, file, delimiter)
    finally:
        csv.field_size_limit(previous_limit)


def _read_csv(text: str, file: str, delimiter: str) -> RawData:
    data = RawData()
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            line, begins = reader.line_num + 1, line
            if not fields:
                continue
            if header is None:
                header = _header(fields, file)
            elif len(fields) != len(header):
                reason = f"{_count(fields, 'field')} where the header has {len(header)}"
                data.bad.append(BadRow(file, begins, reason))
            else:
                data.records.append(Record(Origin(file, begins), dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        hint = " (a quote is never closed)" if "unexpected end" in str(error) else ""
        raise UsageError(f"{file}:{line}: not valid CSV: {error}{hint}") from None
    if header is None:
        raise UsageError(f"{file}: the file is empty")
    return data


def _header(fields: list[str], file: str) -> list[str]:
    header = [name.strip() for name in fields]
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise UsageError(f"{file}:1: the column {sorted(twice)[0]!r} is named twice in the header")
    return header


def _count(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def read_parquet(path: Path, file: str) -> RawData:
    """Every row of a Parquet file; a row's line is its number, counted from 1."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{file}: reading Parquet needs pyarrow: pip install 'halfbyte[data]'") from None
    data = RawData()
    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches():
                first = len(data.records) + 1
                data.records += [
                    Record(Origin(file, first + index), values) for index, values in enumerate(batch.to_pylist())
                ]
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"{file}: not a whole Parquet file ({reason})") from None
    return data
