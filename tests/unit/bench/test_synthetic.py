"""Experience made without an engine is experience that the learner and the ledger take."""

from __future__ import annotations

import pytest

from rlhf_dist.bench.synthetic import PROMPT_TOKENS, experience_batch, renamed
from rlhf_dist.experience.samples import Samples
from rlhf_dist.experience.schema import EXPERIENCE_SCHEMA, sample_infos


@pytest.fixture(scope="module")
def batch():
    return experience_batch(6, response_tokens=9, seed=1)


def test_it_is_ragged_and_has_every_column(batch):
    assert batch.schema == EXPERIENCE_SCHEMA
    batch.validate(full=True)
    samples = Samples.from_batches([batch])
    assert len(set(samples.response_lengths)) > 1
    assert 1 <= samples.response_lengths.min() <= samples.response_lengths.max() <= 9
    assert samples.total_lengths == [PROMPT_TOKENS + n for n in samples.response_lengths]
    assert samples.ref_logprobs is not None


def test_other_ordinals_and_versions_leave_the_rest_alone(batch):
    other = renamed(batch, [9, 4, 7], version=5)
    other.validate(full=True)
    infos = sample_infos(other)
    assert [info.ordinal for info in infos] == [9, 4, 7]
    assert {(info.oldest_version, info.newest_version) for info in infos} == {(5, 5)}
    samples = Samples.from_batches([other])
    assert set(samples.oldest_versions) == {5}
    assert samples.ordinals.tolist() == [4, 7, 9]
    assert other["response_tokens"].equals(batch["response_tokens"].slice(0, 3))
