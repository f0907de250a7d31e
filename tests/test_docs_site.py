"""The documentation as a site: it builds without a network, its links lead somewhere, and every setting is in it."""

import dataclasses
import html
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.settings.schema import TrainConfig
from support import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make docs`, with every warning as an error: a link that leads nowhere is one."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def names(group: Any, prefix: str = "") -> set[str]:
    found = set()
    for field in dataclasses.fields(group):
        value, name = getattr(group, field.name), prefix + field.name
        found |= names(value, name + ".") if dataclasses.is_dataclass(value) else {name}
    return found


def test_every_setting_is_there_with_its_default(site: Path) -> None:
    page = html.unescape((site / "settings" / "index.html").read_text(encoding="utf-8"))
    told = dict(re.findall(r"<code>([a-z_0-9.]+)</code></strong> = <code>(.*?)</code>", page))
    assert set(told) == names(TrainConfig())
    assert told["grpo.clip_low"] == "0.0001"
    assert told["reward.terms"] == '["steering"]'


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?([^\" >]+)", page.read_text(encoding="utf-8"))
        loaded += re.findall(
            r"<link[^>]+rel=\"?(?:stylesheet|preload|icon)[^>]+href=\"?([^\" >]+)", page.read_text(encoding="utf-8")
        )
        assert not [address for address in loaded if "//" in address], page


def test_links_are_those_of_the_repository(site: Path) -> None:
    first = (site / "index.html").read_text(encoding="utf-8")
    assert 'src="before_after.png"' in first
    assert (site / "before_after.png").read_bytes() == (ROOT / "docs" / "before_after.png").read_bytes()
    for link in re.findall(r'href="(project/[^"]+)"', first):
        there = site / link
        assert (there / "index.html").is_file() or there.is_file(), link
    assert 'href="../project/bench/results/forecast/"' in (site / "throughput" / "index.html").read_text(
        encoding="utf-8"
    )
