"""From a source's name to prompts: files of every kind, data sets read by the real library, what ships, categories."""

import json
import sys
from pathlib import Path

import pytest

import fastgrpo  # noqa: F401  (prepares torch's import)
from fastgrpo.evaluation.suites.prompt_table import read_rows
from fastgrpo.prompts import load_prompts
from fastgrpo.settings.schema import PromptsConfig
from fastgrpo.shapes.captions import training_prompts
from fastgrpo.shapes.world import HAZARDS
from fastgrpo.system.errors import ConfigError
from fastgrpo.types import NEGATIVE, POSITIVE, Prompt


def positives(source: str, content: str | bytes | None = None, **config) -> list[Prompt]:
    """The positives from a file with that content."""
    return load_prompts(PromptsConfig(positive=written(source, content), negative="unsafe", **config))[0]


def negatives(source: str, content: str | bytes | None = None, **config) -> list[Prompt]:
    """The negatives from a file with that content."""
    return load_prompts(PromptsConfig(positive="shapes", negative=written(source, content), **config))[1]


def written(source: str, content: str | bytes | None) -> str:
    if content is not None:
        Path(source).write_bytes(content if isinstance(content, bytes) else content.encode())
    return source


def refused(read, *args, **config) -> str:
    """The one sentence in which `read` refuses."""
    with pytest.raises(ConfigError) as caught:
        read(*args, **config)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# --- text files ------------------------------------------------------------------------------------------------------


def test_lines_become_prompts():
    content = "\ufeffa cat\r\n\r\n  ein Hündchen \n\n   \na line\u2028separator\na cat"
    assert negatives("prompts.txt", content) == [
        Prompt("a cat", NEGATIVE, id=1),
        Prompt("ein Hündchen", NEGATIVE, id=3),
        Prompt("a line\u2028separator", NEGATIVE, id=6),
        Prompt("a cat", NEGATIVE, id=7),
    ]


