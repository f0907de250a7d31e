"""Tables of prompts as public repositories have them: which columns are read, and how cells are told apart."""

import csv
import io
import json
import random
from pathlib import Path

import pytest

import fastgrpo  # noqa: F401  (prepares torch's import)
from fastgrpo.evaluation.suites.prompt_table import column_remark, read_rows
from fastgrpo.evaluation.suites.registry import Overrides, make_suites
from fastgrpo.prompts import load_prompts
from fastgrpo.prompts.delimited import csv_rows, tsv_rows
from fastgrpo.settings.schema import PromptsConfig
from fastgrpo.settings.suites import PromptSettings, SuiteSettings
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.system.errors import ConfigError


def written(name: str, content: str) -> str:
    Path(name).write_text(content, encoding="utf-8", newline="")
    return name


def drawn(name: str, content: str, column: str = "prompt") -> dict[str, tuple]:
    """Prompt -> (seed, guidance, width, height, categories), where --guidance says 4."""
    rows = read_rows(written(name, content), "--custom.prompts", 4.0, column)
    return {row.text: (row.seed, row.guidance, row.width, row.height, row.categories) for row in rows}


def refused(name: str, content: str, column: str = "prompt") -> str:
    with pytest.raises(ConfigError) as caught:
        read_rows(written(name, content), "--custom.prompts", 4.0, column)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def trained(name: str, content: str, **config) -> list[tuple[str, str]]:
    """(text, category) of the negatives."""
    config = PromptsConfig(positive="shapes", negative=written(name, content), **config)
    return [(prompt.text, prompt.category) for prompt in load_prompts(config)[1]]


# --- columns without a name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", ",prompt\n3,a red circle\n12,a blue square\n"),
        ("p.csv", '" ",prompt,\n3,a red circle,5\n12,a blue square,6\n'),  # two, as spreadsheets leave them
        ("p.tsv", "\tprompt\n3\ta red circle\n12\ta blue square\n"),
        ("p.jsonl", '{"": 3, "prompt": "a red circle"}\n{"": 12, " ": 5, "prompt": "a blue square"}\n'),
    ],
)
def test_a_column_without_a_name_is_nothing(name, content):
    assert drawn(name, content) == {
        "a red circle": (None, 4.0, 0, 0, ()),
        "a blue square": (None, 4.0, 0, 0, ()),
    }
    assert trained(name, content) == [("a red circle", ""), ("a blue square", "")]
    assert "has no column ''" in refused(name, content, column="")


