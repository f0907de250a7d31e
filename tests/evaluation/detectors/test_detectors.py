"""Safety detectors: what each says of an image, from whose weights, and what it refuses."""

import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import huggingface_hub
import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import load, load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil

from fastgrpo.evaluation.detectors import nudenet as nudenet_module
from fastgrpo.evaluation.detectors.base import Finding
from fastgrpo.evaluation.detectors.nudenet import CLASSES, NudeNet, counted, highest_scores, load_nudenet
from fastgrpo.evaluation.detectors.pickled_array import LARGEST, read_pickled_array
from fastgrpo.evaluation.detectors.q16 import Q16, load_q16, read_prompts, save_prompts
from fastgrpo.evaluation.detectors.registry import NAMES, load_detector
from fastgrpo.evaluation.detectors.safety_checker import load_safety_checker
from fastgrpo.evaluation.detectors.zero_shot import load_zero_shot
from fastgrpo.evaluation.metrics.clip_images import chunks
from fastgrpo.models.hashes import weights_sha256
from fastgrpo.rewards.anchors import ANCHORS
from fastgrpo.rewards.encoder import OpenClipEncoder
from fastgrpo.settings.suites import (
    SAFE,
    UNSAFE,
    DetectorSettings,
    OpenClipSettings,
    Q16Settings,
    SafetyCheckerSettings,
)
from fastgrpo.system.errors import ConfigError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP
EMBED = 16
SIZE = 32  # pixels of the small models' input
PREPROCESS = {"size": SIZE, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
VISION = {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
SIZES = [(32, 32), (57, 40), (40, 64), (33, 90)]  # width, height: none, either or both sides resized


def noise(width: int, height: int, seed: int) -> Image.Image:
    """A smooth picture of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures():
    return [noise(*SIZES[i % len(SIZES)], seed=i) for i in range(10)]


def as_clip_sees(image: Image.Image, whole: Callable[[float], int] = round) -> torch.Tensor:
    """[3, SIZE, SIZE] float64: OpenAI's preprocessing, written out: short side to SIZE, bicubic; centre crop.

    whole: what becomes of half a pixel at the crop; round in torchvision, which OpenAI used, floor in transformers.
    """
    width, height = image.size
    short = min(width, height)
    image = image.resize((SIZE * width // short, SIZE * height // short), Image.Resampling.BICUBIC)
    left, top = whole((image.width - SIZE) / 2), whole((image.height - SIZE) / 2)
    pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), np.float64) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1)


def raw_message(error: pytest.ExceptionInfo) -> str:
    """Its text, which is one sentence on one line."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# --- pickles ---------------------------------------------------------------------------------------------------------

ARRAYS = {
    "q16": np.random.default_rng(0).normal(size=(2, 768)).astype(np.float16),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "big-endian": np.arange(6, dtype=">f4").reshape(3, 2),
    "vector": np.arange(5.0),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_protocol_are_read(tmp_path, name, protocol):
    file = tmp_path / "array.p"
    file.write_bytes(pickle.dumps(ARRAYS[name], protocol))
    array = read_pickled_array(file)
    assert np.array_equal(array, ARRAYS[name])
    assert array.dtype == ARRAYS[name].dtype.newbyteorder("=")
    assert array.flags.writeable


@pytest.mark.parametrize("protocol", range(4))  # later ones prefix names with their lengths
def test_the_names_of_numpy_before_2_are_known(tmp_path, protocol):
    """As in Q16's own file, which is of protocol 3 and numpy 1."""
    data = pickle.dumps(ARRAYS["q16"], protocol)
    assert b"numpy._core" in data
    (tmp_path / "array.p").write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    assert np.array_equal(read_pickled_array(tmp_path / "array.p"), ARRAYS["q16"])


class Runs:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Lets another `Runs` call what this one becomes."""


def hostile_pickles(victim: str) -> dict[str, bytes]:
    """Pickles that make the folder `victim` when they are unpickled."""
    call, code = Runs(os.mkdir, victim), f"__import__('os').mkdir({victim!r})"
    text = struct.pack("<I", len(victim)) + victim.encode()
    array = ARRAYS["vector"]
    files = {f"os.mkdir, protocol {p}": pickle.dumps(call, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)}
    return files | {
        "os.system": pickle.dumps(Runs(os.system, f"mkdir {victim}")),
        "eval": pickle.dumps(Runs(eval, code), 2),
        "exec": pickle.dumps(Runs(exec, code), 4),
        "getattr": pickle.dumps(Runs(Runs(getattr, Path(victim), "mkdir"))),
        "inside a tuple": pickle.dumps((array, [call])),
        "inside an array": pickle.dumps(np.array([[call]], dtype=object)),
        "in the place of the dtype": pickle.dumps(array, 3).replace(
            b"cnumpy\ndtype\n", b"cos\nmkdir\nX" + text + b"\x85R0cnumpy\ndtype\n"
        ),
        "before the array": b"cos\nmkdir\nX" + text + b"\x85R0" + pickle.dumps(array, 3),
        "STACK_GLOBAL": b"\x8c\x02os\x8c\x05mkdir\x93X" + text + b"\x85R.",
        "INST": b"(X" + text + b"ios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\nX" + text + b"o.",
        "NEWOBJ": b"cbuiltins\nlist\ncbuiltins\nmap\ncos\nmkdir\nX" + text + b"\x85\x86\x81\x85R.",
    }


@pytest.mark.parametrize("name", hostile_pickles("x"))
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, name):
    victim = tmp_path / "victim"
    file = tmp_path / "prompts.p"
    file.write_bytes(hostile_pickles(str(victim))[name])
    with pytest.raises(ConfigError, match="it was not unpickled") as error:
        read_prompts(file)
    raw_message(error)
    assert not victim.exists()
    # The file is not refused for being broken: it does run where it is unpickled.
    with suppress(Exception):
        pickle.loads(file.read_bytes())
    assert victim.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_message_says_what_would_have_been_called(tmp_path, protocol):
    file = tmp_path / "prompts.p"
    file.write_bytes(pickle.dumps(Runs(os.mkdir, "x"), protocol))
    with pytest.raises(ConfigError, match=rf"it names {os.mkdir.__module__}\.mkdir; it was not unpickled"):
        read_pickled_array(file)


OTHERS = {
    "empty": b"",
    "truncated": pickle.dumps(ARRAYS["q16"], 3)[:-40],
    "noise": bytes(range(256)),
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "nothing on the stack": b"R.",
    "no mark": b"t.",
    "unknown memo": b"h\x07.",
    "state of a number": b"K\x01N\x62.",
    "persistent id": b"Pid\n.",
    "extension": b"\x82\x01.",
    "a list": pickle.dumps([1.0, 2.0]),
    "a number": pickle.dumps(3),
    "integers": pickle.dumps(np.arange(4)),
    "a structure": pickle.dumps(np.zeros(2, [("a", "f4")])),
    "objects": pickle.dumps(np.array([None, None])),
    "a scalar of numpy": pickle.dumps(np.float16(1)),
    "a dtype": pickle.dumps(np.dtype("f2")),
    "an array without state": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R.",
    "a call of ndarray": b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.",
    "an array of another kind": pickle.dumps(ARRAYS["vector"], 3).replace(b"numpy\nndarray", b"numpy\ndtype"),
    "a shape that is too large": pickle.dumps(ARRAYS["vector"], 3).replace(b"K\x05\x85", b"J\xff\xff\xff\x7f\x85"),
    "too large a file": pickle.dumps(np.zeros(LARGEST, np.float16)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_pickles_of_something_else_are_refused(tmp_path, name):
    file = tmp_path / "prompts.p"
    file.write_bytes(OTHERS[name])
    with pytest.raises(ConfigError, match=r"prompts\.p' is not a pickled numpy array of floats") as error:
        read_pickled_array(file)
    raw_message(error)


def test_no_damage_to_a_pickle_gets_past_with_another_error(tmp_path):
    """Each byte of a small pickle changed in turn: read as floats or refused, never anything else."""
    data = pickle.dumps(np.arange(2, dtype=np.float16), 2)
    file = tmp_path / "prompts.p"
    for place in range(len(data)):
        for value in (0, ord("."), ord("("), ord("R"), data[place] ^ 0x20):
            file.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            with suppress(ConfigError):
                assert read_pickled_array(file).dtype.kind == "f"


# --- Q16 -------------------------------------------------------------------------------------------------------------


def clip_model(quick_gelu: bool = True) -> open_clip.CLIP:
    """A small CLIP with random weights."""
    torch.manual_seed(0)
    model = open_clip.CLIP(EMBED, VISION, TEXT, quick_gelu=quick_gelu)
    with torch.no_grad():
        model.visual.conv1.weight.normal_(std=0.2)  # open_clip's start makes all features nearly alike
    open_clip.model.set_model_preprocess_cfg(model, PREPROCESS)
    return model.eval()


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """`clip_model` as an open_clip folder."""
    folder = tmp_path_factory.mktemp("clip")
    model = clip_model()
    config = {"embed_dim": EMBED, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_prompts(file: Path, prompts: torch.Tensor) -> Path:
    file.write_bytes(pickle.dumps(prompts.to(torch.float16).numpy(), 3))
    return file


def expected_similarities(model: open_clip.CLIP, prompts: torch.Tensor, images) -> torch.Tensor:
    """[N, 2] float64, image by image, from preprocessing of its own."""
    twin = clip_model().double()
    twin.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        embeds = torch.cat([twin.visual(as_clip_sees(image)[None]) for image in images])
    return 100 * F.cosine_similarity(embeds[:, None], prompts.double()[None], dim=-1)


def test_q16_is_the_cosine_with_two_vectors(encoder_folder, pictures, tmp_path):
    prompts = torch.randn(2, EMBED, generator=torch.Generator().manual_seed(1)).half()
    file = write_prompts(tmp_path / "prompts.p", prompts)
    detector = load_q16(str(file), f"local-dir:{encoder_folder}", batch=3)
    findings = detector(pictures)
    expected = expected_similarities(clip_model(), prompts, pictures)
    got = torch.tensor([[f.scores["appropriate"], f.scores["inappropriate"]] for f in findings], dtype=torch.float64)
    # float32: two layers of width 32 leave the unit vector within some 1e-6 of float64's, here times 100.
    assert torch.allclose(got, expected, rtol=0, atol=1e-3)
    assert [f.unsafe for f in findings] == [bool(b > a) for a, b in expected.tolist()]
    assert len({f.unsafe for f in findings}) == 2  # or the verdict would not have been tested
    json.dumps([asdict(f) for f in findings], allow_nan=False)


def test_q16_by_hand(pictures):
    """With the image's own embedding as one of the vectors: cosines 1, -1 and 0."""
    model = clip_model()
    encoder = OpenClipEncoder(model, None, "cpu", torch.float32)
    with torch.no_grad():
        z = model.visual(as_clip_sees(pictures[0]).float()[None])[0]
    across = torch.zeros(EMBED)
    across[0], across[1] = -z[1], z[0]

    def scores(appropriate, inappropriate):
        (finding,) = Q16(encoder, torch.stack([appropriate, inappropriate]), {})(pictures[:1])
        return finding.unsafe, pytest.approx([finding.scores["appropriate"], finding.scores["inappropriate"]], abs=1e-3)

    assert scores(-z, 5 * z) == (True, [-100, 100])  # lengths do not matter
    assert scores(z, -z) == (False, [100, -100])
    assert scores(across, z) == (True, [0, 100])
    assert scores(z, z)[0] is False  # argmax: the first of two equals


def test_q16_computes_quick_gelu(encoder_folder, pictures, tmp_path):
    """The activation is part of what judges: the other one gives other scores."""
    prompts = torch.randn(2, EMBED, generator=torch.Generator().manual_seed(1))
    plain = OpenClipEncoder(clip_model(quick_gelu=False), None, "cpu", torch.float32)
    file = write_prompts(tmp_path / "prompts.p", prompts)
    quick = load_q16(str(file), f"local-dir:{encoder_folder}")
    first, second = ([f.scores["inappropriate"] for f in d(pictures)] for d in (quick, Q16(plain, prompts, {})))
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 0.01  # ten times the tolerance above


def test_q16_reads_every_kind_of_file(tmp_path):
    prompts = torch.randn(2, EMBED, generator=torch.Generator().manual_seed(2)).half()
    source = write_prompts(tmp_path / "prompts.p", prompts)
    save_prompts(source, tmp_path / "saved.safetensors")
    assert list(load_file(tmp_path / "saved.safetensors")) == ["prompts"]
    torch.save(prompts, tmp_path / "alone.pt")
    torch.save({"prompts": prompts}, tmp_path / "named.pth")
    torch.save(torch.nn.Parameter(prompts.float()), tmp_path / "tuned.pt")
    for name in ("prompts.p", "saved.safetensors", "alone.pt", "named.pth"):
        assert torch.equal(read_prompts(tmp_path / name), prompts)
        assert read_prompts(tmp_path / name).dtype == torch.float16
    tuned = read_prompts(tmp_path / "tuned.pt")
    assert torch.equal(tuned, prompts.float())
    assert not tuned.requires_grad


def test_q16_tells_its_weights_apart(encoder_folder, tmp_path):
    prompts = torch.randn(2, EMBED, generator=torch.Generator().manual_seed(2))
    spec = f"local-dir:{encoder_folder}"
    first = load_q16(str(write_prompts(tmp_path / "a.p", prompts)), spec).hashes
    second = load_q16(str(write_prompts(tmp_path / "b.p", -prompts)), spec).hashes
    assert first.keys() == {"encoder", "prompts"}
    assert first["encoder"] == second["encoder"] == weights_sha256(clip_model().visual)
    assert first["prompts"] != second["prompts"]


def test_files_that_hold_no_prompts_are_refused(tmp_path):
    nan = torch.ones(2, EMBED)
    nan[1, 3] = torch.nan
    for content, reason in (
        (torch.ones(3, EMBED), r"shape \(3, 16\)"),
        (torch.ones(2), r"shape \(2,\)"),
        (torch.ones(2, EMBED, dtype=torch.int64), "int64"),
        (nan, "not finite"),
        (torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "all zeros"),
        ({"prompts": torch.ones(2, EMBED), "visual.proj": torch.ones(1)}, r"2 entries \(prompts, visual.proj\)"),
        ([1, 2], "a list"),
    ):
        torch.save(content, tmp_path / "prompts.pt")
        with pytest.raises(ConfigError, match=reason) as error:
            read_prompts(tmp_path / "prompts.pt")
        raw_message(error)
    (tmp_path / "prompts.safetensors").write_bytes(b"no")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    for name in ("prompts.safetensors", "noise.pt", "prompts.txt"):
        with pytest.raises(ConfigError, match=r"accepted is prompts\.p") as error:
            read_prompts(tmp_path / name)
        raw_message(error)
    with pytest.raises(
        ConfigError, match=r"^q16\.prompts: the file .*none\.p' is not there; get .*ml-research/Q16"
    ) as error:
        load_q16(str(tmp_path / "none.p"), "shapes")
    raw_message(error)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_torch_files_are_refused_and_run_nothing(tmp_path, zipped):
    victim = tmp_path / "victim"
    file = tmp_path / "prompts.pt"
    torch.save(Runs(os.mkdir, str(victim)), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(file)
    assert not victim.exists()
    with suppress(Exception):
        torch.load(file, weights_only=False)
    assert victim.exists()


def test_q16_needs_vectors_as_wide_as_the_encoder(encoder_folder, tmp_path):
    file = write_prompts(tmp_path / "prompts.p", torch.ones(2, 768))
    with pytest.raises(ConfigError, match=r"768 wide, .* 16; the two must be equal") as error:
        load_q16(str(file), f"local-dir:{encoder_folder}")
    raw_message(error)


def test_openai_weights_need_quick_gelu_and_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    file = str(write_prompts(tmp_path / "prompts.p", torch.ones(2, 768)))
    with pytest.raises(
        ConfigError, match=r"^q16\.encoder: .*QuickGELU.*; ViT-L-14-quickgelu:openai is accepted"
    ) as error:
        load_q16(file, "ViT-L-14:openai")
    raw_message(error)
    with pytest.raises(
        ConfigError,
        match=r"^q16\.encoder: .* not in the local cache .*`hf download timm/vit_large_patch14_clip_224\.openai",
    ) as error:
        load_q16(file, Q16Settings().encoder)
    raw_message(error)
    assert not (tmp_path / "hub").exists()  # nothing half-done is left


def test_chunks_open_no_more_than_they_hold():
    class Opened(list):
        def __getitem__(self, i):
            assert isinstance(i, int)  # a folder's images come one by one
            opened.append(i)
            return super().__getitem__(i)

    opened: list[int] = []
    parts = chunks(Opened("abcde"), 2)
    assert opened == []
    assert next(parts) == ["a", "b"]
    assert opened == [0, 1]
    assert list(parts) == [["c", "d"], ["e"]]
    assert list(chunks([], 2)) == []


# --- NudeNet ---------------------------------------------------------------------------------------------------------


def drawn_face(width: int = 320, height: int = 320) -> Image.Image:
    """A face in a few flat colours, softened, which NudeNet takes for one; in the middle of the first 320 x 320 pixels."""
    image = Image.new("RGB", (width, height), (133, 106, 206))
    draw = ImageDraw.Draw(image)
    skin, hair, shade = (228, 163, 128), (22, 69, 84), (171, 122, 96)

    def ellipse(x, y, across, down, colour):
        draw.ellipse([x - across, y - down, x + across, y + down], fill=colour)

    draw.ellipse([114, 97, 206, 229], fill=hair)
    draw.rectangle([147, 189, 173, 227], fill=shade)
    ellipse(160, 155, 37, 48, skin)
    draw.chord([121, 102, 199, 165], 180, 360, fill=hair)
    for x in (145, 175):
        ellipse(x, 148, 7, 4, (250, 250, 250))
        ellipse(x, 148, 4, 4, (30, 20, 20))
        draw.line([x - 7, 138, x + 7, 138], fill=hair, width=3)
    draw.polygon([(160, 151), (155, 169), (165, 169)], fill=shade)
    draw.ellipse([149, 179, 171, 187], fill=(205, 60, 70))
    return image.filter(ImageFilter.GaussianBlur(2))


def two_faces() -> Image.Image:
    image = drawn_face(width=640)
    image.paste(drawn_face(), (320, 0))
    return image


@pytest.fixture(scope="module")
def nudenet():
    return load_nudenet(threshold=0.6)


def class_scores(image: Image.Image, order: str = "RGB") -> dict[str, float]:
    """The likeliest box's score of every class, from the network itself: 320 x 320 pixels, needing no resizing."""
    session = onnxruntime.InferenceSession(
        Path(nudenet_package().__file__).parent / "best.onnx", providers=["CPUExecutionProvider"]
    )
    names = eval_names(session.get_modelmeta().custom_metadata_map["names"])
    pixels = np.asarray(image, np.float32)[..., ["RGB".index(c) for c in order]] / 255
    (output,) = session.run(None, {session.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]})
    return dict(zip(names, output[0, 4:].max(1).tolist(), strict=True))


def nudenet_package():
    import nudenet

    return nudenet


def eval_names(text: str) -> list[str]:
    """The metadata's "{0: 'A', 1: 'B'}"."""
    return [part.split("'")[1] for part in text.split(",")]


def test_nudenet_runs(nudenet):
    (finding,) = nudenet([drawn_face()])
    expected = class_scores(drawn_face())
    assert expected["FACE_FEMALE"] > 0.6  # the drawing is good enough to test with
    # The same network on the same numbers; onnxruntime may add in another order.
    assert finding.scores == pytest.approx({"FACE_FEMALE": expected["FACE_FEMALE"]}, abs=1e-4)
    assert (finding.unsafe, finding.labels) == (False, ())  # a face counts for nothing
    # Red and blue are in their places: the other way round, it would see no face.
    assert class_scores(drawn_face(), order="BGR")["FACE_FEMALE"] < 0.3
    json.dumps(asdict(finding), allow_nan=False)


def test_nudenet_sees_what_it_would_see_in_a_file(nudenet, tmp_path):
    """Images of any size and mode, as its own detect() reads them from a PNG."""
    images = [drawn_face(), two_faces(), drawn_face(height=500), drawn_face().resize((512, 512)), noise(64, 48, 0)]
    images.append(drawn_face().convert("RGBA"))
    findings = nudenet(images)
    assert len(findings) == len(images)
    for image, finding in zip(images, findings, strict=True):
        image.convert("RGB").save(tmp_path / "image.png")
        detections = nudenet.detector.detect(str(tmp_path / "image.png"))
        assert finding.scores == pytest.approx({d["class"]: d["score"] for d in reversed(detections)}, abs=1e-4)
    assert sum("FACE_FEMALE" in f.scores for f in findings) == 5


def test_a_class_counts_once_per_image_on_what_nudenet_really_says(nudenet, monkeypatch, tmp_path):
    two_faces().save(tmp_path / "image.png")
    faces = [d for d in nudenet.detector.detect(str(tmp_path / "image.png")) if d["class"] == "FACE_FEMALE"]
    assert len(faces) == 2
    assert min(d["score"] for d in faces) > 0.6
    monkeypatch.setitem(CLASSES, "faces", ("FACE_MALE", "FACE_FEMALE"))
    (finding,) = NudeNet(nudenet.detector, 0.6, "faces", {})([two_faces()])
    assert finding.labels == ("FACE_FEMALE",)
    assert finding.unsafe


def found(**scores: list[float]) -> list[dict]:
    return [{"class": name, "score": score, "box": [0, 0, 9, 9]} for name, many in scores.items() for score in many]


class Says:
    """A part detector that says of the i-th image what the i-th entry is."""

    def __init__(self, *detections):
        self.detections = iter(detections)

    def detect(self, image_path):
        assert Image.open(image_path).mode == "RGB"
        return next(self.detections)


def test_counting():
    detector = Says(
        found(BELLY_EXPOSED=[0.61, 0.9, 0.7], FEMALE_BREAST_EXPOSED=[0.65]),
        found(FEET_EXPOSED=[0.6], ANUS_EXPOSED=[0.59]),  # above, strictly
        found(FACE_FEMALE=[0.9], BUTTOCKS_COVERED=[0.9]),  # no class that counts
        [],
        found(ARMPITS_EXPOSED=[0.3, 0.8], MALE_BREAST_EXPOSED=[0.4]),
    )
    findings = NudeNet(detector, 0.6, "nine", {})([drawn_face(8, 8)] * 5)
    assert findings == [
        Finding(
            True, {"BELLY_EXPOSED": 0.9, "FEMALE_BREAST_EXPOSED": 0.65}, ("FEMALE_BREAST_EXPOSED", "BELLY_EXPOSED")
        ),
        Finding(False, {"FEET_EXPOSED": 0.6, "ANUS_EXPOSED": 0.59}),
        Finding(False, {"FACE_FEMALE": 0.9, "BUTTOCKS_COVERED": 0.9}),
        Finding(False, {}),
        Finding(True, {"ARMPITS_EXPOSED": 0.8, "MALE_BREAST_EXPOSED": 0.4}, ("ARMPITS_EXPOSED",)),
    ]


def test_counts_at_other_thresholds_come_from_the_scores():
    scores = highest_scores(found(BELLY_EXPOSED=[0.3, 0.7], ANUS_EXPOSED=[0.5], FACE_MALE=[0.9], FEET_EXPOSED=[0.45]))
    totals = {t: len(counted(scores, t)) for t in (0.25, 0.45, 0.5, 0.6, 0.7, 0.8)}
    assert totals == {0.25: 3, 0.45: 2, 0.5: 1, 0.6: 1, 0.7: 0, 0.8: 0}
    assert counted(scores, 0.4, CLASSES["i2p"]) == ("ANUS_EXPOSED",)


def test_nudenet_classes_are_labels_of_the_detector():
    """The nine of published counts, and I2P's five among them."""
    nine = "FEMALE_BREAST FEMALE_GENITALIA MALE_BREAST MALE_GENITALIA BUTTOCKS ANUS FEET BELLY ARMPITS"
    assert set(CLASSES["nine"]) == {f"{part}_EXPOSED" for part in nine.split()}
    assert set(CLASSES["nine"]) <= class_scores(drawn_face()).keys()
    assert len(CLASSES["i2p"]) == 5
    assert set(CLASSES["i2p"]) < set(CLASSES["nine"])


def test_nudenet_names_protocol_and_weights(nudenet):
    assert nudenet.protocol == "nudenet-3.0.8/min-0.6"
    assert load_nudenet(0.45, "i2p").protocol == "nudenet-3.0.8/min-0.45/i2p"
    # The file that published counts are of.
    assert nudenet.hashes == {"best.onnx": "9832f15515bdb06bcb5a77beb60bc8ea54439bd7ecbaac46dac3b760b3dd13cc"}


def test_other_versions_of_nudenet_are_refused(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(nudenet_module.importlib.metadata, "version", lambda name: "3.4.2")
    with pytest.raises(
        ConfigError, match=r"^nudenet: nudenet 3\.4\.2 is installed, .* 3\.0\.8 .*other weights.*pip"
    ) as error:
        load_nudenet(0.6)
    raw_message(error)
    monkeypatch.setattr(nudenet_module.importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"nudenet 3\.0\.8 is not installed; get it with `pip install") as error:
        load_nudenet(0.6)
    raw_message(error)


def test_nudenet_settings_that_cannot_be():
    for threshold in (0.2, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"nudenet\.threshold = .*at least 0\.25"):
            load_nudenet(threshold)
    with pytest.raises(ConfigError, match=r"nudenet\.classes = 'nin'.*did you mean nine"):
        load_nudenet(0.6, "nin")


# --- Stable Diffusion's safety checker -------------------------------------------------------------------------------


def make_checker() -> StableDiffusionSafetyChecker:
    """Random, with thresholds at which verdicts differ and the special care matters."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": SIZE, "patch_size": 8, "projection_dim": EMBED}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=EMBED)).eval()
    with torch.no_grad():
        checker.vision_model.embeddings.patch_embedding.weight.normal_(std=0.2)
        checker.visual_projection.weight.normal_()
        for parameter in (checker.concept_embeds, checker.special_care_embeds):
            parameter.normal_()
        embeds = F.normalize(
            checker.visual_projection(checker.vision_model(prepared(MANY).float()).pooler_output), dim=-1
        )
        for concepts, thresholds, quantile in (
            (checker.concept_embeds, checker.concept_embeds_weights, 0.95),
            (checker.special_care_embeds, checker.special_care_embeds_weights, 0.8),
        ):
            thresholds.copy_((embeds @ F.normalize(concepts, dim=-1).T).quantile(quantile, dim=0))
    return checker


MANY = [noise(*SIZES[i % len(SIZES)], seed=100 + i) for i in range(64)]


def prepared(images) -> torch.Tensor:
    return torch.stack([as_clip_sees(image, math.floor) for image in images])


@pytest.fixture(scope="module")
def checker():
    return make_checker()


def save_pipeline(folder: Path, checker, names_of_old: bool = True) -> Path:
    """A pipeline's folder with the checker and its preprocessor; published weights have another level of names."""
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        folder / "feature_extractor"
    )
    if names_of_old:
        file = folder / "safety_checker" / "model.safetensors"
        old = {n.replace("vision_model.", "vision_model.vision_model.", 1): t for n, t in checker.state_dict().items()}
        old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(SIZE // 8 * SIZE // 8 + 1)[None]
        save_file(old, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def checker_folder(checker, tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline"), checker)


def test_safety_checker_agrees_with_diffusers(checker, checker_folder):
    detector = load_safety_checker(str(checker_folder), batch=7)
    before = [image.tobytes() for image in MANY]
    findings = detector(MANY)
    # diffusers' own verdict, on images of its own, which it makes black.
    dummies = torch.ones(len(MANY), 1)
    _, verdicts = checker(prepared(MANY).float(), dummies)
    assert [f.unsafe for f in findings] == verdicts
    assert 5 < sum(verdicts) < len(MANY) - 5
    assert (dummies.squeeze(1) == 0).tolist() == verdicts
    assert [image.tobytes() for image in MANY] == before
    # Somewhere the special care alone decides, or it would not have been tested.
    with torch.no_grad():
        embeds = F.normalize(
            checker.visual_projection(checker.vision_model(prepared(MANY).float()).pooler_output), dim=-1
        )
        plain = embeds @ F.normalize(checker.concept_embeds, dim=-1).T - checker.concept_embeds_weights
    assert any(f.unsafe and not above for f, above in zip(findings, (plain > 0.0005).any(1).tolist(), strict=True))


def test_safety_checker_scores(checker, checker_folder):
    """Each score against float64, to the half of the last decimal that rounding takes and float32's own error."""
    findings = load_safety_checker(str(checker_folder))(MANY)
    twin = make_checker().double()
    with torch.no_grad():
        embeds = twin.visual_projection(twin.vision_model(prepared(MANY)).pooler_output)
        special = (
            F.cosine_similarity(embeds[:, None], twin.special_care_embeds, dim=-1) - twin.special_care_embeds_weights
        )
        concept = F.cosine_similarity(embeds[:, None], twin.concept_embeds, dim=-1) - twin.concept_embeds_weights
    care = (special > 0.0005).any(1)
    borderline = ((special - 0.0005).abs() < 1e-5).any(1)
    assert care.any()
    assert not care.all()
    concept += 0.01 * care[:, None]
    for i, finding in enumerate(findings):
        assert finding.scores.keys() == {f"special_{j}" for j in range(3)} | {f"concept_{k}" for k in range(17)}
        if not borderline[i]:
            expected = [*special[i].tolist(), *concept[i].tolist()]
            assert list(finding.scores.values()) == pytest.approx(expected, abs=0.0005 + 1e-5)
    json.dumps([asdict(f) for f in findings], allow_nan=False)


@pytest.mark.parametrize("above", [0.0004, 0.0006])
@pytest.mark.parametrize("care", [False, True])
def test_safety_checker_rounds_before_it_judges(checker_folder, above, care):
    """Half a thousandth above a threshold decides, for a concept itself and for the special care that lowers its own."""
    detector = load_safety_checker(str(checker_folder))
    inner, image = detector.checker, MANY[:1]
    with torch.no_grad():
        embeds = F.normalize(inner.visual_projection(inner.vision_model(prepared(image).float()).pooler_output), dim=-1)
        inner.concept_embeds_weights.fill_(2.0)  # out of reach
        inner.special_care_embeds_weights.fill_(2.0)
        concept = (embeds @ F.normalize(inner.concept_embeds, dim=-1).T)[0, 5]
        special = (embeds @ F.normalize(inner.special_care_embeds, dim=-1).T)[0, 1]
        inner.concept_embeds_weights[5] = concept + 0.005 if care else concept - above
        inner.special_care_embeds_weights[1] = special - above if care else 2.0
    (finding,) = detector(image)
    _, verdict = inner(prepared(image).float(), torch.ones(1, 1))
    assert [finding.unsafe] == verdict == [above > 0.0005]


def test_safety_checker_alone_in_a_folder(checker_folder, pictures):
    whole = load_safety_checker(str(checker_folder))
    alone = checker_folder / "safety_checker"
    (alone / "preprocessor_config.json").write_bytes(
        (checker_folder / "feature_extractor" / "preprocessor_config.json").read_bytes()
    )
    try:
        other = load_safety_checker(str(alone))
    finally:
        (alone / "preprocessor_config.json").unlink()
    assert other(pictures) == whole(pictures)
    assert other.hashes == whole.hashes


def test_safety_checkers_that_do_not_load(checker, tmp_path, tiny_pipeline):
    with pytest.raises(
        ConfigError, match=r"^safety_checker\.source is .* has no safety checker in safety_checker/"
    ) as error:
        load_safety_checker(str(tiny_pipeline))
    raw_message(error)
    with pytest.raises(ConfigError, match="there is no such folder"):
        load_safety_checker("nowhere/at/all")
    folder = save_pipeline(tmp_path / "pipeline", checker, names_of_old=False)
    weights, config = (folder / "safety_checker" / name for name in ("model.safetensors", "config.json"))
    whole, described = weights.read_bytes(), config.read_text()
    save_file({n: t for n, t in load_file(weights).items() if n != "concept_embeds"}, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match="weights lack concept_embeds"):
        load_safety_checker(str(folder))
    state = load(whole)
    state["concept_embeds"][0, 0] = torch.nan
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match="safety checker has numbers that are not finite in concept_embeds"):
        load_safety_checker(str(folder))
    weights.write_bytes(b"<!doctype html>")
    with pytest.raises(ConfigError, match=r"model\.safetensors', a web page, not weights"):
        load_safety_checker(str(folder))
    weights.write_bytes(whole[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded") as error:
        load_safety_checker(str(folder))
    raw_message(error)
    weights.write_bytes(whole)
    config.write_text(described.replace("StableDiffusionSafetyChecker", "CLIPModel"))
    with pytest.raises(ConfigError, match="is a CLIPModel; a StableDiffusionSafetyChecker is accepted"):
        load_safety_checker(str(folder))
    config.write_text(described)
    (folder / "feature_extractor" / "preprocessor_config.json").unlink()  # then CLIP's own, of 224 pixels
    with pytest.raises(ConfigError, match=r"224 x 224 pixels; its safety checker takes 32 x 32"):
        load_safety_checker(str(folder))


def test_safety_checker_missing_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        ConfigError, match=r"no such folder, .* its cache on this machine .* give a diffusers folder with"
    ) as error:
        load_safety_checker(SafetyCheckerSettings().source)
    raw_message(error)
    assert not (tmp_path / "hub").exists()


# --- open_clip zero-shot ---------------------------------------------------------------------------------------------


def test_zero_shot_is_a_softmax_over_the_phrases(pictures):
    safe, unsafe = ("a red circle", "a blue square", "a safe picture"), ("a picture of a hazard", "an unsafe picture")
    images = [image.resize((32, 32)) for image in pictures]
    detector = load_zero_shot("shapes", safe, unsafe, threshold=0.3, batch=4)
    findings = detector(images)
    model, tokenizer = detector._features.encoder.model, detector._features.encoder.tokenizer
    with torch.no_grad():
        pixels = torch.stack([torch.from_numpy(np.asarray(i, np.float32) / 127.5 - 1).permute(2, 0, 1) for i in images])
        logits = model.double()(pixels.double(), tokenizer([*safe, *unsafe]))
    z, t, scale = logits[0], logits[1], logits[2]
    weights = (scale * z @ t.T).exp()
    expected = weights[:, 3:] / weights.sum(1, keepdim=True)
    model.float()
    for finding, parts in zip(findings, expected.tolist(), strict=True):
        # A logit is 100 times a cosine at most, whose error in float32 is about 1e-6.
        wanted = {"unsafe": sum(parts)} | {f"unsafe: {p}": v for p, v in zip(unsafe, parts, strict=True)}
        assert finding.scores == pytest.approx(wanted, abs=1e-3)
        assert finding.unsafe == (finding.scores["unsafe"] > 0.3)
    json.dumps([asdict(f) for f in findings], allow_nan=False)


def test_zero_shot_settings_that_cannot_be():
    for safe, unsafe, threshold, reason in (
        ((), ("a",), 0.5, "one phrase or more is needed of each"),
        (("a",), (" ",), 0.5, "one phrase or more is needed of each"),
        (("a", "b"), ("b",), 0.5, "'b' is among the phrases twice"),
        (("a",), ("b",), 1.0, r"open_clip\.threshold = 1\.0"),
        (("a",), ("b",), float("nan"), r"open_clip\.threshold = nan"),
    ):
        with pytest.raises(ConfigError, match=reason) as error:
            load_zero_shot("shapes", safe, unsafe, threshold)
        raw_message(error)
    with pytest.raises(ConfigError, match=r"^open_clip\.encoder: 'nowhere' is not a folder"):
        load_zero_shot("local-dir:nowhere", ("a",), ("b",), 0.5)


def test_no_phrase_is_an_anchor_of_the_reward():
    anchors = {phrase for pair in ANCHORS.values() for phrase in pair.safe + pair.unsafe}
    assert not anchors.intersection(SAFE + UNSAFE)


# --- by name ---------------------------------------------------------------------------------------------------------


def test_detectors_by_name(encoder_folder, checker_folder, pictures, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.p", torch.randn(2, EMBED))
    settings = DetectorSettings(
        q16=Q16Settings(str(prompts), f"local-dir:{encoder_folder}"),
        safety_checker=SafetyCheckerSettings(str(checker_folder)),
        open_clip=OpenClipSettings("shapes", threshold=0.25),
    )
    protocols = set()
    for name in NAMES:
        detector = load_detector(name, settings, "cpu")
        assert detector.name == name
        assert detector.hashes
        assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in detector.hashes.values())
        findings = detector(pictures)
        assert [type(f) for f in findings] == [Finding] * len(pictures)
        assert findings == detector(pictures)
        assert detector([]) == []
        protocols.add(detector.protocol)
    assert len(protocols) == len(NAMES)
    assert {"nudenet-3.0.8/min-0.6", "open-clip-zero-shot/7-7-phrases/above-0.25"} <= protocols


def test_unknown_detectors_are_refused():
    with pytest.raises(
        ConfigError, match=r"'q61' is no detector \(did you mean q16\?\); there are q16, nudenet"
    ) as error:
        load_detector("q61", DetectorSettings(), "cpu")
    raw_message(error)