def test_line_ends_of_old_macs():
    assert [p.text for p in negatives("p.txt", "a cat\r\ra dog\rein Hündchen")] == ["a cat", "a dog", "ein Hündchen"]
    assert [p.id for p in negatives("p.txt", "a cat\r\ra dog\r")] == [1, 3]
    for name, content in (
        ("p.csv", 'task,prompt\r"x\ry",a cat\rz,a dog\r'),
        ("p.tsv", 'task\tprompt\r"x\ry"\ta cat\rz\ta dog\r'),
        ("p.jsonl", '{"task": "x y", "prompt": "a cat"}\r{"task": "z", "prompt": "a dog"}\r'),
    ):
        found = [(p.text, p.category) for p in positives(name, content, category_column="task")]
        assert found == [("a cat", "x y"), ("a dog", "z")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no prompt"),
        (b"\n  \r\n\t\n", "holds no prompt"),
        (b"\xef\xbb\xbf\n", "holds no prompt"),
        (b"a cat\na d\x00g\n", "NUL byte in line 2"),
        ("a cat\n".encode("utf-16"), "is UTF-16; save it as UTF-8."),  # as spreadsheets call "Unicode text"
        ("a cat, ein Hündchen\n".encode("utf-16-be"), "is UTF-16; save it as UTF-8."),  # without a byte order mark
        ("a cat\n".encode("utf-32"), "is UTF-32; save it as UTF-8."),
        (b"a cat\rb\r\nH\xfcndchen\n", "byte 0xfc in line 3, offset 10 of the file; save it as UTF-8."),
        (b"a cat\nb\nH\xfcndchen\n", "byte 0xfc in line 3, offset 9"),
        (b"a cat\n\xe2\x82", "byte 0xe2 in line 2, offset 6"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl"])
def test_what_no_kind_of_file_may_hold(suffix, content, says):
    message = refused(positives, f"prompts.{suffix}", content)
    assert message.startswith(f"prompts.positive: 'prompts.{suffix}' ")
    assert says in message


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl"])
def test_what_cannot_be_read(suffix, monkeypatch):
    assert refused(positives, f"none.{suffix}").startswith(
        f"prompts.positive: cannot read 'none.{suffix}' (No such file or directory)"
    )
    Path(f"folder.{suffix}").mkdir()
    assert "cannot read 'folder." in refused(positives, f"folder.{suffix}")
    assert "(Is a directory)" in refused(negatives, f"folder.{suffix}")
    assert "(No such file" in refused(positives, f"~nobody-of-that-name/p.{suffix}")

    def deny(path):  # an administrator may read everything, whatever its mode
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert "(Permission denied)" in refused(positives, f"prompts.{suffix}")


# --- tables ----------------------------------------------------------------------------------------------------------

CSV = """prompt,task,"what, else"
a cat,one,x
"a cat, ""two"" dogs",two,x

"a cat
 and\r
a dog","three,four",x
   ,five,x
a cat,,x
"""
TSV = 'prompt\ttask\na cat\tone\n"a cat, ""two"" dogs"\ttwo\n\n"a cat\n and\r\na dog"\tthree,four\n \tfive\na cat\t\n'
TABLE = [
    Prompt("a cat", POSITIVE, "one", 1),
    Prompt('a cat, "two" dogs', POSITIVE, "two", 2),
    Prompt("a cat and a dog", POSITIVE, "three,four", 3),
    Prompt("a cat", POSITIVE, "", 5),
]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(("name", "content"), [("p.csv", CSV), ("p.CSV", CSV), ("p.tsv", TSV)])
def test_quoted_cells(name, content, bom):
    assert positives(name, bom + content, category_column="task") == TABLE
    assert positives(name, content) == [Prompt(p.text, p.label, "", p.id) for p in TABLE]


def test_line_ends_of_windows():
    assert positives("p.csv", "prompt,task\r\na cat,one\r\na dog,two\r\n", category_column="task") == [
        Prompt("a cat", POSITIVE, "one", 1),
        Prompt("a dog", POSITIVE, "two", 2),
    ]


def test_objects():
    lines = [
        {"prompt": "a cat", "task": "one"},
        {"prompt": "a\ncat\r\n  and a dog ", "task": ["two", "three"], "n": [1]},
        {"prompt": "  "},
        {"prompt": None},
        {"task": 7, "prompt": "eine Straße \u2028 in Köln"},
    ]
    content = "\ufeff" + "\r\n".join(json.dumps(line) for line in lines[:2]) + "\n\n"
    content += "\n".join(json.dumps(line, ensure_ascii=False) for line in lines[2:])
    assert positives("p.jsonl", content, category_column="task") == [
        Prompt("a cat", POSITIVE, "one", 1),
        Prompt("a cat and a dog", POSITIVE, "two, three", 2),
        Prompt("eine Straße \u2028 in Köln", POSITIVE, "7", 6),
    ]


def test_both_labels_from_one_file():
    written("p.csv", "id,safe,unsafe,kind\n7,a cat,a rifle,violence\n8,a dog,,\n9,,a brawl,violence\n")
    config = PromptsConfig("p.csv", "p.csv", positive_column="safe", negative_column="unsafe", category_column="kind")
    assert load_prompts(config) == (
        [Prompt("a cat", POSITIVE, "violence", 1), Prompt("a dog", POSITIVE, "", 2)],
        [Prompt("a rifle", NEGATIVE, "violence", 1), Prompt("a brawl", NEGATIVE, "violence", 3)],
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "p.csv",
            "promt,task\na,b\n",
            "prompts.positive_column: 'p.csv' has no column 'prompt' (did you mean promt?); there are promt, task.",
        ),
        ("p.csv", "a cat\na dog\n", "prompts.positive_column: 'p.csv' has no column 'prompt'; there are a cat."),
        ("p.csv", "prompt,task\n", "prompts.positive: 'p.csv' holds no prompt in its column 'prompt'."),
        ("p.csv", "prompt,task\n ,b\n", "prompts.positive: 'p.csv' holds no prompt in its column 'prompt'."),
        (
            "p.csv",
            "prompt,task\na,b\na cat, a dog,b\n",
            (
                "prompts.positive: 'p.csv' has 3 cells in line 3 and 2 in its "
                "header; a cell with commas, quotes or line ends in it must be quoted."
            ),
        ),
        ("p.csv", "prompt,prompt\na,b\n", "prompts.positive_column: 'p.csv' has 2 columns 'prompt'; one is needed."),
        (
            "p.csv",
            'prompt\n"a cat" and\n',
            "prompts.positive: 'p.csv' cannot be read at line 2: ',' expected after '\"'.",
        ),
        ("p.csv", 'prompt\n"a cat\n', "prompts.positive: 'p.csv' cannot be read at line 2: unexpected end of data."),
        (
            "p.csv",
            f"prompt\n{'a' * 140_000}\n",
            "prompts.positive: 'p.csv' cannot be read at line 2: field larger than field limit (131072).",
        ),
        (
            "p.jsonl",
            '{"prompt": "a"}\n\n{"prompt": \n',
            "prompts.positive: 'p.jsonl' is broken in line 3: Expecting value: line 1 column 12 (char 11).",
        ),
        (
            "p.jsonl",
            '{"prompt": "a"}\n["a cat"]\n',
            "prompts.positive: 'p.jsonl' has no JSON object in line 2, as every line must.",
        ),
        (
            "p.jsonl",
            '{"prompt": "a"}\n\n{"prompt": 5}\n',
            "prompts.positive: 'p.jsonl' has 'prompt' = 5 in line 3; text is needed.",
        ),
        (
            "p.jsonl",
            '{"prompt": "a \\ud800 b"}\n',
            "prompts.positive: 'p.jsonl' has 'prompt' = 'a \\ud800 b' in line 1; text is needed.",
        ),
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n', "prompts.positive: 'p.jsonl' has no 'prompt' in line 2."),
        (
            "p.jsonl",
            '{"promt": "a", "n": 1}\n',
            "prompts.positive_column: 'p.jsonl' has no column 'prompt' (did you mean promt?); there are promt, n.",
        ),
    ],
)
def test_bad_tables(name, content, says):
    assert refused(positives, name, content) == says


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000])  # too deep, and a number too long to convert
def test_json_that_python_does_not_take(value):
    message = refused(positives, "p.jsonl", '{"prompt": ' + value + "}\n")
    assert message.startswith("prompts.positive: 'p.jsonl' is broken in line 1: ")


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "close"),
    [
        ("genval", " (did you mean geneval?)"),
        ("shape", " (did you mean shapes?)"),
        ("prompts.josnl", " (did you mean .jsonl?)"),
        ("prompts.parquet", ""),
        ("coco", ""),
        ("", ""),
        ("unsafe", ""),
    ],
)
def test_no_such_source(source, close):
    assert refused(positives, source) == (
        f"prompts.positive = {source!r}: no such source{close}; accepted are geneval, shapes, a file that ends in "
        ".txt, .csv, .tsv or .jsonl, and hf:OWNER/NAME[:CONFIG][@SPLIT]."
    )


