"""The phrases of the safety axis: the sets that have a name, and files of one's own."""

import subprocess
import sys

import pytest

import fastgrpo  # noqa: F401  (prepares torch's import)
from fastgrpo.rewards.anchors import ANCHORS, Anchors, load_anchors
from fastgrpo.system.errors import ConfigError


def load(tmp_path, text: str | bytes) -> Anchors:
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_anchors(str(path))


def test_names():
    assert {name: load_anchors(name) for name in ANCHORS} == ANCHORS
    assert {name: (len(a.safe), len(a.unsafe)) for name, a in ANCHORS.items()} == {
        "shapes": (5, 5),
        "compact": (5, 3),
        "scaled": (25, 20),
        "unsafe-only": (0, 3),
    }


@pytest.mark.parametrize("anchors", ANCHORS.values(), ids=ANCHORS)
def test_no_phrase_twice(anchors):
    phrases = anchors.safe + anchors.unsafe
    assert len({phrase.lower() for phrase in phrases}) == len(phrases)
    assert all(phrase == phrase.strip() != "" for phrase in phrases)


def test_scaled_is_of_all_seven_categories():
    # A word that only the phrases of its category have.
    unsafe = load_anchors("scaled").unsafe
    words = ("racist", "bullied", "fight", "suicide", "pornographic", "gory", "drugs")
    assert [sum(word in phrase for phrase in unsafe) for word in words] == [1] * 7


def test_file(tmp_path):
    both = 'safe = ["a calm scene", " no weapons "]\nunsafe = ["ein Überfall"]\n'
    assert load(tmp_path, both) == Anchors(("a calm scene", "no weapons"), ("ein Überfall",))
    assert load(tmp_path, 'unsafe = ["a", "b"]') == Anchors((), ("a", "b"))
    assert load(tmp_path, 'safe = []\nunsafe = ["a"]') == Anchors((), ("a",))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "its list unsafe is empty or missing"),
        ('safe = ["a"]\nunsafe = []', "its list unsafe is empty or missing"),
        ('unsafe = "a"', "unsafe must be a list of phrases"),
        ('unsafe = ["a", 3]', "unsafe must be a list of phrases"),
        ('unsafe = ["a", "  "]', "unsafe must be a list of phrases, strings that are not empty"),
        ('unsafe = ["a"]\nsafe = [""]', "safe must be a list of phrases"),
        ("[unsafe]\nphrases = []", "unsafe must be a list of phrases"),
        ('unsafe = ["a"]\nsaef = ["b"]', "it sets 'saef'; accepted are the lists safe and unsafe"),
        ('safe = ["b", "a"]\nunsafe = ["a "]', "'a' is in both lists"),
        ("unsafe =\nsafe = []", "it is not TOML: .*line 1"),
        (
            b'unsafe = ["\xff"]',
            "it is not TOML: it is not UTF-8: byte 0xff in line 1, offset 11 of the file; save it as UTF-8",
        ),
        ('unsafe = ["a cat"]'.encode("utf-16"), "it is not TOML: it is UTF-16; save it as UTF-8"),
    ],
)
def test_bad_files(tmp_path, text, says):
    with pytest.raises(ConfigError, match=rf"^reward\.anchors = '.*mine\.toml': {says}") as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"reward\.anchors = 'compct': no such anchors \(did you mean compact\?\)"):
        load_anchors("compct")
    with pytest.raises(ConfigError, match=r"'zzz': no such anchors; there are shapes, .*scaled.*FILE\.toml"):
        load_anchors("zzz")
    with pytest.raises(ConfigError, match=r"none\.toml': cannot be read \(No such file"):
        load_anchors(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_anchors(str(tmp_path / "folder.toml"))


def test_anchors_are_read_without_open_clip():
    code = (
        "import sys; from fastgrpo.rewards.anchors import load_anchors; load_anchors('scaled'); print('open_clip' "
        "in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
