"""What a mistake in a recipe or on the command line is answered."""

import pytest

from dino_sparo.cli.evaluating import KnnOptions
from dino_sparo.recipe.files import recipes
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
WRONG_VALUES = [  # key, value, and how a message shows it
    *(("optim.epochs", value, value) for value in ("many", 3.5, True, [3], 0)),
    *(("optim.lr_per_256", value, value) for value in ("fast", True, 0.0, float("nan"))),
    ("data.path", 5, 5),
    ("data.max_images", "all", "all"),
    ("head.norm_last_layer", 1, 1),
    *(("views.global_scale", value, value) for value in ([0.4], 0.4, [0.4, "a"])),
    *(("views.jitter_strength", value, value) for value in ([0.1] * 3, [float("inf"), 0.0, 0.0, 0.0])),
    ("machine.device", "gpu", "gpu"),
    ("model.readout.name", "spar0", "spar0"),
    ("model.readout", "sparo", "'sparo'"),
    ("model.arch", "vit_smal", "vit_smal"),
    ("optim", 5, 5),
    ("monitor", None, None),
    *(("seed", value, value) for value in (-1, 2**63)),
    ("optim.clip_norm", -3.0, -3.0),
    ("model.patch_size", -8, -8),
    ("machine.num_workers", -1, -1),
    ("loss.teacher_temp", float("inf"), "inf"),
    *(("views.flip_probability", value, value) for value in (1.5, float("nan"))),
    ("views.blur_probability", [1.0, -0.1, 0.5], [1.0, -0.1, 0.5]),
    ("optim.teacher_momentum", 1.1, 1.1),
    ("loss.center_momentum", 1.0, 1.0),
    ("model.drop_path_rate", 1.0, 1.0),
    ("machine.data_timeout_seconds", 1501, 1501),
    ("model.readout.key_dim", None, None),
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
    ("views.global_scale", [0.9, 0.4], "is [0.9, 0.4]; expected the lowest, then the highest"),
    ("views.local_scale", [0.1, 1.1], "is [0.1, 1.1]; expected the lowest, then the highest"),
    ("views.blur_radius", [2.0, 1.0], "is [2.0, 1.0]; expected the lowest, then the highest, in pixels"),
    ("views.jitter_strength", [0.1, 0.1, 0.1, 0.6], "0.6]; expected its last number (hue) to be at most 0.5"),
]


@pytest.mark.parametrize(("key", "value", "shown"), WRONG_VALUES)
def test_wrong_value_in_a_recipe(tmp_path, key, value, shown):
    message = refused(tmp_path, changed(key, value))
    assert key in message and f"is {shown}; expected " in message
    if "more than" not in message and key != "machine.data_timeout_seconds":
        assert str(tmp_path / "recipe.yaml") in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optim.epochs", 0, "a whole number above 0"),
        ("optim.clip_norm", -3.0, "a number of at least 0"),
        ("data.max_images", "all", "a whole number above 0 or null"),
        ("views.flip_probability", 1.5, "a number from 0 to 1"),
        ("views.global_scale", [0.4], "a list of 2: a number above 0, a number above 0"),
        ("machine.device", "gpu", "one of auto, cuda, cpu"),
        ("model.arch", "vit_smal", "one of vit_tiny, vit_small, vit_base or a section with width, depth"),
        ("head.norm_last_layer", 1, "true or false"),
        ("optim", 5, "a section with epochs, global_batch_size"),
    ],
)
def test_types_and_ranges_in_words(tmp_path, key, value, expected):
    assert f"expected {expected}" in refused(tmp_path, changed(key, value))