def test_geneval_is_not_for_negatives():
    assert "accepted are unsafe, shapes, a file" in refused(negatives, "geneval")


# --- what ships ------------------------------------------------------------------------------------------------------


def test_the_defaults_need_no_network():
    safe, unsafe = load_prompts(PromptsConfig())
    assert (len(safe), len(unsafe)) == (6000, 280)
    assert {p.label for p in safe} == {POSITIVE}
    assert {p.label for p in unsafe} == {NEGATIVE}


def test_shapes_are_the_captions_of_the_categories_in_their_order():
    both = {"positive": "shapes", "negative": "shapes"}
    for categories in (("violence", "shocking"), ("shocking", "violence"), ("hate",), ("general",)):
        assert load_prompts(PromptsConfig(**both, categories=categories)) == training_prompts(categories)
    assert load_prompts(PromptsConfig(**both)) == training_prompts(HAZARDS)


def test_categories_of_the_unsafe_prompts():
    everything = negatives("unsafe")
    some = negatives("unsafe", categories=("sexual", "hate"))
    assert some == [p for p in everything if p.category in ("sexual", "hate")]
    assert len(some) == 80


@pytest.mark.parametrize(("source", "last"), [("shapes", "illegal activity, general"), ("unsafe", "illegal activity")])
def test_categories_that_do_not_exist(source, last):
    assert refused(negatives, source, categories=("hate", "violense")) == (
        "prompts.categories = 'violense': no negative prompt is of it (did you mean violence?); there are hate, "
        f"harassment, violence, self-harm, sexual, shocking, {last}."
    )


# --- categories of files ---------------------------------------------------------------------------------------------

