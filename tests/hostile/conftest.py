"""Every stage run once, for all tests of this folder."""

import pytest
from reliability_cases import Lab


@pytest.fixture(scope="package")
def lab(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VITCUT_CACHE", "")
        yield Lab.make(tmp_path_factory.mktemp("lab"))
