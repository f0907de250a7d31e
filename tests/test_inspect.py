"""`python -m fastgrpo.inspect` end to end: what it shows against numbers computed here, what it loads and refuses."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len

from fastgrpo import inspect
from fastgrpo.prompts import load_prompts
from fastgrpo.rewards.anchors import ANCHORS
from fastgrpo.rewards.axis.report import choose_prompts
from fastgrpo.rewards.encoder import load_encoder
from fastgrpo.settings.toml import find_preset, load_toml
from fastgrpo.types import NEGATIVE, POSITIVE
from support import ROOT
from support.encoders import reference_direction, unit, write_folder

LIMIT = 36  # no text twice among them, and none so near a bin's edge that rounding could change its bin
ALPHA = 0.25  # some negatives of the shapes world have crossed, most have not
CATEGORIES = ("violence", "shocking")
NOT_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
EIGHTHS = " ▁▂▃▄▅▆▇█"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The lines that the command prints on preset shapes, in a process of its own, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("inspect")
    arguments = ["shapes", "--limit", str(LIMIT), "--reward.alpha", str(ALPHA), "--reward.mode", "always"]
    arguments += ["--engine.threads", "1", "--png", "axis.png", "--prompts.categories", *CATEGORIES]
    code = (
        f"import sys; from fastgrpo.inspect import main; code = main({arguments});"
        "print('diffusers' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "False"  # diffusers was never imported: no diffusion model
    return done.stdout.splitlines(), folder


@pytest.fixture(scope="module")
def places() -> dict[str, np.ndarray]:
    """Label -> [LIMIT] float64, z . v_safe of the prompts that the command measures."""
    encoder = load_encoder("shapes", "cpu")
    v, _ = reference_direction(encoder, ANCHORS["shapes"])
    positives, negatives = load_prompts(replace(load_toml(find_preset("shapes")).prompts, categories=CATEGORIES))
    chosen = choose_prompts([*positives, *negatives], LIMIT)
    return {
        label: encoder.encode_text([p.text for p in chosen if p.label == label]).double().numpy() @ v
        for label in (POSITIVE, NEGATIVE)
    }


def steered(c: np.ndarray, alpha: float) -> np.ndarray:
    """normalize(z + alpha v) . v, from c = z . v."""
    return (c + alpha) / np.sqrt(1 + 2 * alpha * c + alpha**2)


def spread(text: str) -> list[float]:
    """The three numbers of `mean [min, max]`."""
    return [float(number) for number in re.findall(r"[+-]\d\.\d\d", text)]


@pytest.mark.slow
def test_header_and_anchors(shown):
    lines, _ = shown
    assert lines[0] == "encoder   shapes"
    assert lines[1] == f"steering  anchors shapes, mode always, alpha {ALPHA}"
    assert lines[2] == f"prompts   {LIMIT} of 360 positive, {LIMIT} of 540 negative"
    encoder = load_encoder("shapes", "cpu")
    v, length = reference_direction(encoder, ANCHORS["shapes"])
    line = next(line for line in lines if line.startswith("anchors:"))
    assert f"{length:.2f} apart" in line
    for name in ("safe", "unsafe"):
        phrases = getattr(ANCHORS["shapes"], name)
        c = encoder.encode_text(phrases).double().numpy() @ v
        row = next(line for line in lines if line.startswith(f"  {name} "))
        assert row.split()[1] == str(len(phrases))
        assert spread(row) == pytest.approx([c.mean(), c.min(), c.max()], abs=0.0051)  # printed to 0.01


def test_everything_but_warnings_fits_a_terminal(shown):
    lines, _ = shown
    assert max(cell_len(line) for line in lines if not line.startswith("warning: ")) <= 79
    assert not any("\x1b" in line for line in lines)


def test_histogram_bars_are_the_counts(shown, places):
    lines, _ = shown
    scale = next(i for i, line in enumerate(lines) if set(line.strip()) == {"┬", "─"})
    ruler, numbers = lines[scale], lines[scale + 1]
    ticks = [i for i, character in enumerate(ruler) if character == "┬"]
    # A number stands around the tick that it belongs to: one of them gives the scale.
    zero = next(tick for tick in ticks if numbers[tick] == "0" and numbers[tick - 1] == numbers[tick + 1] == " ")
    per_tenth = ticks[1] - ticks[0]
    for label in re.finditer(r"([+-]\d\.\d)", numbers):
        assert float(label[0]) == pytest.approx((label.start() + 2 - zero) / per_tenth / 10)
    edges = np.arange(ticks[0] - zero, ticks[-1] - zero + 1) / per_tenth / 10
    for label, c in places.items():
        assert np.abs(c[:, None] - edges).min() > 1e-4  # features are exact to 1e-5 or so, whatever the machine
        counts = np.histogram(c, edges)[0]
        assert counts.sum() == LIMIT
        head = lines.index(f"  {label}, tallest bar {counts.max()}")
        rows = [line.ljust(len(ruler))[ticks[0] : ticks[-1]] for line in lines[head + 1 : head + 5]]
        heights = [sum(EIGHTHS.index(row[i]) for row in rows) for i in range(len(counts))]
        assert heights == [math.ceil(32 * count / counts.max()) for count in counts]
        full = "".join(rows[-1][i] for i in range(len(counts)) if counts[i] >= counts.max() / 2)
        assert set(full) == {"█"}  # columns stand on the ruler and not upside down


def test_table_of_labels_and_categories(shown, places):
    lines, _ = shown
    start = next(i for i, line in enumerate(lines) if line.startswith("prompts  ") and "before" in line)
    counted = {POSITIVE: 0, NEGATIVE: 0}
    for line in lines[start + 1 : lines.index("", start)]:
        name, count = re.match(r"(  \S+|\S+)\s+(\d+) ", line).groups()
        if name in places:
            label, c = name, places[name]
            after = steered(c, ALPHA)
            expected = [c.mean(), c.min(), c.max(), after.mean(), after.min(), after.max()]
            assert spread(line) == pytest.approx(expected, abs=0.0051)
        else:
            counted[label] += int(count)
    assert counted == {POSITIVE: LIMIT, NEGATIVE: LIMIT}


def test_sweep_table(shown, places):
    lines, _ = shown
    rows = {}
    for line in lines:
        if match := re.match(
            r" *([\d.]+) +([\d.]+)% +([\d.]+) +([\d.]+) deg +([\d.]+) +([\d.]+) deg( +<- alpha)?$", line
        ):
            rows[float(match[1])] = [float(match[i]) for i in range(2, 7)]
            assert bool(match[7]) == (float(match[1]) == ALPHA)
    assert list(rows) == sorted([*(i / 10 for i in range(11)), ALPHA])
    for alpha, (crossed, *shifts) in rows.items():
        assert crossed == pytest.approx(100 * np.mean(places[NEGATIVE] + alpha >= 0), abs=0.051)
        cosines = [(1 + alpha * c) / np.sqrt(1 + 2 * alpha * c + alpha**2) for c in places.values()]
        angles = [np.degrees(np.arccos(np.minimum(cosine, 1)).mean()) for cosine in cosines]
        assert shifts[0::2] == pytest.approx([cosine.mean() for cosine in cosines], abs=0.00051)
        assert shifts[1::2] == pytest.approx(angles, abs=0.051)
    assert 0 < rows[ALPHA][0] < 95 <= rows[1.0][0]
    crossing = np.sort(-places[NEGATIVE])
    mean, most = (
        math.ceil(100 * value) / 100 for value in (crossing.mean(), crossing[LIMIT - 2])
    )  # 1 of 36 may be left, not 2
    assert f"the negatives' mean crosses at alpha {mean:.2f}, 95% of them have crossed at {most:.2f}" in lines
    assert any(line.startswith("warning: ") and f"alpha {most:.2f}" in line for line in lines)


def test_prompts_at_the_border(shown, places):
    lines, _ = shown
    after = {label: steered(c, ALPHA) for label, c in places.items()}
    expected = {
        "  the lowest positives": np.sort(after[POSITIVE])[:5],
        "  the negatives nearest 0": after[NEGATIVE][np.argsort(np.abs(after[NEGATIVE]))][:5],
    }
    texts = {prompt.text for prompts in load_prompts(load_toml(find_preset("shapes")).prompts) for prompt in prompts}
    for head, values in expected.items():
        rows = [line.split(maxsplit=2) for line in lines[lines.index(head) + 1 :][:5]]
        assert [float(row[1]) for row in rows] == pytest.approx(values, abs=0.00051)  # printed to 0.001
        assert [steered(float(row[0]), ALPHA) for row in rows] == pytest.approx(values, abs=0.002)
        assert all(row[2] in texts for row in rows)


def test_picture(shown):
    lines, folder = shown
    assert "picture   axis.png" in lines
    assert os.listdir(folder) == ["axis.png"]
    with Image.open(folder / "axis.png") as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (1500, 800))
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    # Bars and curves of both labels are there: many strongly green and many strongly red pixels.
    green, red = pixels[:, 1] - pixels[:, 0], pixels[:, 0] - pixels[:, 1]
    assert (green > 30).sum() > 1000
    assert (red > 30).sum() > 1000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with an encoder of random weights and a table whose prompts have two categories, or are hostile."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "encoder").mkdir()
    write_folder(folder / "encoder")
    (folder / "positive.txt").write_text("a cat\ntwo dogs\n" + "a very long house " * 20 + "\n" + "漢字" * 40 + "\n")
    (folder / "negative.csv").write_text('text,kind\nblood,"gore, fear"\na gun,fear\n"\x1b[2Jclear [bold]it",\n')
    (folder / "same.toml").write_text('safe = ["a cat"]\nunsafe = ["A cat"]\n')
    (folder / "tiny.toml").write_text(f"""
