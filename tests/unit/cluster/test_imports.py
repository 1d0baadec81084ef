"""No garbage is collected while engines are imported, and again afterwards, whatever happens."""

from __future__ import annotations

import gc

import pytest

from rlhf_dist.cluster.imports import without_garbage_collection


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()


def test_collection_rests_for_the_block_alone():
    before = gc.get_freeze_count()
    with without_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before, "what is there then is not looked at again"


def test_an_import_that_fails_leaves_it_on():
    with pytest.raises(ModuleNotFoundError), without_garbage_collection():
        import no_such_module  # noqa: F401
    assert gc.isenabled()
