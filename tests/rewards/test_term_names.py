"""How reward terms are named."""

import subprocess
import sys

import pytest

import fastgrpo  # noqa: F401  (prepares the imports below)
from fastgrpo.rewards.terms import parse_terms
from fastgrpo.system.errors import ConfigError
from support import ROOT
from support.rewards import write_plugin


def test_names_and_weights(tmp_path):
    file = write_plugin(tmp_path, "raise SystemExit('naming a file does not run it')")
    odd = tmp_path / "alpha=3"
    odd.mkdir()
    write_plugin(odd, "")
    terms = parse_terms(
        (
            *("steering", "clip=0.5", "compressibility = -2e-3", f"{file}:one=3", "json:dumps", f"{odd}/mine.py:two"),
            *("safety:safety-checker = 0.5", "oracle"),
        )
    )
    assert [(t.name, t.weight) for t in terms] == [
        ("steering", 1.0),
        ("clip", 0.5),
        ("compressibility", -0.002),
        (f"{file}:one", 3.0),
        ("json:dumps", 1.0),
        (f"{odd}/mine.py:two", 1.0),
        ("safety:safety-checker", 0.5),
        ("oracle", 1.0),
    ]
    assert [t.label for t in terms[:6]] == ["steering", "clip", "compressibility", "one", "dumps", "two"]
    assert [t.label for t in terms[6:]] == ["safety_checker", "oracle"]
    assert [t.place for t in terms] == ["", "", "", str(file), "json", f"{odd}/mine.py", "", ""]
    assert [t.has_encoder for t in terms] == [True, True, *[False] * 6]
    assert [t.has_encoder for t in parse_terms(("pickscore", "aesthetic", "safety:q16", "safety:nudenet"))] == [
        *(True, True, True, False)
    ]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ((), r"at least one is needed; accepted are steering, clip"),
        (("steerng",), r"'steerng' is no term \(did you mean steering\?\); accepted are steering, clip"),
        (("",), r"'' is no term"),
        (("mine.py",), r"'mine.py' is no term.* FILE\.py:FUNCTION"),
        (("clip=",), r"'clip=' has the weight ''; accepted is a finite number other than 0"),
        (("clip=0",), r"'clip=0' has the weight '0'"),
        (("clip=-0.0",), "'clip=-0.0'"),
        (("clip=nan",), "'clip=nan'"),
        (("clip=inf",), "'clip=inf'"),
        (("clip=1e999",), "'clip=1e999'"),
        (("clip=much",), "'clip=much' has the weight 'much'"),
        (("clip=1=2",), "'clip=1=2' has the weight '1=2'"),
        (("clip", "steering", "clip=2"), "'clip' and 'clip' are both called clip"),
        (("json:dumps", "pickle:dumps"), "'json:dumps' and 'pickle:dumps' are both called dumps"),
        (("no/such/file.py:good",), "'no/such/file.py:good' needs the file 'no/such/file.py', which is not there"),
        (("no_such_module.sub:good",), "needs the module 'no_such_module.sub', which is not installed"),
        (("some/folder:good",), "'some/folder' before the colon; accepted are FILE.py and MODULE"),
        ((":good",), "'' before the colon"),
        (("json:",), "'json:' names no function after the colon"),
        (("json:a-b=2",), "'json:a-b' names no function"),
        (("json:clip",), "'json:clip' cannot be called 'clip'"),
        (("json:std",), "'json:std' cannot be called 'std'"),
        (("json:safety",), "'json:safety' cannot be called 'safety'"),
        (("safety",), "'safety' names no detector; accepted are safety:q16, safety:nudenet"),
        (("safety:q61=2",), r"'safety:q61' names no detector 'q61' \(did you mean q16\?\); accepted are safety:q16"),
        (("safety:q16", "safety:q16=2"), "'safety:q16' and 'safety:q16' are both called q16"),
        (("imagereward",), "'imagereward' cannot be had here: no maintained package has its code"),
    ],
)
def test_what_is_no_term(terms, message):
    with pytest.raises(ConfigError, match=rf"^reward\.terms.*{message}") as raised:
        parse_terms(terms)
    assert "\n" not in str(raised.value)


def test_naming_terms_imports_no_encoder():
    code = "import sys, fastgrpo.rewards.terms; sys.exit('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
