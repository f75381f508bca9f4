"""Seeded mutations of small valid files. Each function takes bytes and a generator, and returns bytes."""

import copy
import json
import pickle
import re

import numpy as np
import yaml

# Values as they are written in JSON. Each has brought down a reader at some time.
_JSON_VALUES = [
    "1e308",
    "-1e308",
    "1e309",
    "1e9",
    "-1e9",
    "1e7",
    "1e19",
    "1" + "0" * 400,
    "-1" + "0" * 400,
    "1" + "0" * 5000,
    "NaN",
    "Infinity",
    "-Infinity",
    "-1",
    "0",
    "-0.0",
    "0.5",
    "1e-320",
    "2147483648",
    "4294967296",
    "9223372036854775808",
    "99999999999",
    "null",
    "true",
    "false",
    "{}",
    "[]",
    "[[]]",
    "[null]",
    '[{"a": [1]}]',
    '""',
    '"1"',
    '"\\u0000"',
    '"a\\u0000.jpg"',
    '"\\ud800"',
    '"a\\udcff.jpg"',
    '"\\n\\r\\u2028"',
    '"../../etc/passwd"',
    '"/dev/full"',
    '"C:\\\\a.jpg"',
    '"%s%n{0}{x}"',
    '"' + "x" * 5000 + '"',
    "[" * 100 + "]" * 100,
    "[" * 100000 + "]" * 100000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[" + "1e308," * 8 + "1e308]",
    "[" + "0," * 2000 + "0]",
    "[1e9, 1e9, -1e9, 1e9, 1e9, -1e9]",
    "[1e308, -1e308, 1e308, 1e308]",
    '{"size": [30, 40], "counts": "~~~~"}',
    '{"size": [1000000, 1000000], "counts": [1000000000000]}',
    '{"size": [30, 40], "counts": [-5, 1205]}',
    '{"size": [30, 40], "counts": "PPPPPPPPPPPPPPPP"}',
]
# The same for text in XML, CSV and label lines.
_TEXT_VALUES = [
    *(v for v in _JSON_VALUES if re.fullmatch(r"[-+\w.]+", v)),
    *("", " ", "nan", "inf", "-inf", "1e400", "0x10", "1_000", "٣", "\x00", "\ud800", "é", "\t", "a;b,c:d"),
    *(
        "../../etc/passwd",
        "/dev/full",
        "C:\\a.jpg",
        "<a>",
        "&amp;&lt;",
        '"',
        "'",
        "#",
        "@",
        "?",
        "%",
        "x" * 5000,
    ),
    "1e9,1e9;-1e9,1e9;1e9,-1e9",
    "1, " * 2000 + "1",
]
_YAML_VALUES = [
    *(v for v in _JSON_VALUES if len(v) < 6000),
    *(
        "&a [*a]",
        "*undefined",
        "!!python/object/apply:os.system [id]",
        "!!binary aGk=",
        "!unknown x",
        "&b {x: *b}",
    ),
    *(
        "{[1]: 2}",
        "{1: 2, 1: 3}",
        "? ",
        "- a: b: c",
        "2024-01-01",
        "0o17",
        "1:30:00",
        "yes",
        "~",
        ".nan",
        ".inf",
    ),
    "[" * 300 + "]" * 300,
    "&a [x,x,x,x,x,x,x,x,x]",
    "[&a [x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b], "
    "&d [*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d], &f [*e,*e,*e,*e,*e,*e,*e,*e,*e], "
    "&g [*f,*f,*f,*f,*f,*f,*f,*f,*f], &h [*g,*g,*g,*g,*g,*g,*g,*g,*g], [*h,*h,*h,*h,*h,*h,*h,*h,*h]]",
]
_MARK = "@@hostile@@"


def mutate_bytes(data, rng):
    """Flip, cut, insert, repeat, move or overwrite bytes, one to four times."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        size = max(len(data), 1)
        a, b = sorted((rng.randrange(size), rng.randrange(size)))
        b = min(b, a + rng.choice([1, 4, 32, size]))
        kind = rng.randrange(7)
        if kind == 0 and data:
            data = data[:a] + bytes([data[a] ^ 1 << rng.randrange(8)]) + data[a + 1 :]
        elif kind == 1:
            data = data[:a]
        elif kind == 2:
            data = data[:a] + data[b:]
        elif kind == 3:
            data = data[:a] + rng.randbytes(rng.choice([1, 2, 8])) + data[a:]
        elif kind == 4:
            data = data[:b] + data[a:b] * rng.choice([1, 3]) + data[b:]
        elif kind == 5:
            data = data[b:] + data[a:b] + data[:a]
        else:
            data = data[:a] + rng.choice([b"\x00", b"\xff", b"\xff\xff\xff\xff"]) * (b - a) + data[b:]
    return data


def _containers(value):
    """Return all lists and dicts in a value that are not empty."""
    found, todo = [], [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict | list) and item:
            found.append(item)
            todo += item.values() if isinstance(item, dict) else item
    return found


def _mutate_tree(value, rng):
    """Change one place of a tree of lists and dicts, where `_MARK` stands for a hostile value."""
    containers = _containers(value)
    if not containers:
        return value
    container = rng.choice(containers)
    key = rng.choice([*container]) if isinstance(container, dict) else rng.randrange(len(container))
    kind = rng.randrange(12)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, list):
        container.append(container[key])
    elif kind == 2:  # a value of another place
        container[key] = json.loads(json.dumps(rng.choice(_containers(value))))
    elif kind == 3 and isinstance(container, dict):
        container[_MARK] = container.pop(key)
    else:
        container[key] = _MARK
    return value


def mutate_json(data, rng):
    """Replace, drop, repeat or rename values; sometimes change bytes instead."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2])):
        value = _mutate_tree(value, rng)
    text = json.dumps(value)
    while f'"{_MARK}"' in text:
        text = text.replace(f'"{_MARK}"', rng.choice(_JSON_VALUES), 1)
    return text.encode("utf-8", "surrogatepass")