prompts.positive = "{folder / "positive.txt"}"
prompts.negative = "{folder / "negative.csv"}"
prompts.negative_column = "text"
prompts.category_column = "kind"
reward.encoder = "local-dir:{folder / "encoder"}"
engine.device = "cpu"
engine.threads = 1
""")
    return folder


def run(tiny: Path, *flags: str) -> int:
    return inspect.main([str(tiny / "tiny.toml"), *flags])


def test_prompts_of_ones_own(tiny, tmp_path, capsys):
    assert run(tiny, "--png", str(tmp_path / "own.PNG"), "--reward.mode", "projection", "--limit", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1] for line in lines if re.match(r"  \w+ +\d+   [+-]", line)}
    assert (rows["gore"], rows["fear"]) == ("1", "2")
    assert f"encoder   local-dir:{tiny / 'encoder'}" in lines
    assert not any("\x1b" in line for line in lines)
    assert any(line.endswith(" [2Jclear [bold]it") for line in lines)  # neither the terminal nor rich obeyed
    prompt_lines = [line for line in lines if re.match(r"    [+-]\d\.\d{3} ", line)]
    assert len(prompt_lines) == 4 + 3
    assert max(map(cell_len, prompt_lines)) == 79
    assert sum(line.endswith("…") for line in prompt_lines) == 2
    assert Image.open(tmp_path / "own.PNG").format == "PNG"


@pytest.mark.parametrize("alpha", ["-0.4", "12"])
def test_the_configured_alpha_is_always_in_the_table(tiny, tmp_path, capsys, alpha):
    assert run(tiny, "--png", str(tmp_path / "a.png"), "--reward.alpha", alpha) == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if line.endswith("<- alpha")]
    assert [line.split()[0] for line in marked] == [alpha]


@pytest.mark.slow
def test_the_picture_appears_whole_and_replaces_nothing(tiny, tmp_path, capsys, monkeypatch):
    path = tmp_path / "axis.png"

    def killed(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("os.replace", killed)
        assert run(tiny, "--png", str(path)) == 130
    assert not path.exists()
    assert run(tiny, "--png", str(path)) == 0
    assert Image.open(path).format == "PNG"
    drawn = path.read_bytes()
    capsys.readouterr()
    assert run(tiny, "--png", str(path)) == 2
    assert capsys.readouterr().err == f"fastgrpo: --png {path}: it is there already; accepted is a new file.\n"
    assert path.read_bytes() == drawn


def test_no_picture_is_drawn_unasked(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(tiny) == 0
    assert "picture   none; --png FILE draws one" in capsys.readouterr().out.splitlines()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--reward.terms", "compressibility", "clip=2"], "without `steering` there is no safety axis to inspect"),
        (["--limit", "-1"], "--limit -1: accepted is 1 or more, or 0"),
        (["--png", "axis.jpg"], "ends in .png"),
        (["--png", "missing/axis.png"], "cannot write in 'missing' (No such file or directory)"),
        (["--png", "file/axis.png"], "cannot write in 'file' (Not a directory)"),
        (["--png", "folder.png"], "this is a folder"),
        pytest.param(["--png", "closed/axis.png"], "cannot write in 'closed' (Permission denied)", marks=NOT_ROOT),
        pytest.param(["--png", "locked/axis.png"], "cannot write in 'locked' (Permission denied)", marks=NOT_ROOT),
        (["--prompts.positive", "missing.txt"], "prompts.positive"),
        (["--reward.anchors", "missing"], "reward.anchors"),
        (["--reward.alpha", "much"], "alpha"),
        (["--pgn", "a.png"], "--pgn: no such flag (did you mean --png?)"),
    ],
)
def test_refusals_before_the_encoder_is_loaded(tiny, tmp_path, capsys, monkeypatch, flags, complaint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "fastgrpo.rewards.axis.inspection.load_encoder", lambda *_: pytest.fail("the encoder was loaded")
    )
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "closed").mkdir(mode=0o500)
    (tmp_path / "locked").mkdir(mode=0)
    assert run(tiny, *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastgrpo: ")
    assert err.count("\n") == 1
    assert complaint in err
    assert sorted(os.listdir(tmp_path)) == ["closed", "file", "folder.png", "locked"]


def test_anchors_without_a_direction_are_refused(tiny, tmp_path, capsys):
    assert run(tiny, "--png", str(tmp_path / "a.png"), "--reward.anchors", str(tiny / "same.toml")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"fastgrpo: reward\.anchors: .* same mean .*\n", err)
    assert os.listdir(tmp_path) == []


def test_steering_among_other_terms_is_inspected(tiny, tmp_path):
    assert run(tiny, "--png", str(tmp_path / "a.png"), "--reward.terms", "compressibility", "steering=0.5") == 0


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        inspect.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("fastgrpo.inspect", "--png", "--limit", "--reward.alpha", "--prompts.negative"))


def test_references_have_teeth(places):
    """The two labels' numbers differ by more than what is printed, so that swapped columns would be seen."""
    assert np.abs(unit(places[POSITIVE]) - unit(places[NEGATIVE])).max() > 0.1
    assert places[POSITIVE].mean() - places[NEGATIVE].mean() > 0.1
