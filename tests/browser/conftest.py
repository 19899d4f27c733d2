"""A Chromium for the tests of the page."""

import os

import pytest

from tests.browser import chromium


@pytest.fixture(scope="session")
def started(tmp_path_factory):
    """Return a headless Chromium; skip the test where there is none, or fail it where one is required."""
    if chromium.program() is None:
        missing = f"no browser: none of {', '.join(chromium.PROGRAMS)} is installed (Debian: chromium)"
        if os.environ.get("DETROJAN_BROWSER") == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    with chromium.running(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(started):
    """Return a headless Chromium in which no page is open; those of the test are closed after it."""
    yield started
    started.close_tabs()
