"""From a source (file, folder, Hub id) to records with their origins.

The format follows from the file's name; nothing is guessed from its content, save that a `.json` file may hold
JSON Lines, which is noted. Errors of a file are UsageErrors, errors of a row are BadRows.
"""

import gzip
import re
import zlib
from pathlib import Path

from halfbyte.data.hub import read_hub
from halfbyte.data.json_files import decode_utf8, read_json, read_jsonl
from halfbyte.data.options import DataSource
from halfbyte.data.records import Origin, RawData, Record
from halfbyte.data.tables import read_csv, read_parquet
from halfbyte.errors import UsageError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_TRAIN_NAMES = ("train", "training")
_EVAL_NAMES = ("validation", "valid", "val", "dev", "eval", "test")


def read_source(source: DataSource, text_split: str = "paragraph", evaluation: bool = False) -> RawData:
    """Read one source. `evaluation` chooses the held-out files of a folder, or split of a Hub data set."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _read_folder(path, source.path, text_split, evaluation)
    if path.is_file():
        return read_file(path, source.path, text_split)
    if _looks_like_hub_id(source.path):
        return read_hub(source.path, source.name, source.split, evaluation)
    raise UsageError(f"{source.path}: no such file or folder, and not a Hub data-set id (owner/name)")


def _looks_like_hub_id(path: str) -> bool:
    named_as_file = data_suffix(Path(path)) is not None
    return not named_as_file and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", path) is not None


def data_suffix(path: Path) -> str | None:
    """The suffix that names the format, `.gz` aside; None if it is none of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def read_file(path: Path, file: str, text_split: str = "paragraph") -> RawData:
    """Read one file; `file` is its name in messages. An empty file is an error."""
    suffix = data_suffix(path)
    if suffix is None:
        raise UsageError(f"{file}: unknown kind of file; known are {', '.join(SUFFIXES)} (and .gz of them)")
    if suffix == ".parquet":
        data = read_parquet(path, file)
    else:
        raw = _read_bytes(path, file)
        if not raw.strip():
            raise UsageError(f"{file}: the file is empty")
        if suffix in (".jsonl", ".ndjson"):
            data = read_jsonl(raw, file)
        elif suffix == ".json":
            data = read_json(raw, file)
        elif suffix == ".txt":
            data = read_text(raw, file, text_split)
        else:
            data = read_csv(raw, file, "," if suffix == ".csv" else "\t")
    if not data.records and not data.bad:
        raise UsageError(f"{file}: the file holds no rows")
    return data


def _read_bytes(path: Path, file: str) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{file}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror or error}") from None


def read_text(raw: bytes, file: str, text_split: str) -> RawData:
    """Plain text: a document is a paragraph (set apart by blank lines), a line, or the whole file."""
    text = decode_utf8(raw, file).replace("\r\n", "\n")
    data = RawData()
    if text_split == "document":
        data.records.append(Record(Origin(file, 1), {"text": text}))
        return data
    block: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            block.append(line)
        if block and (text_split == "line" or not line.strip()):
            first = number if line.strip() else number - len(block)
            data.records.append(Record(Origin(file, first), {"text": "\n".join(block)}))
            block = []
    return data


def _read_folder(folder: Path, name: str, text_split: str, evaluation: bool) -> RawData:
    files = sorted(path for path in folder.iterdir() if path.is_file() and data_suffix(path) is not None)
    if not files:
        raise UsageError(f"{name}: no data file in this folder; known are {', '.join(SUFFIXES)} (and .gz of them)")
    chosen = _choose(files, evaluation, name)
    data = RawData()
    for path in chosen:
        data.extend(read_file(path, str(Path(name) / path.name), text_split))
    if len(files) > 1:
        data.notes.append(f"{name}: read {', '.join(path.name for path in chosen)} of {len(files)} data files")
    return data


def _split_name(path: Path) -> str | None:
    """The split that a file's name begins with: `train`, `train-00000-of-00002`, `test_small`."""
    word = re.split(r"[^a-z]", path.name.lower(), maxsplit=1)[0]
    return word if word in (*_TRAIN_NAMES, *_EVAL_NAMES) else None


def _choose(files: list[Path], evaluation: bool, name: str) -> list[Path]:
    """The training files of a folder (or the held-out ones); all of them where none is named after a split."""
    wanted = [[word] for word in _EVAL_NAMES] if evaluation else [list(_TRAIN_NAMES)]
    for words in wanted:
        if chosen := [path for path in files if _split_name(path) in words]:
            return chosen
    if any(_split_name(path) for path in files):
        kind = "held-out" if evaluation else "training"
        raise UsageError(
            f"{name}: which files are the {kind} rows? None is named "
            f"{'validation, dev or test' if evaluation else 'train'}: name the file itself"
        )
    return files
