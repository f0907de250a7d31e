"""The small encoder that tests of several files score with, and pictures."""

import pytest

from support.encoders import write_folder
from support.rewards import GROUP, PROMPTS, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    write_folder(folder)
    return folder


@pytest.fixture
def images():
    return pictures(len(PROMPTS) * GROUP)
