"""``from_pretrained``, ``save_pretrained`` and ``push_to_hub``; what touches files is :mod:`mnemodyn.hub`."""

import warnings
from pathlib import Path
from typing import Any, Self, cast

with warnings.catch_warnings():
    # Its progress bar asks for ipywidgets in every notebook; the warning would stand on the book's pages.
    warnings.filterwarnings("ignore", message="IProgress not found")
    from huggingface_hub import ModelHubMixin

__all__ = ["Pretrained"]


class Pretrained(ModelHubMixin, library_name="mnemodyn"):
    """The Hugging Face mixin in the project's own format of checkpoints.

    `checkpoint` is what `from_pretrained` found beside the weights: parcels, scaling, repetition time, training.
    """

    checkpoint: Any = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **settings: Any) -> Self:
        """A network from the hub, a folder or a file: `model` of :func:`mnemodyn.hub.from_pretrained`, which see."""
        from mnemodyn.hub import from_pretrained

        checkpoint = from_pretrained(pretrained_model_name_or_path, **settings)
        checkpoint.model.checkpoint = checkpoint
        return cast(Self, checkpoint.model)

    def _save_pretrained(self, save_directory: Path) -> None:
        from mnemodyn.hub import save_network

        save_network(self, save_directory)