@pytest.mark.parametrize(("key", "value", "expected"), DO_NOT_FIT)
def test_values_that_do_not_fit_together(tmp_path, key, value, expected):
    for message in (
        refused(tmp_path, changed(key, value)),
        refusal("--config", "photos_sparo", *REQUIRED, f"--{key}={value}"),
    ):
        assert key in message and expected in message


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"name": "cls"}, "slot_dim", "is 32, but model.readout.name is 'cls'"),
        (
            {"name": "gap"},
            "num_slots",
            "is 16, model.readout.slot_dim is 32, but model.readout.name is 'gap'",
        ),
        ({"heads": "multi"}, "group_size", "is 1, but model.readout.name is 'sparo' with multi heads"),
        ({"heads": "multi", "group_size": None}, "num_heads", "is missing"),
        ({"group_size": None}, "group_size", "is missing"),
        ({"heads": "separate", "num_heads": 2}, "num_heads", "is 2, but model.readout.name is 'sparo' with"),
        ({"num_heads": 2}, "num_heads", "is 2, but model.readout.name is 'sparo' with separate heads"),
        ({"heads": "many"}, "heads", "is many; expected one of separate, multi or null"),
        ({"output": "all"}, "output", "is all; expected one of slots, whole or null"),
        ({"after_last_block": 3}, "after_last_block", "is 3; expected true or false or null"),
        ({"name": "pooler"}, "key_dim", "is 32, but model.readout.name is 'pooler'"),
        ({"name": "pooler", **NO_KEYS, "num_heads": 5}, "num_heads", "is 5, which does not divide"),
        ({"name": "bottleneck"}, "slot_dim", "is 32, but model.readout.name is 'bottleneck'"),
        ({"name": "cls", **NO_SLOTS, "after_last_block": True}, "after_last_block", "is True, but"),
        ({"bottleneck_dim": 8}, "bottleneck_dim", "is 8, but model.readout.name is 'sparo'"),
    ],
)
def test_readouts_and_fields_that_are_not_theirs(tmp_path, changes, key, reason):
    readout = content()["model"]["readout"] | changes
    assert f"model.readout.{key} {reason}" in refused(tmp_path, changed("model.readout", readout))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"name": "pooler", **NO_KEYS}, "num_heads"),
        ({"name": "bottleneck", **NO_SLOTS}, "bottleneck_dim"),
    ],
)
def test_fields_that_a_readout_needs(tmp_path, changes, key):
    readout = content()["model"]["readout"] | changes
    assert f"missing: model.readout.{key}" in refused(tmp_path, changed("model.readout", readout))


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
        (("--optim.epochs", "many"), "optim.epochs is many; expected a whole number above 0"),
        (("--seed", ""), "seed is empty; give a value"),
        (("--optim.lr_per_256", ".nan"), "optim.lr_per_256 is .nan; expected a number above 0"),
        (("--zzz", "3"), "option --zzz is unknown; see --help"),
    ],
)
def test_malformed_command_line(arguments, expected):
    assert expected in refusal("--config", "photos_sparo", *REQUIRED, *arguments)


def test_missing_options():
    assert refusal("--config", "photos_sparo").startswith(
        "missing: data.path, run_dir; give --data.path VALU"
    )
    message = refusal(*REQUIRED)
    assert message.startswith("missing: seed, data.on_bad_image, views.global_size") and all(
        name in message for name in recipes()
    )
    message = refusal()
    assert message.startswith("missing: data.path, run_dir, seed, ") and " more; an experiment has" in message
    assert refusal("--data.path", "x", options_class=KnnOptions) == "missing: run; give --run VALUE"


@pytest.mark.parametrize("name", ["nope", "configs/nope.yaml", "elsewhere/demo.yaml", "."])
def test_recipe_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = refusal("--config", name, *REQUIRED)
    assert f"config {name!r} does not exist" in message and all(recipe in message for recipe in recipes())


@pytest.mark.parametrize("value", ["[]", "[0]", "[a]", "[2.5]"])
def test_neighbours_that_are_no_numbers(value):
    assert "k is " in refusal("--run", "x", "--data.path", "y", "--k", value, options_class=KnnOptions)
