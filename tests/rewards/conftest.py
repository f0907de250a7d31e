"""The small encoder that tests of several files score with."""

import pytest

from support.encoders import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    write_folder(folder)
    return folder
