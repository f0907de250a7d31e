"""Q16 is the cosine with two learned vectors; what its files may hold."""

import json
import os
from contextlib import suppress
from dataclasses import asdict

import huggingface_hub
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastgrpo.evaluation.detectors.q16 import Q16, load_q16, read_prompts
from fastgrpo.evaluation.images import files
from fastgrpo.models.hashes import weights_sha256
from fastgrpo.rewards.encoder import OpenClipEncoder
from fastgrpo.settings.suites import (
    Q16Settings,
)
from fastgrpo.system.errors import ConfigError
from support.detectors import EMBED, Runs, as_clip_sees, clip_model, raw_message, write_prompts


def expected_similarities(model: open_clip.CLIP, prompts: torch.Tensor, images) -> torch.Tensor:
    """[N, 2] float64, image by image, from preprocessing of its own."""
    twin = clip_model().double()
    twin.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        embeds = torch.cat([twin.visual(as_clip_sees(image)[None]) for image in images])
    return 100 * F.cosine_similarity(embeds[:, None], prompts.double()[None], dim=-1)


def test_q16_is_the_cosine_with_two_vectors(encoder_folder, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BATCH", 3)
    prompts = torch.randn(2, EMBED, generator=torch.Generator().manual_seed(1)).half()
    file = write_prompts(tmp_path / "prompts.p", prompts)
    detector = load_q16(str(file), f"local-dir:{encoder_folder}")
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
    write_prompts(tmp_path / "prompts.p", prompts)
    save_file({"prompts": prompts}, tmp_path / "saved.safetensors")
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
