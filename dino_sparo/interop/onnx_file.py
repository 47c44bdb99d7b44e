"""Export of an encoder to `model.onnx`, which is compared with torch before the file is written.

Input: `images` (B, 3, side, side), float32, normalized, with the encoder's image size and any B. Outputs:
`encoding` (B, embed_dim) and, with slots, `attention` (B, L, N).
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from dino_sparo.errors import UserError
from dino_sparo.files import write_file
from dino_sparo.interop.stored import StoredEncoder
from dino_sparo.models import Encoder

ONNX_FILE = "model.onnx"
OPSET = 18
NEEDED = ("onnx", "onnxscript", "onnxruntime")
BATCH_SIZES = (1, 3)  # of the check; the graph is traced with 2
TOLERANCE = 1e-4


def write_onnx(
    stored: StoredEncoder, folder: Path, *, license: str | None = None, measured: Sequence[str] = ()
) -> tuple[Path, float]:
    """Write `folder/model.onnx`; returns its path and the largest difference from torch.

    Its `metadata_props` are `StoredEncoder.facts(license, measured)`.

    Raises:
        UserError: a package is missing, the file exists, or onnxruntime computes other numbers than torch;
            then no file is written.
        OSError: it cannot be written.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"format onnx needs packages that are not installed; run pip install {' '.join(missing)}"
        )
    path = folder / ONNX_FILE
    if path.exists():
        raise UserError(f"out: {path} already exists; give another folder or remove it")
    model, side = _Outputs(stored.build()).eval(), stored.arguments["image_size"]
    content = to_onnx(model, side, stored.facts(license, measured))
    difference = largest_difference(content, model, side)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{stored.path} as ONNX computes other numbers than torch (they differ by {difference:.1e}, at "
            f"most {TOLERANCE:g} is allowed), so {path} was not written; try other versions of "
            f"{', '.join(NEEDED)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, content)
    return path, difference


@torch.no_grad()
def largest_difference(content: bytes, model: nn.Module, side: int) -> float:
    """Largest difference between onnxruntime and torch, relative to an output's largest number if above 1."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    differences = []
    for batch_size in BATCH_SIZES:
        images = torch.randn(batch_size, 3, side, side, generator=generator)
        for got, expected in zip(session.run(None, {"images": images.numpy()}), model(images), strict=True):
            scale = expected.abs().max().clamp(min=1)
            differences.append(float((torch.from_numpy(got) - expected).abs().max() / scale))
    return float(torch.tensor(differences).max())  # NaN if one of them is


def to_onnx(model: "_Outputs", side: int, properties: Mapping[str, str]) -> bytes:
    """The graph for images of this side, with `properties` as metadata."""
    import onnx

    for name in ("onnxscript", "onnx_ir"):  # which log every step
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about deprecations within torch
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, side, side),),
            dynamo=True,
            input_names=["images"],
            output_names=model.names,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    onnx.helper.set_model_props(graph, dict(properties))
    return graph.SerializeToString()


class _Outputs(nn.Module):
    """The encoding, and the attention of the slots."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = ["encoding", "attention"] if encoder.readout is not None else ["encoding"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens_BND = self.encoder.tokens(images)
        encoding = self.encoder.read(tokens_BND)
        if self.encoder.readout is None:
            return (encoding,)
        return encoding, self.encoder.readout.attention(tokens_BND)
