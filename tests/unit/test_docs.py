"""The documentation says what the code does."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from rlhf_dist import cli
from rlhf_dist.algorithms import algorithm_names, settings_class
from rlhf_dist.config import RunSettings, parse_config
from rlhf_dist.engines.settings import (
    LoRASettings,
    OptimizerSettings,
    RolloutSettings,
    SamplingSettings,
    ValueOptimizerSettings,
)
from rlhf_dist.experience.journal import JournalWriter
from rlhf_dist.experience.schema import EXPERIENCE_SCHEMA, SCHEMA_VERSION, rollout_batch, scored_batch
from rlhf_dist.experience.settings import ExperienceSettings
from rlhf_dist.experience.steps import StepsLog, leased_record, started_record
from rlhf_dist.rewards.settings import FunctionRewardSettings
from rlhf_dist.types import BatchRows, Completion, GenerationRequest, VersionSpan

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_configuration_page_is_current():
    script = REPOSITORY / "scripts" / "document_configuration.py"
    spec = importlib.util.spec_from_file_location("document_configuration", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.page(), f"run: python {script.name}"


# ------------------------------------------------------------------------------------- hyper-parameters

ALGORITHMS_PAGE = (REPOSITORY / "docs" / "algorithms.md").read_text(encoding="utf-8")
HYPER_PARAMETERS = ALGORITHMS_PAGE.split("\n## Hyper-parameters\n")[1].split("\n## ")[0]
COLUMNS = ("key", "meaning", "default", "usual range", "watch", "when it misbehaves")
ROWS = {
    cells[0].strip("`"): dict(zip(COLUMNS, cells, strict=True))
    for line in HYPER_PARAMETERS.splitlines()
    if line.startswith("| `")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}
OTHER_SECTIONS = {
    "learner.policy_optimizer": OptimizerSettings,
    "learner.value_optimizer": ValueOptimizerSettings,
    "learner.lora": LoRASettings,
    "rollout.sampling": SamplingSettings,
}
OTHER_KEYS = {
    "run.num_steps": RunSettings,
    "rollout.prompts_per_step": RolloutSettings,
    "rollout.samples_per_prompt": RolloutSettings,
    "rollout.on_update": RolloutSettings,
    "experience.max_staleness": ExperienceSettings,
    "reward.weight": FunctionRewardSettings,
}


def defaults_by_owner():
    """By key, the default that each algorithm has for it; of the other sections' keys the default of all."""
    found = {}
    for name in algorithm_names():
        for key, default in _defaults(settings_class(name)):
            found.setdefault(key, {})[name] = default
    for section, settings in OTHER_SECTIONS.items():
        found |= {f"{section}.{key}": {"all": default} for key, default in _defaults(settings)}
    for key, settings in OTHER_KEYS.items():
        found[key] = {"all": dict(_defaults(settings))[key.partition(".")[2]]}
    return {key: owners for key, owners in found.items() if key != "name"}


def _defaults(settings, prefix=""):
    for key, field in settings.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from _defaults(type(default), f"{prefix}{key}.")
        else:
            yield prefix + key, list(default) if isinstance(default, tuple) else default


def row_of(key):
    """The row of a key; one with a `*` is of the optimizers of policy and value."""
    return ROWS.get(key) or ROWS[re.sub(r"(policy|value)_optimizer", "*_optimizer", key)]


def by_owner(cell, owner):
    """What a cell says for an algorithm: the part behind its name, else the one without names before it."""
    parts = [part.strip() for part in cell.split(";")]
    named = [part.split(": ", 1) for part in parts if re.match(r"(`\w+`, )*`\w+`: ", part)]
    for names, own in named:
        assert set(re.findall(r"`(\w+)`", names)) <= set(algorithm_names()), names
        if f"`{owner}`" in names:
            return own
    return parts[0]


def value(text):
    """As YAML, where 1e-4 is a string though it is meant to be a number."""
    try:
        return float(text)
    except ValueError:
        return yaml.safe_load(text)


def test_the_page_of_algorithms_has_every_algorithm():
    for name in algorithm_names():
        assert f"| `{name}` |" in ALGORITHMS_PAGE


def test_the_table_of_hyper_parameters_has_every_one_and_no_empty_cell():
    used = {row_of(key)["key"].strip("`") for key in defaults_by_owner()}
    assert used == set(ROWS)
    assert [(key, column) for key, row in ROWS.items() for column in COLUMNS if not row[column]] == []


@pytest.mark.parametrize("key", defaults_by_owner())
def test_the_table_of_hyper_parameters_has_the_defaults(key):
    for owner, default in defaults_by_owner()[key].items():
        assert value(by_owner(row_of(key)["default"], owner).strip("`")) == default, owner


@pytest.mark.parametrize("key", defaults_by_owner())
def test_a_default_is_in_its_usual_range(key):
    for owner, default in defaults_by_owner()[key].items():
        text = by_owner(row_of(key)["usual range"], owner)
        if isinstance(default, bool):
            assert text == "on, off"
        elif isinstance(default, int | float):
            low, high = re.match(r"([^ ,]+)(?: to ([^ ,]+))?", text).groups()
            assert float(low) <= default <= float(high or low), owner
        else:
            assert f"`{yaml.safe_dump(default).splitlines()[0]}`" in text, owner


