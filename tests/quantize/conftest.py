"""Fixtures of the converter's tests."""

import pytest

from tests.support.small_conversions import write_text


@pytest.fixture
def text(tmp_path):
    """A file of calibration text for small conversions."""
    return write_text(tmp_path / "calibration.txt")