def mutate_yaml(data, rng):
    """As `mutate_json`, with anchors, aliases and tags."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    text = yaml.safe_dump(_mutate_tree(yaml.safe_load(data), rng), default_flow_style=rng.random() < 0.5)
    text = re.sub(f"'?{_MARK}'?", lambda _: rng.choice(_YAML_VALUES), text)
    return text.encode("utf-8", "surrogatepass")


def mutate_xml(data, rng):
    """Replace an attribute or a text, drop or repeat or nest a tag; sometimes change bytes instead."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    text = data.decode()
    places = [*re.finditer(r'(?<==")[^"]*(?=")|(?<=>)[^<>]+(?=<)', text)]
    place = rng.choice(places)
    kind = rng.randrange(20)
    if kind == 0:
        tag = rng.choice([*re.finditer(r"<[^<>]+>", text)])
        text = text[: tag.start()] + text[tag.end() :]
    elif kind == 1:
        element = rng.choice([*re.finditer(r"<(\w+)[^<>]*>[^<>]*</\1>", text)])
        text = text[: element.start()] + element[0] * rng.choice([0, 2, 50]) + text[element.end() :]
    elif kind == 2:
        depth = rng.choice([50, 20000])
        text = text[: place.start()] + "<a>" * depth + "</a>" * depth + text[place.end() :]
    elif kind == 3:
        entities = '<!ENTITY a "aaaaaaaaaa">' + "".join(
            f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij")
        )
        rest = text[: place.start()] + "&j;" + text[place.end() :]
        text = f"<!DOCTYPE x [{entities}]>" + re.sub(r"<\?[^>]*\?>", "", rest)
    else:
        text = text[: place.start()] + rng.choice(_TEXT_VALUES) + text[place.end() :]
    return text.encode("utf-8", "surrogatepass")


def mutate_text(data, rng):
    """Replace, drop or repeat a word or a line; sometimes change bytes instead."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    text = data.decode()
    word = rng.choice([*re.finditer(r"[^\s,;]+", text)])
    kind = rng.randrange(10)
    if kind < 2:
        lines = text.splitlines(keepends=True)
        index = rng.randrange(len(lines))
        lines[index] *= rng.choice([0, 2, 500])
        text = "".join(lines)
    elif kind == 2:
        text = text[: word.start()] + text[word.end() :]
    else:
        text = text[: word.start()] + rng.choice(_TEXT_VALUES) + text[word.end() :]
    return text.encode("utf-8", "surrogatepass")


def mutate_yaml_text(data, rng):
    """As `mutate_yaml`, for YAML with tags and comments: replace a scalar where it is written."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    text = data.decode()
    word = rng.choice([*re.finditer(r"(?<=: )[^\s{\[][^,}\]\n]*|(?<=[\[{,] )[^,:}\]\n]+|\w+(?=:)", text)])
    text = text[: word.start()] + rng.choice(_YAML_VALUES) + text[word.end() :]
    return text.encode("utf-8", "surrogatepass")


_OBJECTS = [
    *(None, True, -1, 0, 10**400, 2**63, 1e308, float("nan"), 1j, "", "1", "\ud800", b"\xff"),
    *([], {}, (), [[]], [1], {"a": 1}, np.zeros(0), np.zeros((3, 5)), np.array(3), np.array(["x", "y"])),
    *(np.full((1, 4), np.nan), np.full((3, 4), 1e308), np.full((1, 4), 2**62), np.zeros((2, 3, 4))),
    *(np.zeros((3, 4), dtype=complex), np.int64(-1), np.float32("inf")),
]


def mutate_pickle(data, rng):
    """Unpickle, replace or drop a value, and pickle again; sometimes change bytes instead."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    value = pickle.loads(data)
    for _ in range(rng.choice([1, 1, 2])):
        container = rng.choice(_containers(value))
        key = rng.choice([*container]) if isinstance(container, dict) else rng.randrange(len(container))
        kind = rng.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(["", 1, None, ("a",), "a" * 999])] = container.pop(key)
        else:
            container[key] = copy.deepcopy(rng.choice(_OBJECTS))
        if not value:
            break
    return pickle.dumps(value, protocol=rng.choice([0, 2, 4]))


def mutate_safetensors(data, rng):
    """Change a value of the JSON header; sometimes change bytes instead."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    size = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
