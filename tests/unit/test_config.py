"""The configuration: what loads, what is refused and with which words, and that no field is for nobody."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import yaml

import rlhf_dist
from rlhf_dist.algorithms.base import AlgorithmSettings
from rlhf_dist.config import ABSENT, Config, differences, load_config, parse_config, to_yaml
from rlhf_dist.errors import ConfigError
from rlhf_dist.settings import Section

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = Path(rlhf_dist.__file__).parent
SHIPPED = sorted(REPOSITORY.glob("configs/**/*.yaml"))

SMALLEST = {
    "run": {"dir": "runs/x"},
    "policy": {"model": "some-policy"},
    "reward": [{"kind": "function", "path": "my_rewards:length"}],
    "data": {"prompts": "prompts.jsonl"},
}
TWO_REWARDS = [
    {"kind": "function", "path": "my_rewards:length"},
    {"kind": "model", "model": "some-reward-model"},
]


@pytest.fixture
def file(tmp_path):
    """The smallest configuration in a file."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


def problems(*overrides, file):
    """The lines of the error that the overrides cause, without the first, which names the file."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{file} cannot be used:"
    return [line.removeprefix("  ") for line in lines]


# ---------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rolout.num_workers=1", "unknown key rolout; did you mean rollout?"),
        ("rollout.num_worker=1", "unknown key rollout.num_worker; did you mean rollout.num_workers?"),
        (
            "rollout.sampling.temprature=1",
            "unknown key rollout.sampling.temprature; did you mean rollout.sampling.temperature?",
        ),
        ("reward.0.weihgt=2", "unknown key reward.0.weihgt; did you mean reward.0.weight?"),
        ("reward.1.modle=x", "unknown key reward.1.modle; did you mean reward.1.model?"),
        ("algorithm.gama=0.9", "unknown key algorithm.gama; did you mean algorithm.gamma?"),
        ("algorithm.kl.traget=6", "unknown key algorithm.kl.traget; did you mean algorithm.kl.target?"),
        ("num_minibatches=2", "unknown key num_minibatches; did you mean algorithm.num_minibatches?"),
        ("run.learning_rat=1", "unknown key run.learning_rat; did you mean sft.learning_rate?"),
        ("checkpoint.top_p=0.9", "unknown key checkpoint.top_p; did you mean rollout.sampling.top_p?"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest_known_one(override, line, file):
    file.write_text(yaml.safe_dump(SMALLEST | {"reward": TWO_REWARDS}))
    assert problems(override, file=file) == [line]


def test_an_unknown_key_like_no_other_lists_what_its_section_knows(file):
    assert problems("policy.qqqq=1", file=file) == ["unknown key policy.qqqq; known here: model"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.num_steps=many", "run.num_steps='many': input should be a valid integer, "),
        ("run.num_steps=2.5", "run.num_steps=2.5: input should be a valid integer, "),
        ("learner.gradient_checkpointing=perhaps", "learner.gradient_checkpointing='perhaps': input should "),
        ("policy.model=[a, b]", "policy.model=['a', 'b']: input should be a valid string"),
        ("reward.0.weight=heavy", "reward.0.weight='heavy': input should be a valid number"),
        ("reward.0.path=no-function", "reward.0.path='no-function': string should match pattern"),
        ("learner.zero_stage=4", "learner.zero_stage=4: input should be 0, 1, 2 or 3"),
        (
            "rollout.dtype=float8",
            "rollout.dtype='float8': input should be 'float32', 'bfloat16' or 'float16'",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_that_prints_it(override, line, file):
    (only,) = problems(override, file=file)
    assert only.startswith(line)


@pytest.mark.parametrize(
    ("override", "given", "example"),
    [
        ("learner.lora=true", "True", "rank: 8"),
        ("rollout=7", "7", "num_workers: 2"),
        ("algorithm=ppo", "'ppo'", "name: ppo"),
        ("algorithm.kl=0.1", "0.1", "placement: reward"),
        ("policy=my-policy", "'my-policy'", "model: …"),
        ("value=my-value", "'my-value'", "model: …"),
        ("sft=d.jsonl", "'d.jsonl'", "demonstrations: …"),
        ("reward.0=a:b", "'a:b'", "path: …"),
    ],
)
def test_a_value_in_place_of_a_section_is_shown_what_a_section_is(override, given, example, file):
    key = override.partition("=")[0]
    assert problems(override, file=file) == [
        f"{key}={given}: input should be a section of keys and values, as in {{{example}}}"
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rollout.sampling.stop=a", "rollout.sampling.stop='a': input should be a list, as in [a, b]"),
        (
            "learner.lora={target_modules: []}",
            "learner.lora.target_modules=[]: input should have at least 1 entry",
        ),
    ],
)
def test_a_list_that_is_none_or_has_too_few_entries_is_an_error(override, line, file):
    assert problems(override, file=file) == [line]


@pytest.mark.parametrize(
    ("value", "printed"),
    [("abc", "'abc'"), ("[1]", "[1]"), ("[1, b]", "[1, 'b']"), ("{low: 1}", "{'low': 1}")],
)
def test_a_value_of_none_of_a_keys_types_is_one_error(value, printed, file):
    lines = problems(f"algorithm.correction.cap={value}", "run.seed=-1", file=file)
    assert sorted(lines) == [
        f"algorithm.correction.cap={printed}: input should be float or list[float, float]",
        "run.seed=-1: input should be greater than or equal to 0",
    ]


def test_each_wrong_entry_of_a_list_is_an_error(file):
    lines = problems("rollout.sampling.stop=[1, a, 2]", file=file)
    assert [line.split(":")[0] for line in lines] == [
        "rollout.sampling.stop.0=1",
        "rollout.sampling.stop.2=2",
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.num_steps=0", "run.num_steps=0: input should be greater than or equal to 1"),
        ("run.seed=-1", "run.seed=-1: input should be greater than or equal to 0"),
        (
            "rollout.sampling.top_p=1.01",
            "rollout.sampling.top_p=1.01: input should be less than or equal to 1",
        ),
        ("rollout.sampling.top_p=0", "rollout.sampling.top_p=0: input should be greater than 0"),
        ("algorithm.lam=1.5", "algorithm.lam=1.5: input should be less than or equal to 1"),
        ("algorithm.kl.coef=-0.1", "algorithm.kl.coef=-0.1: input should be greater than or equal to 0"),
        ("algorithm.dual_clip=1", "algorithm.dual_clip=1: input should be greater than 1"),
        ("cluster.step_timeout_s=0", "cluster.step_timeout_s=0: input should be greater than 0"),
        ("data.limit=0", "data.limit=0: input should be greater than 0"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last=0: input should be greater than or equal to 1"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_prints_it(override, line, file):
    assert problems(override, file=file) == [line]


@pytest.mark.parametrize("section", ["run", "policy", "reward", "data"])
def test_a_missing_section_is_named(section, file):
    file.write_text(yaml.safe_dump({name: value for name, value in SMALLEST.items() if name != section}))
    assert problems(file=file) == [f"{section} is missing"]


def test_a_missing_key_is_named_where_the_user_would_write_it(file):
    assert problems("run={}", file=file) == ["run.dir is missing"]
    assert problems("reward.0={kind: model}", file=file) == ["reward.0.model is missing"]


def test_every_problem_has_a_line(file):
    lines = problems("run.num_step=3", "run.seed=-1", "algorithm.gama=1", file=file)
    assert lines == [
        "run.seed=-1: input should be greater than or equal to 0",
        "unknown key run.num_step; did you mean run.num_steps?",
        "unknown key algorithm.gama; did you mean algorithm.gamma?",
    ]


def test_an_unknown_algorithm_names_those_there_are(file):
    (line,) = problems("algorithm.name=pppo", file=file)
    assert line.startswith("algorithm: name='pppo' is not known; there are: ")
    assert "ppo" in line.split(": ")[-1].split(", ")


# -------------------------------------------------------------------------- what does not fit together


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("rollout.prompts_per_step=3", "rollout.samples_per_prompt=2", "algorithm.num_minibatches=7"),
            "algorithm.num_minibatches=7 is more than the 6 samples of a step "
            "(rollout.prompts_per_step x rollout.samples_per_prompt)",
        ),
        (
            ("rollout.prompts_per_step=4", "rollout.samples_per_prompt=2", "experience.max_samples=7"),
            "experience.max_samples=7 cannot hold the 8 samples of 1 step(s): experience.max_staleness + 1 "
            "times rollout.prompts_per_step x rollout.samples_per_prompt",
        ),
        (
            ("algorithm={name: ppo_kl, target_kl: 0.005}",),
            "algorithm: target_kl=0.005 ends a step before the KL reaches penalty_target=0.01, so the "
            "penalty would only ever shrink; set target_kl above it",
        ),
        (
            ("algorithm.value_clip=off",),
            "algorithm: value_clip is a number, not on or off; write one, or null for none",
        ),
        (
            ("experience.lease_timeout_s=100",),
            "experience.lease_timeout_s=100 is less than a learner step may take, "
            "cluster.step_timeout_s + cluster.weights_timeout_s = 4500",
        ),
        (
            ("weights.transport=ipc", "learner.gpus_per_worker=1"),
            "weights.transport=ipc is from GPU to GPU; learner.gpus_per_worker=1 and "
            "rollout.gpus_per_worker=0 must both be above 0; or use weights.transport=auto",
        ),
        (
            ("experience.max_staleness=1", "rollout.sampling.temperature_final=0.5"),
            "rollout.sampling.temperature_final changes the temperature from step to step, and with "
            "experience.max_staleness=1 steps overlap; drop one of them",
        ),
        (
            ("run.num_steps=5", "algorithm.value_warmup_steps=5"),
            "algorithm.value_warmup_steps leaves none of the run.num_steps=5 steps to the policy",
        ),
        (
            ("algorithm.name=rloo", "rollout.samples_per_prompt=1"),
            "algorithm.name=rloo compares responses to the same prompt: rollout.samples_per_prompt=1 must be "
            "at least 2",
        ),
        (
            ("rollout.sampling.temperature=0",),
            "rollout.sampling.temperature=0 always gives the same response: nothing to learn from",
        ),
        (
            ["run.deterministic=true", "scoring.threads_per_worker=2"],
            "scoring.threads_per_worker=2 and run.deterministic exclude each other: several threads share "
            "out sums by what is computed beside a sample; drop one",
        ),
        (
            ("reward=[{kind: function, path: 'a:score'}, {kind: function, path: 'b:score'}]",),
            "two parts of `reward` have the same name: ['score', 'score']; set `name` of one",
        ),
        (("reward=[]",), "`reward` is an empty list; it must have at least one part"),
        (
            ("algorithm.kl={coef: 0, target: 6}",),
            "algorithm: kl.target steers kl.coef, which is 0; start it above 0",
        ),
        (
            ("rollout.sampling={min_tokens: 9, max_tokens: 8}",),
            "rollout.sampling: min_tokens=9 is above max_tokens=8",
        ),
        (
            ("sft={demonstrations: d.jsonl, num_steps: 5, warmup_steps: 6}",),
            "sft: warmup_steps=6 is more than num_steps=5",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(overrides, line, file):
    assert problems(*overrides, file=file) == [line]


def test_values_at_the_limit_of_a_cross_check_are_accepted(file):
    config = load_config(
        file,
        [
            "rollout.prompts_per_step=3",
            "rollout.samples_per_prompt=2",
            "algorithm.num_minibatches=6",
            "experience.max_samples=6",
            "reward=[{kind: function, path: 'a:score'}, {kind: function, path: 'b:score', name: other}]",
        ],
    )
    assert config.algorithm.num_minibatches == config.experience.max_samples == 6
    assert [reward.label for reward in config.reward] == ["score", "other"]


# ------------------------------------------------------------------------------------------- overrides


def test_overrides_reach_nested_keys_and_list_entries(file):
    config = load_config(file, ["rollout.sampling.max_tokens=7", "reward.0.weight=0.5"])
    assert config.rollout.sampling.max_tokens == 7
    assert config.reward[0].weight == 0.5
    assert config.reward[0].path == "my_rewards:length"


def test_the_last_override_of_a_key_wins_over_the_others_and_the_file(file):
    file.write_text(yaml.safe_dump(SMALLEST | {"run": {"dir": "runs/x", "seed": 3}}))
    assert load_config(file, ["run.seed=4", "run.seed=5"]).run.seed == 5


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("learner.policy_optimizer.learning_rate=1e-6", "learner.policy_optimizer.learning_rate", 1e-6),
        ("learner.policy_optimizer.learning_rate=2.0e-3", "learner.policy_optimizer.learning_rate", 0.002),
        ("algorithm.whiten_advantages=false", "algorithm.whiten_advantages", False),
        ("rollout.sampling.stop=['.', '=']", "rollout.sampling.stop", (".", "=")),
        ("algorithm.value_clip=null", "algorithm.value_clip", None),
        ("algorithm.value_clip=", "algorithm.value_clip", None),
        ("policy.model=a=b", "policy.model", "a=b"),
        ("policy.model='7'", "policy.model", "7"),
        ("learner.policy_optimizer={beta2: 0.99}", "learner.policy_optimizer.beta2", 0.99),
    ],
)
def test_the_value_of_an_override_is_yaml(override, read, value, file):
    place = load_config(file, [override])
    for name in read.split("."):
        place = getattr(place, name)
    assert place == value
    assert type(place) is type(value)


def test_an_override_makes_the_sections_on_its_way(file):
    assert load_config(file).sft is None
    config = load_config(file, ["sft.demonstrations=d.jsonl", "algorithm.kl.coef=0.5"])
    assert config.sft.demonstrations == "d.jsonl"
    assert config.algorithm.kl.coef == 0.5


def test_an_override_makes_a_section_that_the_file_leaves_empty(file):
    file.write_text(file.read_text() + "rollout:\n")
    assert load_config(file, ["rollout.num_workers=5"]).rollout.num_workers == 5


def test_null_takes_a_section_back(file):
    file.write_text(yaml.safe_dump(SMALLEST | {"sft": {"demonstrations": "d.jsonl"}}))
    assert load_config(file, ["sft=null"]).sft is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed", "'run.seed' is not an override; write section.key=value, as in rollout.num_workers=2"),
        ("=3", "'=3' is not an override; write section.key=value, as in rollout.num_workers=2"),
        ("run.seed=[1", "override 'run.seed=[1': '[1' is not a YAML value"),
        ("run.dir.name=x", "override 'run.dir.name=x': run.dir is a value, not a section"),
        ("reward.1.weight=2", "override 'reward.1.weight=2': the list has 1 entries, there is no '1'"),
        ("reward.-1.weight=2", "override 'reward.-1.weight=2': the list has 1 entries, there is no '-1'"),
        ("reward.weight=2", "override 'reward.weight=2': the list has 1 entries, there is no 'weight'"),
    ],
)
def test_a_malformed_override_is_quoted_in_the_error(override, message, file):
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert str(caught.value) == message


# ---------------------------------------------------------------------------------------------- files


def test_a_missing_file_is_named_with_its_nearest_neighbour(file):
    with pytest.raises(ConfigError) as caught:
        load_config(file.with_name("rum.yaml"))
    assert str(caught.value) == (
        f"configuration file {file.with_name('rum.yaml')} does not exist; did you mean {file}?"
    )


def test_a_missing_file_without_neighbours_is_named_alone(tmp_path):
    path = tmp_path / "no-folder" / "run.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"configuration file {path} does not exist"


def test_broken_yaml_says_where(file):
    file.write_text("run:\n  dir: [runs\npolicy: {}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml is not valid YAML: .*line 3, column 7") as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- run\n", "just words\n"])
def test_a_file_that_holds_no_sections_is_refused(text, file):
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"must hold sections \(run:, policy:, …\), not "):
        load_config(file)


def test_a_file_that_is_not_text_is_refused(file):
    file.write_bytes(b"\xff\xfe\x00run")
    with pytest.raises(ConfigError, match="cannot be read: 'utf-8' codec"):
        load_config(file)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: .*Is a directory"):
        load_config(tmp_path)


def test_every_file_that_is_shipped_loads():
    assert SHIPPED
    for path in SHIPPED:
        assert isinstance(load_config(path), Config), path


# ------------------------------------------------------------------------------------------- the tree


def test_the_configuration_survives_its_own_yaml(file, tmp_path):
    overrides = [
        "reward=[{kind: function, path: 'a:b', weight: -0.25}, {kind: model, model: m, name: quality}]",
        "sft={demonstrations: 'task:x', learning_rate: 3.0e-4}",
        "rollout.sampling.stop=['\n', '#: x', 'yes', '1e3']",
        "rollout.sampling.temperature_final=0.7",
        "algorithm={name: ppo, gamma: 0.99, dual_clip: 3, kl: {coef: 1.0e-7, target: 6}}",
        "learner.policy_optimizer.learning_rate=1e-7",
    ]
    config = load_config(file, overrides)
    copied = tmp_path / "copy.yaml"
    copied.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(copied) == config
    assert load_config(copied, ["algorithm.kl.target=7"]) != config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_configuration_survives_its_own_yaml(path):
    config = load_config(path)
    assert parse_config(yaml.safe_load(to_yaml(config)), source="itself") == config


def test_the_yaml_has_every_key_of_every_section(file):
    tree = yaml.safe_load(to_yaml(load_config(file, ["sft.demonstrations=d"])))
    assert list(tree) == list(Config.model_fields)
    assert set(tree["rollout"]["sampling"]) >= {"temperature", "temperature_final", "top_p", "max_tokens"}
    assert {"name", "num_epochs", "gamma", "kl"} <= set(tree["algorithm"])
    assert tree["algorithm"]["kl"]["horizon"] == 10_000


def test_differences_are_named_as_the_user_writes_them():
    one = {"run": {"seed": 0, "dir": "a"}, "reward": [1], "sft": {"num_steps": 3}, "same": None}
    other = {"run": {"seed": 1, "dir": "a"}, "reward": [1, 2], "sft": None, "same": None, "new": 0}
    assert differences(one, other) == [
        ("run.seed", 0, 1),
        ("reward", [1], [1, 2]),
        ("sft", {"num_steps": 3}, None),
        ("new", ABSENT, 0),
    ]


def test_sections_in_a_list_differ_by_key_and_values_in_a_list_as_a_whole():
    one = {"reward": [{"path": "a:b", "weight": 1.0}, {"path": "c:d"}], "stop": ["x"]}
    other = {"reward": [{"path": "a:b", "weight": 2.0}, {"path": "c:d"}], "stop": ["y"]}
    assert differences(one, other) == [("reward.0.weight", 1.0, 2.0), ("stop", ["x"], ["y"])]


def test_the_configuration_is_immutable(file):
    config = load_config(file)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 5
    with pytest.raises(ValueError, match="frozen"):
        config.algorithm.gamma = 0.5


def test_parsing_leaves_the_tree_as_it_was():
    tree = copy.deepcopy(SMALLEST)
    parse_config(tree, source="here")
    assert tree == SMALLEST


# --------------------------------------------------------------------------- nothing that is for nobody


def sections_of(annotation):
    """The sections that a field's type is made of."""
    if annotation is AlgorithmSettings:
        from rlhf_dist.algorithms import algorithm_names, settings_class

        return [settings_class(name) for name in algorithm_names()]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in getattr(annotation, "__args__", ()) for section in sections_of(argument)]


