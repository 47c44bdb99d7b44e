"""What a mistake in a recipe or on the command line is answered."""

from dataclasses import MISSING

import pytest

from dino_sparo.cli.evaluating import KnnOptions
from dino_sparo.config import recipes
from tests.recipes import (
    REQUIRED,
    changed,
    content,
    parse,
    refusal,
    refused,
)

# --- Mistakes: (key, value, what the message says besides the key)

ARCH = {"width": 64, "depth": 2, "num_heads": 2}
NO_KEYS = {"key_dim": None, "group_size": None}
NO_SLOTS = {"num_slots": None, "slot_dim": None, **NO_KEYS}
WRONG_TYPE = [
    ("optim.epochs", "many", "is many; expected a whole number"),
    ("optim.epochs", 3.5, "is 3.5; expected a whole number"),
    ("optim.epochs", True, "is True; expected a whole number"),
    ("optim.epochs", [3], "is [3]; expected a whole number"),
    ("optim.epochs", {"a": 1}, "is a section here; expected a whole number"),
    ("optim.lr_per_256", "fast", "is fast; expected a number"),
    ("optim.lr_per_256", True, "is True; expected a number"),
    ("data.path", 5, "is 5; expected text"),
    ("data.max_images", "all", "is all; expected a whole number or null"),
    ("head.norm_last_layer", 1, "is 1; expected true or false"),
    ("views.global_scale", [0.4], "is [0.4]; expected a list of 2"),
    ("views.jitter_strength", [0.1] * 3, "is [0.1, 0.1, 0.1]; expected a list of 4"),
    ("views.global_scale", 0.4, "is 0.4; expected a list of 2"),
    ("views.global_scale", [0.4, "a"], "is a; expected a list of 2: a number, a number"),
    ("machine.device", "gpu", "is gpu; expected one of auto, cuda, cpu"),
    ("model.readout.name", "spar0", "is spar0; expected one of sparo, cls, gap"),
    ("model.readout", "sparo", "is 'sparo'; expected a section with name, num_slots"),
    ("model.arch", "vit_smal", "is vit_smal; expected one of vit_tiny, vit_small, vit_base or a section"),
    ("model.arch", ARCH | {"num_heads": "two"}, "is two; expected one of vit_tiny"),
    ("optim", 5, "is 5; expected a section with epochs, global_batch_size"),
    ("monitor", None, "is None; expected a section with knn_every_epochs"),
]
OUT_OF_RANGE = [
    ("seed", -1, "is -1; expected 0 to"),
    ("seed", 2**63, f"is {2**63}; expected 0 to"),
    ("optim.epochs", 0, "is 0; expected a finite number above 0"),
    ("machine.data_timeout_seconds", 1501, "is 1501; expected at most 1500"),
    ("optim.lr_per_256", 0.0, "is 0.0; expected a finite number above 0"),
    ("optim.clip_norm", -3.0, "is -3.0; expected a finite number of at least 0"),
    ("model.patch_size", -8, "is -8; expected a finite number above 0"),
    ("machine.num_workers", -1, "is -1; expected a finite number of at least 0"),
    ("optim.lr_per_256", float("nan"), "is nan; expected a finite number"),
    ("loss.teacher_temp", float("inf"), "is inf; expected a finite number"),
    ("views.flip_probability", float("nan"), "is nan; expected 0 to 1"),
    (
        "views.jitter_strength",
        [float("inf"), 0.0, 0.0, 0.0],
        "is [inf, 0.0, 0.0, 0.0]; expected a finite number",
    ),
    ("views.flip_probability", 1.5, "is 1.5; expected 0 to 1"),
    ("views.blur_probability", [1.0, -0.1, 0.5], "is [1.0, -0.1, 0.5]; expected 0 to 1"),
    ("optim.teacher_momentum", 1.1, "is 1.1; expected 0 to 1"),
    ("loss.center_momentum", 1.0, "is 1.0; expected at least 0 and below 1"),
    ("model.drop_path_rate", 1.0, "is 1.0; expected at least 0 and below 1"),
    ("data.path", "", "is empty"),
]
DO_NOT_FIT = [
    ("optim.warmup_epochs", 31, "is 31, longer than the run: optim.epochs is 10; use at most 10"),
    ("loss.warmup_teacher_temp_epochs", 31, "is 31, longer than the run: optim.epochs is 10; use at most 10"),
    ("optim.freeze_last_layer_epochs", 31, "is 31, longer than the run: optim.epochs is 10; use at most 10"),
    ("views.global_size", 50, "is 50, not divisible by model.patch_size 12; use a multiple, such as 48"),
    ("views.local_size", 23, "is 23, not divisible by model.patch_size 12; use a multiple, such as 24"),
    ("model.arch.width", 130, "is 130, not divisible by model.arch.num_heads 4"),
    ("model.arch.depth", 1, "is 1; expected at least 2 with sparo"),
    ("model.readout.group_size", 3, "is 3, which does not divide model.readout.num_slots 16; use a divisor"),
    ("model.readout.num_slots", MISSING, "is missing; sparo needs num_slots"),
    ("model.readout.key_dim", None, "is missing; sparo needs num_slots"),
    ("views.global_scale", [0.9, 0.4], "is [0.9, 0.4]; expected the lowest, then the highest"),
    ("views.local_scale", [0.1, 1.1], "is [0.1, 1.1]; expected the lowest, then the highest"),
    ("views.blur_radius", [2.0, 1.0], "is [2.0, 1.0]; expected the lowest, then the highest, in pixels"),
    ("views.jitter_strength", [0.1, 0.1, 0.1, 0.6], "0.6]; expected its last number (hue) to be at most 0.5"),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG_TYPE + OUT_OF_RANGE + DO_NOT_FIT)
