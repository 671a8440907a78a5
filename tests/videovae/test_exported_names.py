"""What `import videovae` gives."""

import subprocess
import sys

import pytest

import videovae


def test_public_names_are_sorted_and_there() -> None:
    assert videovae.__all__ == sorted(videovae.__all__)
    assert all(callable(getattr(videovae, name)) for name in videovae.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'train_everything'"):
        videovae.train_everything  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, videovae; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
