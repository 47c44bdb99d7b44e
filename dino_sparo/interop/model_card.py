"""README.md of an exported folder: what the Hugging Face hub shows of a model."""

from collections.abc import Sequence

from dino_sparo.interop.stored import StoredEncoder, architecture, in_words
from dino_sparo.interop.timm_config import is_plain
from dino_sparo.models import Encoder

CARD = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
- timm
- dino
{tags}---
# {name}

Vision transformer for image features, the {which} of a DINO pretraining (arXiv 2104.14294), {readout}.

- ViT: {arch}, patches of {patch_size} pixels, images of {image_size} pixels
- encoding: {encoding}

## Use

`FOLDER` is the folder of this file; from the Hugging Face hub it is `hf-hub:USER/NAME` instead.

```python
import timm
{imports}from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
encoding = model(transform(Image.open("IMAGE").convert("RGB"))[None])  # (1, {length})
```

`dino_sparo.load_encoder("FOLDER")` gives the encoder itself.
"""
SPARO = "with the SPARO read-out (arXiv 2404.15721)"
READOUTS = {
    "sparo": SPARO,
    "cls": "read out by its CLS token",
    "gap": "read out by the mean of its patch tokens",
    "pooler": "read out by an attentional pooler (arXiv 2205.01917)",
    "bottleneck": "read out by two linear layers on its CLS token",
}


def model_card(stored: StoredEncoder, encoder: Encoder, name: str, measured: Sequence[str] = ()) -> str:
    """The text of the card.

    Args:
        encoder: built of `stored`.
        name: of the model.
        measured: results, one line each.
    """
    registered = "import dino_sparo.interop.timm_models  # registers the model with timm\n"
    text = CARD.format(
        tags="- sparo\n" if encoder.readout_name == "sparo" else "",
        name=name,
        which=stored.which,
        readout=READOUTS[encoder.readout_name],
        arch=in_words(architecture(stored.arguments["arch"])),
        patch_size=stored.arguments["patch_size"],
        image_size=stored.arguments["image_size"],
        encoding=_encoding(encoder),
        length=encoder.embed_dim,
        imports="" if is_plain(stored.arguments) else registered,
    )
    return text + ("\n## Measured\n\n" + "".join(f"- {line}\n" for line in measured) if measured else "")


def _encoding(encoder: Encoder) -> str:
    if not encoder.num_slots:
        return f"{encoder.embed_dim} numbers"
    width = encoder.embed_dim // encoder.num_slots
    return f"{encoder.embed_dim} numbers, {encoder.num_slots} slots of {width} one after the other"