def test_wrong_value_in_a_recipe(tmp_path, key, value, expected):
    message = refused(tmp_path, changed(key, value))
    assert key in message and expected in message


@pytest.mark.parametrize(
    ("key", "value", "expected"), [case for case in DO_NOT_FIT if case[1] is not MISSING]
)
def test_wrong_value_on_the_command_line(key, value, expected):
    message = refusal("--config", "photos_sparo", *REQUIRED, f"--{key}={'null' if value is None else value}")
    assert key in message and expected in message


@pytest.mark.parametrize("name", ["cls", "gap"])
def test_slots_without_sparo(tmp_path, name):
    message = refused(tmp_path, changed("model.readout.name", name))
    assert f"model.readout.num_slots is 16, but model.readout.name is {name!r}" in message
    assert "set it to null" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"heads": "multi"},
            "group_size is 1, but model.readout.name is 'sparo' with multi heads, which has ",
        ),
        (
            {"heads": "multi", "group_size": None},
            "num_heads is missing; sparo with multi heads needs num_slots",
        ),
        (
            {"heads": "separate", "num_heads": 2},
            "num_heads is 2, but model.readout.name is 'sparo' with separate",
        ),
        (
            {"num_heads": 2},
            "num_heads is 2, but model.readout.name is 'sparo', which has num_slots, slot_dim",
        ),
        ({"heads": "many"}, "heads is many; expected one of separate, multi or null"),
        ({"output": "all"}, "output is all; expected one of slots, whole or null"),
        ({"after_last_block": 3}, "after_last_block is 3; expected true or false or null"),
        (
            {"name": "pooler"},
            "key_dim is 32, but model.readout.name is 'pooler', which has num_slots, slot_dim",
        ),
        (
            {"name": "pooler", **NO_KEYS, "num_heads": 5},
            "num_heads is 5, which does not divide model.readout.sl",
        ),
        ({"name": "pooler", **NO_KEYS}, "num_heads is missing; pooler needs num_slots, slot_dim, num_heads"),
        (
            {"name": "bottleneck"},
            "num_slots is 16, but model.readout.name is 'bottleneck', which has bottleneck",
        ),
        (
            {"name": "bottleneck", **NO_SLOTS},
            "bottleneck_dim is missing; bottleneck needs bottleneck_dim, enc",
        ),
        (
            {"name": "cls", **NO_SLOTS, "after_last_block": True},
            "after_last_block is True, but model.readout.",
        ),
        (
            {"bottleneck_dim": 8},
            "bottleneck_dim is 8, but model.readout.name is 'sparo', which has num_slots",
        ),
    ],
)
def test_readouts_and_fields_that_are_not_theirs(tmp_path, changes, message):
    readout = content()["model"]["readout"] | changes
    assert f"model.readout.{message}" in refused(tmp_path, changed("model.readout", readout))


@pytest.mark.parametrize("name", ["sparo", "pooler"])
def test_one_block_is_enough_for_what_follows_it(tmp_path, name):
    own = {"name": "pooler", **NO_KEYS, "num_heads": 4} if name == "pooler" else {}
    given = ("--config", "photos_sparo", *REQUIRED, "--model.arch.depth=1")
    given += tuple(f"--model.readout.{k}={'null' if v is None else v}" for k, v in own.items())
    assert f"model.arch.depth is 1; expected at least 2 with {name}" in refusal(*given)
    assert parse(*given, "--model.readout.after_last_block=true").model.arch.depth == 1


