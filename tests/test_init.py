"""Starting weights: what a run takes of a file, what it says about it, and what it refuses."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from dino_sparo.config import parse_options
from dino_sparo.errors import UserError
from dino_sparo.models import DinoModel, DINOHead, build_encoder
from dino_sparo.options import PretrainOptions
from dino_sparo.training import setup
from dino_sparo.training.checkpoint import load_latest
from dino_sparo.training.pretrain import pretrain
from dino_sparo.training.rundir import config_of
from dino_sparo.training.setup import start_state
from dino_sparo.training.state import build_state
from tests.test_official import full_checkpoint, prefixed
from tests.tiny import state_hash, tiny_arguments, tiny_options, write_pictures

CPU = torch.device("cpu")
ARCH = {"width": 16, "depth": 3, "num_heads": 2}
HEAD = {"num_prototypes": 16, "hidden_dim": 8, "bottleneck_dim": 4}
SPARO = {"readout": "sparo", "num_slots": 2, "slot_dim": 4, "key_dim": 4}
CLS = ("--model.readout.name=cls", *(f"--model.readout.{k}=null" for k in [*SPARO][1:]), "--model.readout.group_size=null")  # fmt: skip


def network(seed: int, image_size: int = 16, head: dict | None = None, **changes) -> DinoModel:
    """A network whose every parameter is random, so that no bias is zero nor any norm one."""
    torch.manual_seed(seed)
    encoder = build_encoder(**({"arch": ARCH, "patch_size": 8, "image_size": image_size, **SPARO} | changes))
    model = DinoModel(encoder, DINOHead(encoder.embed_dim, **(HEAD | (head or {}))))
    for parameter in model.parameters():
        if parameter.requires_grad:  # the fixed lengths stay 1
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def plain(seed: int = 1, **changes) -> DinoModel:
    return network(seed, readout="cls", num_slots=None, **changes)


def options_of(tmp_path, init, *arguments: str) -> PretrainOptions:
    given = tiny_arguments(tmp_path / "data", tmp_path / "run", init=init)
    return parse_options(PretrainOptions, [*given, *arguments], usage="")


def started(options: PretrainOptions):
    """A fresh state with its starting weights, and what is said about them."""
    state = build_state(config_of(options), CPU)
    return state, start_state(state, options)


def official(model: DinoModel, *, old_names: bool) -> dict[str, torch.Tensor]:
    """One network by official names: `backbone.X`, `readout.Y`, `head.Z`."""
    state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    if old_names:
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
            state[f"head.last_layer.{old}"] = state.pop(f"head.last_layer.parametrizations.weight.{new}")
    return state


def equal(one: DinoModel, other: DinoModel) -> bool:
    crops = [torch.randn(2, 3, 3, 16, 16), torch.randn(2, 3, 3, 8, 8)]
    with torch.no_grad():
        return all(torch.equal(a, b) for a, b in zip(one.eval()(crops), other.eval()(crops), strict=True))
