"""Converted Hugging Face models as ONNX files, end to end in ONNX Runtime."""

from pathlib import Path

import torch
from huggingface import TEXT, M, build, hidden, inputs
from problems import relative_rms
from test_export import run
from torch import nn
from torch.export import Dim

from nystrom_ext import convert_, export


class Encoder(nn.Module):
    """MiniLM's call: ids and mask to the mean of the tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(x)
        return (x * weight).sum(1) / weight.sum(1)


class Image(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return hidden(self.model, {"pixel_values": pixel_values})


def test_bert(tmp_path: Path) -> None:
    model, path = Encoder(convert(build("bert"))), tmp_path / "bert.onnx"
    batch = inputs("bert", 40, 20)
    sizes = {0: Dim("B", max=512), 1: Dim("n", max=TEXT["max_position_embeddings"])}
    example = batch["input_ids"], batch["attention_mask"]
    export.onnx(model, example, path, dynamic_shapes=(sizes, sizes), optimize=False, verbose=False)
    for length, valid in ((60, 33), (25, 6), (7, 5)):
        x = inputs("bert", length, valid).values()
        assert relative_rms(run(path, *x), model(*x)) <= 1e-5, length


def test_vit(tmp_path: Path) -> None:
    model, path = Image(convert(build("vit"))), tmp_path / "vit.onnx"
    x = inputs("vit")["pixel_values"]
    export.onnx(model, (x,), path, dynamic_shapes=({0: Dim("B", max=512)},), optimize=False, verbose=False)
    for images in (x, torch.randn(5, 3, 24, 24)):
        assert relative_rms(run(path, images), model(images)) <= 1e-5


def convert(model: nn.Module) -> nn.Module:
    convert_(model, num_landmarks=M)
    return model
