"""A trained network as a program that runs without this package: torch.export (``.pt2``) or ONNX (``.onnx``)."""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.files import write_bytes, write_json

__all__ = ["export"]


class Encoder(nn.Module):
    """A network at one repetition time, scaled scan in, reconstruction and latents out."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        self.model, self.t_r = checkpoint.model, checkpoint.t_r

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(x, self.t_r)
        return output.reconstruction, output.latents


def export(checkpoint: Checkpoint, path: str | Path, *, n_timepoints: int | None = None) -> Path:
    """Write the network as a program, and beside it ``PATH.json`` with what goes in: parcels, scaling, t_r.

    The program reads ``x`` (batch, `n_timepoints`, parcel), any batch: scaled scans, finite, none of it hidden. It
    returns the reconstruction and the latents (batch, `n_timepoints`, channel). It holds the field's drive in full,
    batch * time * parcel * channel numbers.

    `path` ends in ``.pt2``, for ``torch.export.load``, or in ``.onnx``, for an ONNX runtime, which needs onnx and
    onnxscript to write: else a ValueError. `n_timepoints` is by default that of a training window.
    """
    path, config = Path(path), checkpoint.model.config
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"path must end in .pt2 or .onnx, got {path.name!r}")
    n = n_timepoints or config.n_timepoints
    x = torch.zeros(2, n, config.n_parcels)
    encoder = Encoder(checkpoint).cpu().float().eval()
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=1 << 16)}}
    content = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporters, about their own future
        _, latents = encoder(x)  # checks and constants that are made once, outside of the program
        program = torch.export.export(encoder, (x,), dynamic_shapes=batch, strict=False)
        if path.suffix == ".pt2":
            torch.export.save(program, content)
        else:
            try:
                import onnx  # noqa: F401
                import onnxscript  # noqa: F401
            except ImportError as error:
                raise ValueError(
                    "an .onnx needs onnx and onnxscript: pip install 'mnemodyn[export]'"
                ) from error
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            names = ["reconstruction", "latents"]
            made: Any = torch.onnx.export(program, dynamo=True, verbose=False, output_names=names)
            content.write(made.model_proto.SerializeToString())
    write_bytes(path, content.getvalue())
    shapes = {
        "reconstruction": ["batch", n, config.n_parcels],
        "latents": ["batch", n, latents.shape[-1]],
    }
    facts = {
        "input": {"x": ["batch", n, config.n_parcels]},
        "output": shapes,
        "t_r": checkpoint.t_r,
    }
    scaling = None if checkpoint.scaling is None else checkpoint.scaling.to_dict()
    write_json(
        path.with_name(f"{path.name}.json"),
        facts | {"parcels": checkpoint.parcels, "scaling": scaling},
    )
    return path