def leaves_and_sections(model=Config, prefix=""):
    """(key, field, sections of the field) of the whole tree."""
    for name, field in model.model_fields.items():
        inner = sections_of(field.annotation)
        yield prefix + name, field, inner
        for section in inner:
            yield from leaves_and_sections(section, f"{prefix}{name}.")


def names_read(source):
    """Names of the attributes that Python code reads, outside of pydantic validators."""

    def walk(node):
        if isinstance(node, ast.FunctionDef) and any(
            "validator" in ast.unparse(each) for each in node.decorator_list
        ):
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return set(walk(ast.parse(source)))


def test_the_walk_reaches_every_depth_of_the_tree():
    keys = {key for key, _, _ in leaves_and_sections()}
    assert {
        "run.dir",
        "reward.path",
        "reward.model",
        "sft.demonstrations",
        "rollout.sampling.temperature",
        "learner.value_optimizer.beta1",
        "algorithm.kl.coef",
    } <= keys


def test_every_field_says_what_it_is():
    undocumented = [
        key
        for key, field, inner in leaves_and_sections()
        if not (field.description or (inner and all("__doc__" in vars(section) for section in inner)))
    ]
    assert undocumented == []


def test_every_section_says_what_it_is():
    sections = {section for _, _, inner in leaves_and_sections() for section in inner}
    assert len(sections) > 12
    assert [section.__name__ for section in sections if not vars(section).get("__doc__")] == []