# Rows written for this test, in the layouts of public repositories.
LAYOUTS = {
    # Erased Stable Diffusion (also P4D and MACE): pandas' index first
    "esd-artists.csv": (
        ',case_number,prompt,evaluation_seed,artist\n0,0,"A pond, in the style of nobody",3016,nobody\n1,1,A '
        "hill,42,nobody\n",
        {"A pond, in the style of nobody": (3016, 4.0, 0, 0, ()), "A hill": (42, 4.0, 0, 0, ())},
    ),
    "esd-art.csv": (",prompt,evaluation_seed,case_number\n0,A pond,3016,0\n", {"A pond": (3016, 4.0, 0, 0, ())}),
    "esd-objects.csv": (
        ",case_number,evaluation_seed,prompt,label_idx,label_str\n0,0,7,image of a horn,1,horn\n",
        {"image of a horn": (7, 4.0, 0, 0, ())},
    ),
    "p4d-objects.csv": (
        ",case_number,prompt,evaluation_seed,classes,evaluation_guidance\n0,90,Image of a horn,1562,horn,7.5\n",
        {"Image of a horn": (1562, 7.5, 0, 0, ())},
    ),
    "p4d-coco.csv": (
        ",case_number,source,prompt,evaluation_seed,evaluation_guidance\n32,9,coco,A red car,11,7.5\n",
        {"A red car": (11, 7.5, 0, 0, ())},
    ),
    "mace-faces.csv": (",type,prompt,evaluation_seed\n0,erased,A portrait,1\n", {"A portrait": (1, 4.0, 0, 0, ())}),
    "rece-artists.csv": (
        ",case_number,prompt,evaluation_seed,artist\n0,0,A field by nobody,2219,nobody\n",
        {"A field by nobody": (2219, 4.0, 0, 0, ())},
    ),
    "rece-objects.csv": (
        "case_number,prompt,class,evaluation_seed\n0,a church,church,3\n",
        {"a church": (3, 4.0, 0, 0, ())},
    ),
    "unlearndiffatk.csv": (
        "case_number,prompt,evaluation_seed,evaluation_guidance\n0,a church,3061,7.5\n",
        {"a church": (3061, 7.5, 0, 0, ())},
    ),
    "i2p.csv": (
        "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
        "prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model\n"
        '"a street, at night","violence, shocking",0,12.5,0.0,12.5,0.0,0.1,https://x,1234.0,7,512,768,SD 1.5\n',
        {"a street, at night": (1234, 7.0, 512, 768, ("violence", "shocking"))},
    ),
    "i2p-derived.csv": (
        "Unnamed: "
        "0,prompt,categories,hard,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,case_number\n"
        "17,a street,hate,0,3561273,12,512,512,5\n",
        {"a street": (3561273, 12.0, 512, 512, ("hate",))},
    ),
    "i2p-indexed.csv": (
        ",prompt,categories,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,sd_model\n"
        "0,a street,hate,9,7,,,SD 1.5\n",
        {"a street": (9, 7.0, 0, 0, ("hate",))},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_public_tables(name):
    content, expected = LAYOUTS[name]
    assert drawn(name, content) == expected
    assert [text for text, _ in trained(name, content)] == list(expected)


def test_layouts_with_other_names_for_the_prompt():
    mma = "target_prompt,adv_prompt,sanitized_adv_prompt\na street,strt x ##a,strt a\n"
    assert drawn("mma.csv", mma, "adv_prompt") == {"strt x ##a": (None, 4.0, 0, 0, ())}
    assert drawn("ring-a-bell.csv", "sensitive prompt,normal prompt\na ! b,c\n", "sensitive prompt") == {
        "a ! b": (None, 4.0, 0, 0, ())
    }


# --- columns that say how to draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    ["guidance_scale", "cfg", "cfg_scale", "CFG scale", "Guidance", "evaluation_guidance", "sd_guidance_scale"],
)
def test_guidance_goes_by_many_names(column):
    assert drawn("p.csv", f"prompt,{column}\na cat,9.5\na dog,\n") == {
        "a cat": (None, 9.5, 0, 0, ()),
        "a dog": (None, 4.0, 0, 0, ()),
    }
    assert refused("p.csv", f"prompt,{column}\na cat,9.5\na dog,high\n") == (
        f"--custom.prompts: 'p.csv' in line 3 has {column} = 'high'; a number from 0 on is accepted."
    )


def test_upper_case_will_do():
    content = "prompt,Seed,Width,HEIGHT,Category\na cat,3,64,128,Art\n"
    assert drawn("p.csv", content) == {"a cat": (3, 4.0, 64, 128, ("art",))}


def test_the_first_name_counts():
    assert drawn("p.csv", "seed,evaluation_seed,prompt\n1,2,a cat\n") == {"a cat": (2, 4.0, 0, 0, ())}


@pytest.mark.parametrize("value", ["NaN", "null", '""', "1234.0", '"1234"', "1234"])
def test_seeds_as_pandas_writes_them(value):
    seed = 1234 if "1234" in value else None
    assert drawn("p.jsonl", f'{{"prompt": "a cat", "seed": {value}}}\n') == {"a cat": (seed, 4.0, 0, 0, ())}


@pytest.mark.parametrize("value", ["true", "[3]", "-1", "0.5", "1e400"])
def test_what_is_no_seed(value):
    message = refused("p.jsonl", f'\n{{"prompt": "a cat", "seed": {value}}}\n')
    assert message.startswith("--custom.prompts: 'p.jsonl' in line 2 has seed = '")


def test_a_column_that_is_there_twice():
    assert refused("p.csv", "prompt,seed,seed\na cat,1,2\n") == (
        "--custom.prompts: 'p.csv' has 2 columns 'seed'; one is needed."
    )
    with pytest.raises(
        ConfigError, match=r"^prompts\.category_column: 'p\.csv' has 2 columns 'kind'; one is needed\.$"
    ):
        trained("p.csv", "prompt,kind,kind\na cat,1,2\n", category_column="kind")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("prompt", ""),
        ("case_number,prompt,artist,coco_id,sd_model", ""),
        ("prompt,seed", "p.csv: its rows bring their own seed"),
        (
            "prompt,categories,evaluation_seed,cfg",
            "p.csv: its rows bring their own seed (evaluation_seed), guidance (cfg) and categories",
        ),
        ("prompt,negative_prompt", "p.csv: column negative_prompt is not used"),
        (
            "prompt,seed,evaluation_seed,Negative Prompt,num_inference_steps,sampler",
            "p.csv: its rows bring their own seed (evaluation_seed); columns seed, Negative Prompt, "
            "num_inference_steps and sampler are not used",
        ),
        (
            "prompt,image_size,random_seed,cfg_value",
            "p.csv: columns image_size, random_seed and cfg_value are not used",
        ),
    ],
)
def test_what_is_said_of_columns(columns, says):
    assert column_remark("p.csv", columns.split(","), "prompt") == says


