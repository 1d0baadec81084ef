"""Parts of a run that need no role."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_dist.driver import run as module
from rlhf_dist.driver.run_folder import RunFolder


@pytest.mark.parametrize(("problem", "said"), [("the disk is full", ["the disk is full"]), (None, [])])
def test_what_could_not_be_compacted_is_said_and_ends_nothing(
    problem, said, tmp_path, config, save, monkeypatch
):
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(module, "save_checkpoint", lambda *_: save(folder.checkpoints, 5))
    asked, lines = [], []

    def ask(make, then, *, timeout_s):
        asked.append((make(), timeout_s))
        then(problem)

    roles = SimpleNamespace(
        queue=SimpleNamespace(checkpointed=lambda first_step: first_step), learner=SimpleNamespace(save=print)
    )
    flow = SimpleNamespace(queue=SimpleNamespace(ask=ask), events=None)
    progress = SimpleNamespace(say=lines.append)
    module._save(config(), folder, roles, flow, {"step": 4, "reward_mean": 0.5}, progress)
    assert asked == [(5, module.COMPACTION_TIMEOUT_S)]
    assert lines == said