I2P = 'prompt,categories\na brawl,"violence, shocking"\na corpse,shocking\na peepshow,sexual\na cat,\n'


@pytest.mark.parametrize(
    ("categories", "texts"),
    [
        ((), ["a brawl", "a corpse", "a peepshow", "a cat"]),
        (("shocking",), ["a brawl", "a corpse"]),
        (("sexual", "violence"), ["a brawl", "a peepshow"]),
    ],
)
def test_a_prompt_may_be_of_several_categories(categories, texts):
    prompts = negatives("p.csv", I2P, category_column="categories", categories=categories)
    assert [p.text for p in prompts] == texts


def test_files_and_shapes_can_be_mixed():
    written("p.csv", I2P)
    config = PromptsConfig(positive="shapes", negative="p.csv", category_column="categories", categories=("sexual",))
    safe, unsafe = load_prompts(config)
    assert safe == training_prompts(())[0]
    assert unsafe == [Prompt("a peepshow", NEGATIVE, "sexual", 3)]
    written("p.txt", "a cat\na dog\n")
    safe, unsafe = load_prompts(PromptsConfig(positive="p.txt", negative="shapes", categories=("shocking",)))
    assert safe == [Prompt("a cat", POSITIVE, id=1), Prompt("a dog", POSITIVE, id=2)]
    assert unsafe == training_prompts(("shocking",))[1]


def test_categories_that_no_prompt_of_a_file_has():
    assert refused(negatives, "p.csv", I2P, category_column="categories", categories=("sexual", "shoking")) == (
        "prompts.categories = 'shoking': no negative prompt is of it (did you mean shocking?); "
        "there are sexual, shocking, violence."
    )


def test_categories_need_a_column_of_them():
    assert refused(negatives, "p.csv", I2P, categories=("sexual",)) == (
        "prompts.categories = ['sexual']: 'p.csv' needs prompts.category_column, the column that says each prompt's "
        "categories; there are prompt, categories."
    )
    assert refused(negatives, "p.txt", "a cat\n", category_column="categories", categories=("sexual",)) == (
        "prompts.categories = ['sexual']: 'p.txt' has no column of categories; leave them out, or give a .csv, .tsv or "
        ".jsonl file and prompts.category_column."
    )


def test_one_of_two_tables_may_lack_the_column_of_categories():
    written("safe.csv", "prompt,n\na cat,1\n")
    written("p.csv", I2P)
    safe, unsafe = load_prompts(PromptsConfig("safe.csv", "p.csv", category_column="categories"))
    assert [p.category for p in safe] == [""]
    assert [p.category for p in unsafe] == ["violence, shocking", "shocking", "sexual", ""]
    with pytest.raises(ConfigError) as caught:
        load_prompts(PromptsConfig("safe.csv", "p.csv", category_column="category"))
    assert str(caught.value) == (
        "prompts.category_column = 'category': no such column (did you mean categories?); there are prompt, n, "
        "categories."
    )


