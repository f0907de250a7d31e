"""Where a command computes and in which precision: the settings `device` and `dtype` as torch's objects."""

import torch

from fastgrpo.system.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def choose_device(setting: str, field: str = "--device") -> torch.device:
    """The device that "auto", "cpu" or "cuda" asks for; "auto" is CUDA where there is such a device.

    field: what the user calls the setting. Raises ConfigError for "cuda" where there is none.
    """
    there = torch.cuda.is_available()
    if setting == "cuda" and not there:
        raise ConfigError.of(field, setting, "there is no CUDA device here; accepted are auto and cpu")
    return torch.device(("cuda" if there else "cpu") if setting == "auto" else setting)


def choose_dtype(setting: str, device: torch.device) -> torch.dtype:
    """What "auto", "fp32", "bf16" or "fp16" asks for; "auto" is bf16 on CUDA and fp32 on a CPU."""
    automatic = "bf16" if device.type == "cuda" else "fp32"
    return DTYPES[automatic if setting == "auto" else setting]


def is_on(setting: str, device: torch.device) -> bool:
    """Whether "on", "off" or "auto" asks for something; "auto" does on CUDA."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")
