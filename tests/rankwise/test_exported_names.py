"""The public surface of `rankwise` is what its `__all__` says."""

import typing

import pytest

import rankwise


def test_every_exported_name_exists_and_the_list_is_sorted() -> None:
    assert rankwise.__all__ == sorted(rankwise.__all__)
    assert all(getattr(rankwise, name) is not None for name in rankwise.__all__)
    assert set(rankwise.__all__) <= set(dir(rankwise))
    assert {*rankwise._HOMES, "__version__"} == set(rankwise.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'rankwise' has no attribute 'rank'"):
        _ = rankwise.rank


def test_type_hints_of_the_entry_points_resolve() -> None:
    assert typing.get_type_hints(rankwise.gather_objects)
    assert typing.get_type_hints(rankwise.CheckpointManager.load)