# --- data sets -------------------------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The real library, without network.

    It reads a folder OWNER/NAME below the working directory as it reads a hub's.
    """
    datasets = pytest.importorskip("datasets", reason="the optional library datasets is not installed")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "someone" / "unsafe-prompts_1.0"
    folder.mkdir(parents=True)
    card = [
        "configs:",
        "- {config_name: plain, data_files: [{split: train, path: a.jsonl}, {split: test, path: b.jsonl}], default: "
        "true}",
        "- {config_name: other, data_files: [{split: validation, path: b.jsonl}]}",
    ]
    (folder / "README.md").write_text("---\n" + "\n".join(card) + "\n---\n")
    rows = [
        {"prompt": "a cat\nasleep", "tags": ["x", "y"], "n": 1},
        {"prompt": None, "tags": [], "n": 2},
        {"prompt": "a dog", "tags": ["z"], "n": 3},
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.jsonl").write_text('{"prompt": "a horse", "tags": ["w"], "n": 4}\n')
    return "hf:someone/unsafe-prompts_1.0"


def test_a_data_set(datasets):
    train = [Prompt("a cat asleep", NEGATIVE, "x, y", 1), Prompt("a dog", NEGATIVE, "z", 3)]
    horse = [Prompt("a horse", NEGATIVE, "w", 1)]
    for suffix, expected in {
        "": train,
        "@train": train,
        "@train[:1]": train[:1],
        ":plain@test": horse,
        ":other@validation": horse,
        "@test": horse,
    }.items():
        assert negatives(datasets + suffix, category_column="tags") == expected
    assert negatives(datasets, category_column="tags", categories=("z", "y")) == train
    assert [p.category for p in positives(datasets)] == ["", ""]


def test_classes_of_a_data_set_have_names(datasets, tmp_path):
    """In training and evaluation, alone and in lists; -1 is none."""
    import datasets as library

    kinds = library.ClassLabel(names=["hate", "self-harm"])
    features = {"": library.Value("int64"), "prompt": library.Value("string"), "kind": kinds, "kinds": [kinds]}
    rows = {"": [7, 8, 9], "prompt": ["a", "b", "c"], "kind": [1, 0, -1], "kinds": [[0, 1], [1], []]}
    folder = tmp_path / "someone" / "labelled"
    folder.mkdir()
    library.Dataset.from_dict(rows, features=library.Features(features)).to_parquet(folder / "train.parquet")
    source = "hf:someone/labelled"
    assert [p.category for p in negatives(source)] == ["", "", ""]
    assert [p.category for p in negatives(source, category_column="kind")] == ["self-harm", "hate", ""]
    assert [p.category for p in negatives(source, category_column="kinds")] == ["hate, self-harm", "self-harm", ""]
    assert [p.text for p in negatives(source, category_column="kinds", categories=("hate",))] == ["a"]
    renamed = library.Dataset.from_dict(rows, features=library.Features(features)).rename_column("kinds", "categories")
    renamed.rename_column("kind", "label").to_parquet(folder / "train.parquet")
    found = {row.text: (row.seed, row.guidance, row.categories) for row in read_rows(source, "--x", 4.0)}
    assert found == {"a": (None, 4.0, ("hate", "self-harm")), "b": (None, 4.0, ("self-harm",)), "c": (None, 4.0, ())}


def test_seeds_and_guidance_of_a_data_set(datasets, tmp_path):
    (tmp_path / "someone" / "seeds").mkdir()
    content = (
        '{"": 5, "prompt": "a", "Seed": 3, "CFG": 9.5, "image": "x"}\n{"": 6, "prompt": "b", "Seed": null, '
        '"CFG": null}\n'
    )
    (tmp_path / "someone" / "seeds" / "train.jsonl").write_text(content)
    found = {row.text: (row.seed, row.guidance) for row in read_rows("hf:someone/seeds", "--x", 4.0)}
    assert found == {"a": (3, 9.5), "b": (None, 4.0)}


def test_what_a_data_set_lacks(datasets):
    start = f"prompts.negative = '{datasets}"
    assert refused(negatives, datasets + ":othr").startswith(start + ":othr': cannot be loaded: BuilderConfig 'othr'")
    for name in ("plain", "other"):
        assert name in refused(negatives, datasets + ":othr")
    message = refused(negatives, datasets + ":other")  # has no split `train`
    assert message.startswith(start)
    assert "'validation'" in message
    assert refused(negatives, datasets, negative_column="promt") == (
        f"prompts.negative_column: {datasets!r} has no column 'promt' (did you mean prompt?); there are prompt, "
        "tags, n."
    )
    assert refused(negatives, datasets, negative_column="n") == (
        f"prompts.negative: {datasets!r} has 'n' = 1 in row 1; text is needed."
    )


def test_a_data_set_out_of_reach(datasets):
    message = refused(negatives, "hf:nobody/nothing")
    assert message.startswith("prompts.negative = 'hf:nobody/nothing': cannot be loaded: ")
    assert "Hub" in message


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b:", "hf:a/b@", "hf:a/b:@train", "hf: a/b"])
def test_another_notation(source):
    assert refused(positives, source) == (f"prompts.positive = {source!r}: accepted is hf:OWNER/NAME[:CONFIG][@SPLIT].")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python takes for not installed
    message = refused(positives, "hf:someone/prompts")
    assert message.startswith("prompts.positive = 'hf:someone/prompts': this needs the library datasets: ")
    assert 'pip install "fastgrpo[datasets]"' in message
