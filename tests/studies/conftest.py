"""Tiny studies that several tests read."""

import shutil
from pathlib import Path

import pytest

from isthmus.studies.dar import DAR_STUDY
from isthmus.studies.options import DarSetting, SrddSetting
from isthmus.studies.srdd import SRDD_STUDY
from isthmus.studies.study import Study
from tests.made_once import made_once
from tests.studies.tiny_studies import dar_setting, run, srdd_setting, tiny_data


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """Data spec of 80 tiny images."""
    return made_once(tmp_path_factory, "study-data", tiny_data)


@pytest.fixture(scope="session")
def finished_srdd(tmp_path_factory, data) -> Path:
    """Folder of a finished study of SRDD with all tables."""
    return made_once(tmp_path_factory, "srdd-study", lambda folder: _finished(SRDD_STUDY, srdd_setting(data), folder))


@pytest.fixture(scope="session")
def finished_dar(tmp_path_factory, data) -> Path:
    """Folder of a finished study of D-AR with all tables."""
    return made_once(tmp_path_factory, "dar-study", lambda folder: _finished(DAR_STUDY, dar_setting(data), folder))


def _finished(study: Study, setting: SrddSetting | DarSetting, folder: Path) -> Path:
    run(study, setting, folder / "study")
    return folder / "study"


@pytest.fixture
def srdd_copy(finished_srdd, tmp_path) -> Path:
    """The same, to break."""
    return Path(shutil.copytree(finished_srdd, tmp_path / "study"))


@pytest.fixture
def dar_copy(finished_dar, tmp_path) -> Path:
    """The same, to break."""
    return Path(shutil.copytree(finished_dar, tmp_path / "study"))