@pytest.mark.parametrize("missing", ARCH)
def test_arch_with_a_missing_field(tmp_path, missing):
    arch = {name: value for name, value in ARCH.items() if name != missing}
    assert refused(tmp_path, changed("model.arch", arch)).startswith(f"missing: model.arch.{missing}; ")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.epoch", "optim.epochs"),
        ("sede", "seed"),
        ("model.arch.num_head", "model.arch.num_heads"),
        ("optim.teacher_temp", "loss.teacher_temp"),
        ("epochs", "optim.epochs"),
        ("model.readout.slots", "model.readout.num_slots"),
    ],
)
def test_unknown_key_suggests_the_nearest(tmp_path, key, nearest):
    hint = f"is unknown; did you mean {nearest!r}?"
    assert f"{tmp_path / 'recipe.yaml'}: key {key!r} {hint}" in refused(tmp_path, changed(key, 3))
    assert f"option --{key} {hint}" in refusal("--config", "photos_sparo", *REQUIRED, f"--{key}", "3")


PHOTOS = recipes()["photos_sparo"].read_text()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (PHOTOS + "seed: 1\n", "key 'seed' is given twice; give it once"),
        (PHOTOS.replace("  epochs: 10\n", "  epochs: 10\n  epochs: 9\n"), "key 'epochs' is given twice"),
        ("optim.epochs: 9\n" + PHOTOS, "key 'optim.epochs' is given twice"),
        ("seed: [1", "is no valid YAML"),
        ("seed: 0\n\tdata: x", "is no valid YAML"),
        ("? [a, b]\n: 1", "is no valid YAML"),
        ("!!python/object:os.system {}", "is no valid YAML"),
        ("seed: 0\n---\nseed: 1\n", "is no valid YAML"),
        ("- seed\n- data\n", "expected sections with keys"),
        ("", "expected sections with keys"),
        ("1: 2\n", "key '1' is unknown"),
    ],
)
def test_malformed_recipe(tmp_path, recipe, expected):
    message = refused(tmp_path, recipe)
    assert str(tmp_path / "recipe.yaml") in message and expected in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--optim.epochs", "3", "--optim.epochs=4"), "option --optim.epochs is given twice"),
        (("--config", "photos_sparo"), "option --config is given twice"),
        (("--optim.epochs",), "option --optim.epochs has no value; give it as --optim.epochs VALUE"),
        (("stray",), "unexpected argument 'stray'; expected: "),
        (("--views.global_scale", "0.5", "1"), "unexpected argument '1'"),
        (("-x",), "unexpected argument '-x'"),
        (("--optim", "3"), "option --optim is unknown; did you mean 'optim.epochs'?"),
        (("--optim.epochs", "many"), "optim.epochs is many; expected a whole number"),
        (("--seed", ""), "seed is ; expected a whole number"),
        (("--optim.lr_per_256", ".nan"), "optim.lr_per_256 is nan; expected a finite number above 0"),
        (("--zzz", "3"), "option --zzz is unknown; see --help"),
    ],
)
def test_malformed_command_line(arguments, expected):
    assert expected in refusal("--config", "photos_sparo", *REQUIRED, *arguments)


def test_missing_options():
    assert refusal("--config", "photos_sparo").startswith("missing: run_dir, data.path; give --run_dir VALUE")
    message = refusal(*REQUIRED)
    assert message.startswith("missing: seed, data.on_bad_image, views.global_size") and all(
        name in message for name in recipes()
    )
    message = refusal()
    assert message.startswith("missing: run_dir, data.path, seed, ") and " more; an experiment has" in message
    assert refusal("--data.path", "x", options_class=KnnOptions) == "missing: run; give --run VALUE"


@pytest.mark.parametrize("name", ["nope", "configs/nope.yaml", "elsewhere/demo.yaml", "."])
def test_recipe_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = refusal("--config", name, *REQUIRED)
    assert f"config {name!r} does not exist" in message and all(recipe in message for recipe in recipes())


@pytest.mark.parametrize("value", ["[]", "[0]", "[a]", "[2.5]"])
def test_neighbours_that_are_no_numbers(value):
    assert "k is " in refusal("--run", "x", "--data.path", "y", "--k", value, options_class=KnnOptions)
