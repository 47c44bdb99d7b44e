"""YAML and JSON of strangers: what is short stays small, what looks like a number is one or is refused."""

import os

import pytest
import yaml

from dino_sparo.errors import UserError
from dino_sparo.evaluation.compare import read_run
from dino_sparo.files import parsed_json
from dino_sparo.recipe.files import named_recipe, recipes
from dino_sparo.recipe.typed import MOST_TEXT, load_yaml, value_of
from dino_sparo.runs.rundir import check_same_experiment
from dino_sparo.slots.subject import Subject
from dino_sparo.study.variants import read_variants
from tests.recipes import changed, parse, refused
from tests.test_compare import make_run, result
from tests.tiny import tiny_options

LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 25))
PHOTOS = recipes()["photos_sparo"].read_text()


def recipe(path):
    named_recipe(str(path), {})


def run_folder(path):
    check_same_experiment(path.parent, tiny_options(path.parent, path.parent))


def variants(path):
    read_variants(str(path), [])


def compared(path):
    make_run(path.parent, result(100), recipe=False)
    read_run(str(path.parent))


def page(path):
    _ = Subject(str(path.parent)).config


READERS = [recipe, run_folder, variants, compared, page]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, r"line 2: \*a0 is an alias"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n", r"line 3: \*a is an alias"),
        ("seed: &a [*a]\n", r"\*a is an alias"),
        ("[" * 90_000, "more than 20 nested"),
        ("{a: " * 20_000, "more than 20 nested"),
        ("seed: !!int abc\n", "'tag:yaml.org,2002:int' is a tag"),
        ("seed: !!python/name:os.system x\n", "is a tag"),
        ("seed: 1\n" + "#" * MOST_TEXT, "more than 100,000 bytes"),
        ("seed: \x01\n", "not valid YAML"),
        ("a: 1\na: 2\n", "line 2: key 'a' is given twice"),
    ],
    ids=range(10),
)
def test_yaml_is_refused_by_file_and_reason_in_every_reader(tmp_path, read, text, reason):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        read(tmp_path / "config.yaml")
    assert str(tmp_path / "config.yaml") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [run_folder, page])
@pytest.mark.parametrize("how", ["pipe", "device", "bytes"])
def test_a_config_that_is_no_text_file(tmp_path, read, how):
    path = tmp_path / "config.yaml"
    if how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"\xff\xfe\x00")
    if read is page and how != "bytes":
        assert Subject(str(tmp_path)).config == {}
        return
    with pytest.raises(UserError, match=r"config\.yaml is not (a regular file|valid YAML)"):
        read(path)


@pytest.mark.parametrize("key", ["optim.epochs", "optim.lr_per_256"])
@pytest.mark.parametrize(
    "value", ["010", "0o7", "0x10", "0b1", "1_0", "1:30:00", "1:30.5", "false", "no", "2020-01-01", "9" * 400]
)
def test_what_is_no_decimal_number_is_no_number(tmp_path, key, value):
    mark = "12345"
    message = refused(tmp_path, changed(key, mark).replace(f"'{mark}'", value))
    assert key in message and "expected a" in message
    with pytest.raises(UserError, match=f"{key} is .*; expected a"):
        parse("--config", "photos_sparo", "--data.path=x", "--run_dir=y", f"--{key}={value}")


@pytest.mark.parametrize(
    "text", ["&a [*a]", "[&a 1, *a]", "!!int 3", "[" * 50_000, "9" * 5_000, "2020-99-99"]
)
def test_hostile_values_on_the_command_line(text):
    with pytest.raises(UserError, match=r"k is .*; expected a list"):
        value_of("k", text, list[int])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-7", -7),
        ("0", 0),
        ("-.5", -0.5),
        ("yes", True),
        ("9223372036854775807", 2**63 - 1),
        ("1.0e-06", 1e-6),
        (".inf", float("inf")),
        ("~", None),
        ("010", "010"),
        ("2020-01-01", "2020-01-01"),
        ("1e5", "1e5"),
    ],
)
def test_plain_yaml(text, value):
    assert load_yaml(text, "x") == value
    assert load_yaml(yaml.safe_dump({"key": value}), "x") == {"key": value}  # as run folders hold it


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "0.001", "1.e-3", "1.0e-3", ".001"])
def test_ways_to_write_a_number(number):
    assert value_of("x", number, float) == 0.001


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"format": ' + "9" * 5_000 + "}"])
def test_json_that_python_cannot_hold_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"nested|digits"):
        parsed_json(text)
