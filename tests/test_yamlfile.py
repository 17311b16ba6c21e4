from pathlib import Path

import pytest

from halfbyte.errors import UsageError
from halfbyte.yamlfile import parse_yaml, read_yaml


def values(text: str) -> dict[str, object]:
    return {key: entry.value for key, entry in parse_yaml(text, "c.yaml").items()}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E-5", 2e-5),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("0.05", 0.05),
        ("3", 3),
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("no", "no"),
        ("off", "off"),
        ("2024-07-26", "2024-07-26"),
        ("null", None),
        ("[a, b]", ["a", "b"]),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars_mean_what_people_mean(text: str, value: object) -> None:
    found = values(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_places_are_lines() -> None:
    entries = parse_yaml("# one\na: 1\n\nb:\n  - x\n  - y\nc: 2\n", "c.yaml")
    assert {key: entry.where for key, entry in entries.items()} == {"a": "c.yaml:2", "b": "c.yaml:4", "c": "c.yaml:7"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "c.yaml:3: a was already given at c.yaml:1"),
        ("a: [1, 2\nb: 3\n", "not valid YAML"),
        ("- a\n- b\n", "expected `key: value` lines"),
        ("just words\n", "expected `key: value` lines"),
        ("1: 2\n", "c.yaml:1: the key 1 is not a word"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("a: b: c\n", "c.yaml:1: not valid YAML"),
        ("a: *nothing\n", "c.yaml:1: not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        ("a: !!int x\n", "not valid YAML"),
        ("a: &x [*x]\nb: *x\n", "not valid YAML"),
    ],
)
def test_malformed_files_name_the_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("[", r"\[").replace("(", r"\(")) as caught:
        parse_yaml(text, "c.yaml")
    assert "\n" not in str(caught.value)


def test_empty_file_is_an_empty_config() -> None:
    assert parse_yaml("", "c.yaml") == {}
    assert parse_yaml("# only a comment\n", "c.yaml") == {}


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such config file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UsageError, match="not a text file"):
        read_yaml(tmp_path / "binary.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(UsageError, match="too many"):
        read_yaml(tmp_path / "huge.yaml")
