"""Complete evidence and its page, shared by all tests of a session. Tests only read them."""

from __future__ import annotations

import pandas as pd
import pytest

from hf2mnn.report.evidence import Evidence
from hf2mnn.report.page import render_page
from page_evidence import make_evidence, make_table

FAULTY = "int4-hqq-block32-vision-int8"


@pytest.fixture(scope="session")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return make_evidence(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="session")
def table(evidence: Evidence) -> pd.DataFrame:
    return make_table(evidence, {FAULTY: True})


@pytest.fixture(scope="session")
def page(evidence: Evidence, table: pd.DataFrame) -> str:
    return render_page(evidence, table)