def test_every_field_is_read_somewhere():
    read = set().union(*(names_read(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")))
    discriminators = {"kind"}  # read by pydantic: it picks the class of a list entry
    leaves = {key for key, _, inner in leaves_and_sections() if not inner}
    assert len(leaves) > 80
    assert sorted(key for key in leaves if key.split(".")[-1] not in read | discriminators) == []


def test_reads_in_a_validator_or_a_comment_do_not_count():
    source = """
class Settings(Section):
    forgotten: int = 1

    @model_validator(mode="after")
    def _check(self):
        return self.forgotten

    def double(self):
        self.written = 3
        return 2 * self.used  # self.mentioned
"""
    assert names_read(source) == {"used"}


def test_the_temperature_moves_linearly_to_its_final_value(file):
    sampling = load_config(
        file, ["rollout.sampling.temperature=1", "rollout.sampling.temperature_final=0.5"]
    ).rollout.sampling
    assert [sampling.temperature_at(step, 6) for step in (0, 1, 5)] == [1.0, 0.9, 0.5]
    assert sampling.temperature_at(0, 1) == 1.0
    constant = load_config(file, ["rollout.sampling.temperature=0.8"]).rollout.sampling
    assert [constant.temperature_at(step, 6) for step in (0, 5)] == [0.8, 0.8]
