"""Small pipelines of both kinds, which tests of several files load."""

import shutil

import pytest

from support import sd_pipelines
from support.sd_pipelines import KINDS


@pytest.fixture(scope="module")
def pipelines():
    return {kind: sd_pipelines.build_pipeline(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(pipelines, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {kind: sd_pipelines.save_folder(pipelines[kind], root / kind) for kind in KINDS}


@pytest.fixture
def copy(folders, tmp_path):
    """A pipeline's folder that may be changed."""
    return shutil.copytree(folders["sd1"], tmp_path / "copy")
