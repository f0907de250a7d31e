"""Descriptions of models without weights, files that only claim to hold them, and how they are refused."""

import json
import struct
from pathlib import Path

import pytest
import torch

import fastgrpo.models
from fastgrpo.models.check import describe
from fastgrpo.models.configs import Description
from fastgrpo.models.single_file import places
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError

PARTS = ("unet", "vae", "text_encoder")


def assert_equal(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def bundled(kind):
    """The full-size components that the bundled configs describe, on the meta device."""
    folder = Path(fastgrpo.models.__file__).parent / kind
    configs = {part: json.loads((folder / part / "config.json").read_text()) for part in PARTS}
    return Description(**configs, scheduler={}, tokenizer=None).empty_components()


def original_shapes(components):
    """Key -> shape of the single file that holds these components, from the definition of the layout."""
    shapes = {}
    for part, names in places(**components).items():
        for name, tensor in components[part].state_dict().items():
            place, shape = names[name], tuple(tensor.shape)
            if place.third is not None:
                shape = (3 * shape[0], *shape[1:])
            shapes[place.key] = (*shape, 1, 1) if place.pointwise else shape
    return shapes


def write_header(path, shapes, metadata=None):
    """A safetensors file with tensors of these shapes and no contents: its bytes are a hole in the file."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + end)
    return path


def refusal(**fields):
    """The sentence with which `describe` refuses."""
    with pytest.raises(ConfigError) as caught:
        describe(ModelConfig(**fields))
    message = str(caught.value)
    assert "\n" not in message
    return message


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 4265380512\n" % (b"0" * 64)


NOT_WEIGHTS = {
    b"": "an empty file",
    POINTER: "the Git LFS pointer to a file of 4,265,380,512 bytes",
    b"\n<!DOCTYPE html><html><head>": "a web page, not weights",
    b"<html>not found</html>": "a web page, not weights",
    b'{"error":"Access to model is restricted"}': "a text in JSON, not weights",
    b"\x1f\x8b\x08\x00": "an archive (gzip)",
}


def change(folder, file, **changes):
    """Keys of one of its JSON files; None removes one."""
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