def test_the_metrics_to_watch_are_made_somewhere():
    """By their literal, with or without the model's name. What real steps report is an integration test."""
    literals = {
        node.value
        for file in (REPOSITORY / "rlhf_dist").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    for key, row in ROWS.items():
        named = re.findall(r"`([a-z_0-9]+)`", row["watch"])
        assert named, key
        for name in named:
            model, _, of_model = name.partition("_")
            written = {name} | ({of_model, f"_{of_model}"} if model in ("policy", "value") else set())
            assert written & literals, (key, name)


# ------------------------------------------------------------------------------------------- other pages


def test_the_comparison_of_algorithms_has_every_algorithm():
    """A row that is missing is made by the command beside the table, and is in `table.md` of its folder."""
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = page.split("\n## Algorithms\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (?:yes|no) \| .+ \|$", section, re.M)
    assert sorted(rows) == algorithm_names()


def test_the_readme_example_configuration_is_valid():
    (example,) = blocks(README, "yaml")
    config = parse_config(yaml.safe_load(example), source="README")
    assert config.reward[1].weight == 0.5


def test_the_readme_reward_function_works():
    (example,) = blocks(README, "python")
    namespace = {}
    exec(example, namespace)
    assert namespace["correct"](["1+1", "2+2"], ["it is 2", "it is 5"], {"answer": ["2", "4"]}) == [1.0, 0.0]


def _train_commands():
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                _, found, arguments = line.partition("rlhf-dist train ")
                if found:
                    yield pytest.param(arguments, id=f"{page.name}: {arguments[:50]}")


@pytest.mark.parametrize("arguments", _train_commands())
def test_every_train_command_of_the_docs_is_accepted(arguments, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    result = CliRunner().invoke(cli.app, ["train", *shlex.split(arguments), "--dry-run"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_make_target_of_the_docs_is_there():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M):
            assert re.search(rf"^{''.join(target)}:", makefile, re.M), target


EXPERIENCE_PAGE = (REPOSITORY / "docs" / "experience.md").read_text(encoding="utf-8")


def test_the_page_of_experience_has_the_schema():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]*\|$", EXPERIENCE_PAGE, re.M)
    described = {name: type_.replace("&lt;", "<").replace("&gt;", ">") for name, type_ in rows}
    types = {field.name: str(field.type) for field in EXPERIENCE_SCHEMA}
    plain = {name: text.replace("item: ", "").replace(" not null", "") for name, text in types.items()}
    assert {name: described.get(name) for name in plain} == plain
    assert f"version of the schema, {SCHEMA_VERSION}," in " ".join(EXPERIENCE_PAGE.split())


LONGEST = [
    (o, 0, num_tokens, "a" * (13 - o)) for o, num_tokens in ((11, 7), (12, 7), (9, 6), (10, 6), (7, 5))
]
"""Pairs of prompts have as many tokens; those with more have fewer characters."""


@pytest.fixture
def quickstart_journal(tmp_path, monkeypatch):
    """Runs the page's examples where a run of 13 steps lies: its prompt o has the reward o, see `LONGEST`."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "quickstart" / "journal"
    writer, log = JournalWriter(folder, "scorer", max_segment_bytes=1 << 20), StepsLog(folder)
    log.append([started_record(samples_per_prompt=1, max_staleness=0)])
    prompts = pa.table({"prompt": ["a question"], "columns": ["{}"]})
    for step in range(13):
        num_tokens = 1 + (step + 1) // 2
        completion = Completion(
            GenerationRequest(step, 0, 0, 7, [1, 2], submitted_at_us=0),
            text="a" * (13 - step),
            tokens=[5] * num_tokens,
            logprobs=[-1.0] * num_tokens,
            version_spans=(VersionSpan(step // 2, 0, num_tokens),),
            finish_reason="stop",
            finished_at_us=1,
        )
        rollouts = rollout_batch([completion], producer="w", prompts=prompts)
        rewards = [float(step)]
        scored = scored_batch(
            rollouts,
            rewards=rewards,
            reward_parts={"r": rewards},
            ref_logprobs=None,
            scorer="s",
            scored_at_us=2,
        )
        place = writer.append(scored)
        log.append([leased_record(step, [step], [BatchRows(place, (0,))], step // 2)])
    log.close()


def run_example(number):
    namespace = {}
    exec(blocks(EXPERIENCE_PAGE, "python")[number], namespace)
    names = ("reward_by_version", "longest_responses", "samples_of_step_12")
    return [namespace[name] for name in names]


@pytest.mark.usefixtures("quickstart_journal")
def test_the_duckdb_queries_work():
    by_version, longest, step_12 = (query.fetchall() for query in run_example(0))
    assert by_version == [*((v, 2, 2 * v + 0.5) for v in range(6)), (6, 1, 12.0)]
    assert longest == LONGEST
    assert step_12 == [(12, 0, 12.0, "a question", "a")]


@pytest.mark.usefixtures("quickstart_journal")
def test_the_pandas_queries_work():
    by_version, longest, step_12 = run_example(1)
    assert by_version["mean"].tolist() == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.0]
    assert by_version["count"].tolist() == [2, 2, 2, 2, 2, 2, 1]
    assert list(longest.itertuples(index=False, name=None)) == LONGEST
    assert step_12[["ordinal", "reward"]].to_numpy().tolist() == [[12, 12.0]]


@pytest.mark.usefixtures("quickstart_journal")
def test_both_queries_for_the_longest_responses_give_the_same_rows():
    by_duckdb, by_pandas = run_example(0)[1], run_example(1)[1]
    assert by_duckdb.columns == list(by_pandas)
    assert by_duckdb.fetchall() == list(by_pandas.itertuples(index=False, name=None))
