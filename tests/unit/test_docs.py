"""The documentation says what the code does."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rlhf_dist import cli
from rlhf_dist.algorithms import algorithm_names, settings_class
from rlhf_dist.config import parse_config

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


def test_the_page_of_algorithms_has_every_algorithm_and_every_hyper_parameter():
    page = (REPOSITORY / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for name in algorithm_names():
        assert f"| `{name}` |" in page
        for key, field in settings_class(name).model_fields.items():
            section = getattr(field.annotation, "model_fields", None)
            keys = [f"{key}.{inner}" for inner in section] if section else [key]
            for one in keys:
                assert one == "name" or f"| `{one}` |" in page, one


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