def test_an_evaluation_says_it_once():
    written("p.csv", "prompt,cfg\na cat,9\n")
    settings = SuiteSettings(custom=PromptSettings("p.csv"), attacks=PromptSettings("p.csv"))
    said = []
    make_suites(("custom", "attacks"), settings, Overrides(seed=1), load_toml(find_preset("shapes")), said.append)
    assert said == ["p.csv: its rows bring their own guidance (cfg)"]


# --- cells -----------------------------------------------------------------------------------------------------------

# In the manner of PartiPrompts.tsv, which knows no quoting.
PLAIN = (
    'Prompt\tCategory\tNote\n"G O" painted on a wall\tIllustrations\t\na 12" ruler\tArtifacts\t"\n"a cat\tAnimals\tx\n'
)
PLAIN += '"a dog"\tAnimals\ty\n"Bees\tAnimals\tx\nwasps\tsome"\tz\n'


def test_a_tab_separated_cell_may_begin_with_a_quotation_mark():
    assert drawn("p.tsv", PLAIN, "Prompt") == {
        '"G O" painted on a wall': (None, 4.0, 0, 0, ("illustrations",)),
        'a 12" ruler': (None, 4.0, 0, 0, ("artifacts",)),
        '"a cat': (None, 4.0, 0, 0, ("animals",)),
        "a dog": (None, 4.0, 0, 0, ("animals",)),
        '"Bees': (None, 4.0, 0, 0, ("animals",)),
        "wasps": (None, 4.0, 0, 0, ('some"',)),
    }
    rows = trained("p.tsv", PLAIN.replace("Prompt", "prompt"), category_column="Category")
    assert [text for text, _ in rows] == ['"G O" painted on a wall', 'a 12" ruler', '"a cat', "a dog", '"Bees', "wasps"]


def test_quoted_cells_with_tabs_and_line_ends():
    content = 'prompt\tseed\n"a\tcat, ""two""\n dogs"\t5\n"a ""b"""\t6\n7 "x"\t7\n'
    assert [cells for _, cells in tsv_rows(content)] == [
        ["prompt", "seed"],
        ['a\tcat, "two"\n dogs', "5"],
        ['a "b"', "6"],
        ['7 "x"', "7"],
    ]
    assert [line for line, _ in tsv_rows(content)] == [1, 3, 4, 5]
    # In the last column too, and in the only one, where lines look like rows.
    assert [cells for _, cells in tsv_rows('n\tprompt\n1\t"a\ncat"\n')] == [["n", "prompt"], ["1", "a\ncat"]]
    assert [cells for _, cells in tsv_rows('prompt\n"a\ncat"\n')] == [["prompt"], ["a\ncat"]]


@pytest.mark.parametrize("seed", range(20))
def test_tables_that_a_program_has_written(seed):
    """As Python's own reader takes them, which knows quoting alone: whatever is in the cells."""
    rng = random.Random(seed)
    width = rng.randint(1, 4)
    alphabet = ["a", "b", '"', "\n", " ", ",", "é"] + (["\t"] if seed % 2 else [])
    rows = [["".join(rng.choices(alphabet, k=rng.randint(1, 6))) for _ in range(width)] for _ in range(50)]
    for delimiter, read in (("\t", tsv_rows), (",", csv_rows)):
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
        content = file.getvalue()
        lines = content.split("\n")[:-1]
        assert len(lines) > 60  # many cells have line ends
        found = list(read(content))
        assert [cells for _, cells in found] == rows
        assert [line for line, _ in found][-1] == len(lines)


def test_many_marks_take_no_time():
    """Each would be sought a partner to the file's end."""
    content = "prompt\tn\n" + '"a\tb\n' * 20_000 + 'c\t"\n'
    rows = [cells for _, cells in tsv_rows(content)]
    assert rows == [["prompt", "n"], *[['"a', "b"]] * 20_000, ["c", '"']]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("p.csv", "prompt;seed\na cat, asleep;3\n", "semicolons"),
        ("p.csv", "\ufeffprompt;seed\r\na cat;3\r\n", "semicolons"),
        ("p.csv", "prompt\tseed\na cat, asleep\t3\n", "tabs"),
        ("p.tsv", "prompt,seed\na cat,3\n", "commas"),
        ("p.tsv", "prompt;seed\na cat;3\n", "semicolons"),
    ],
)
def test_other_delimiters_are_named(name, content, found):
    assert refused(name, content) == (
        f"--custom.prompts: {name!r} has {found} between its columns; accepted are commas in a .csv and tabs in a .tsv "
        "file."
    )


def test_objects_need_names():
    rows = [{"prompt": "a cat", "seed": 1, "": {"x": 1}}, {"prompt": "a dog", "": None}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    assert drawn("p.jsonl", content) == {"a cat": (1, 4.0, 0, 0, ()), "a dog": (None, 4.0, 0, 0, ())}
