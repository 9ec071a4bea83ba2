"""The device that tensors live on."""

from __future__ import annotations

import torch

from recsys.errors import SettingsError


def choose(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`; auto takes CUDA where there is one.

    Raises:
        SettingsError: when CUDA is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise SettingsError("device: cuda was asked for, but torch finds no CUDA device; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and available else "cpu")
