"""Tiny studies that several tests read."""

import shutil
from pathlib import Path

import pytest

from isthmus.studies.dar import DAR_STUDY
from isthmus.studies.srdd import SRDD_STUDY
from tests.studies.tiny_studies import dar_setting, srdd_setting, tiny_data


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """Data spec of 80 tiny images."""
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished_srdd(tmp_path_factory, data) -> Path:
    """Folder of a finished study of SRDD with all tables."""
    folder = tmp_path_factory.mktemp("srdd") / "study"
    SRDD_STUDY.run(srdd_setting(data), folder, tables=SRDD_STUDY.table_names, facts={})
    return folder


@pytest.fixture(scope="session")
def finished_dar(tmp_path_factory, data) -> Path:
    """Folder of a finished study of D-AR with all tables."""
    folder = tmp_path_factory.mktemp("dar") / "study"
    DAR_STUDY.run(dar_setting(data), folder, tables=DAR_STUDY.table_names, facts={})
    return folder


@pytest.fixture
def srdd_copy(finished_srdd, tmp_path) -> Path:
    """The same, to break."""
    return Path(shutil.copytree(finished_srdd, tmp_path / "study"))


@pytest.fixture
def dar_copy(finished_dar, tmp_path) -> Path:
    """The same, to break."""
    return Path(shutil.copytree(finished_dar, tmp_path / "study"))
