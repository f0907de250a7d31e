"""Folders of images: kills, shards, sizes and other protocols; rows from files; judges asked once."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image

from fastgrpo import rollout
from fastgrpo.evaluation.images.files import read_image
from fastgrpo.evaluation.images.folder import (
    Drawing,
    ImageFolder,
    ImageRequest,
    Shard,
    batches,
)
from fastgrpo.evaluation.images.judgements import judgements
from fastgrpo.evaluation.images.painters import DdimPainter, check_sizes, make_painter, make_scheduler, model_hashes
from fastgrpo.evaluation.suites.prompt_table import PromptRow, image_requests, read_rows
from fastgrpo.policy import Policy, load_policy
from fastgrpo.schedule import Schedule, make_schedule
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError
from support.files import content, write_csv

CPU = torch.device("cpu")
STEPS = 2


@pytest.fixture(scope="module")
def policy(tiny_pipeline: Path) -> Policy:
    """Images of 16 x 16 pixels, 2 to a latent's pixel; latents whose sides are even."""
    return load_policy(ModelConfig(path=str(tiny_pipeline)), CPU, torch.float32)


@pytest.fixture(scope="module")
def schedule(policy: Policy) -> Schedule:
    return make_schedule(policy.scheduler_config, STEPS, 1.0, CPU)


@pytest.fixture
def drawing(policy: Policy) -> Drawing:
    return Drawing("tiny", model_hashes(policy), STEPS, 1.0, "fp32", batch=4)


# Two sizes and two guidances, mixed, so that batches are not runs of rows.
ROWS = tuple(
    ImageRequest(
        f"{i:03d}",
        f"p{i // 2}",
        "a cat" if i % 2 else "a dog",
        100 + i,
        (2.0, 5.0)[i % 2],
        *((16, 16), (24, 16))[i % 3 == 0],
    )
    for i in range(11)
)


WHOLE = Shard()


def drawn(
    path: Path, drawing: Drawing, policy: Policy, schedule: Schedule, rows=ROWS, shard: Shard = WHOLE
) -> ImageFolder:
    folder = ImageFolder(path, drawing, rows)
    folder.claim()
    folder.draw(make_painter(policy, "ddim", schedule, 4), shard)
    return folder


@pytest.fixture
def whole(tmp_path: Path, drawing: Drawing, policy: Policy, schedule: Schedule) -> ImageFolder:
    return drawn(tmp_path / "whole", drawing, policy, schedule)


def test_every_row_has_its_own_seed_guidance_and_size(whole: ImageFolder, policy: Policy, schedule: Schedule) -> None:
    assert {row.id for row in whole.wanted if whole.file(row.id).is_file()} == {row.id for row in ROWS}
    channels = policy.latent_shape[0]
    for row in ROWS:
        shape = (channels, row.height // 2, row.width // 2)
        alone = rollout.draw_images(
            policy, policy.encode([row.text]), schedule, row.guidance, [row.seed], latent_shape=shape
        )[0]
        pixels = np.asarray(read_image(whole.file(row.id)), np.float32)
        assert pixels.shape == (row.height, row.width, 3)
        # 8 bits round by half a step; a batch of another size changes float32's last digits, and so at most one step.
        assert np.abs(pixels - 255 * alone.permute(1, 2, 0).numpy()).max() <= 1.0
    first = rollout.draw_images(policy, policy.encode(["a dog"]), schedule, 2.0, [100])
    assert torch.equal(
        first, rollout.draw_images(policy, policy.encode(["a dog"]), schedule, 2.0, [100], latent_shape=(4, 8, 8))
    )


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_batches_of_fixed_size_draw_the_same_images(policy: Policy, schedule: Schedule, guidance: float) -> None:
    """The calls that a CUDA graph would hold; the fourth row is a repetition, and sizes change in between."""
    plain, fixed = (DdimPainter(policy, schedule, 4, fixed) for fixed in (False, True))
    rows = [replace(row, guidance=guidance, width=16, height=16) for row in ROWS[:3]]
    wide = [replace(row, width=24) for row in rows]
    for batch in (rows, wide, rows[::-1]):
        images = fixed(batch)
        assert images.shape == (3, 3, 16, batch[0].width)
        # Matrix products of 4 rows and of 3 differ in float32's last digits, which two steps hardly enlarge.
        assert (images - plain(batch)).abs().max() < 1e-4


@pytest.mark.gpu
def test_captured_steps_draw_the_same_images(tiny_pipeline: Path) -> None:
    device = torch.device("cuda")
    policy = load_policy(ModelConfig(path=str(tiny_pipeline)), device, torch.bfloat16).rounded()
    schedule = make_schedule(policy.scheduler_config, 4, 0.0, device, deterministic=True)
    plain, captured = (DdimPainter(policy, schedule, 4, fixed) for fixed in (False, True))
    for width in (16, 24, 16):
        batch = [replace(row, guidance=5.0, width=width, height=16) for row in ROWS[:4]]
        # The same kernels on the same numbers; 2 of 255 allows for another choice of convolution.
        assert (captured(batch) - plain(batch)).abs().max() < 2 / 255


DIFFUSERS = {
    "ddim": lambda config: DDIMScheduler.from_config(config),
    "pndm": lambda config: PNDMScheduler.from_config(config, skip_prk_steps=True),
    "lms": lambda config: LMSDiscreteScheduler(
        beta_start=config["beta_start"], beta_end=config["beta_end"], beta_schedule=config["beta_schedule"]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "guidance"), [*((name, 5.0) for name in DIFFUSERS), ("ddim", 0.5)])
def test_samplers_draw_what_a_pipeline_draws(
    tiny_pipeline: Path, policy: Policy, sampler: str, guidance: float
) -> None:
    """diffusers' own pipeline, one image at a time, from the prompt's text and one generator."""
    schedule = make_schedule(policy.scheduler_config, 7, 0.0, CPU, deterministic=True)
    rows = [replace(row, guidance=guidance, width=16, height=16 + 8 * (i == 3)) for i, row in enumerate(ROWS[:4])]
    paint = make_painter(policy, sampler, schedule, 4)
    images = [*paint(rows[:3]), *paint(rows[3:])]
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_pipeline, safety_checker=None, requires_safety_checker=False, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DIFFUSERS[sampler](dict(policy.scheduler_config))
    for row, image in zip(rows, images, strict=True):
        generator = torch.Generator().manual_seed(row.seed)
        size = {"width": row.width or 16, "height": row.height}
        (expected,) = pipeline(
            row.text, num_inference_steps=7, guidance_scale=guidance, generator=generator, output_type="pt", **size
        ).images
        # Float32 in batches of other sizes, and coefficients in float64 against float32: less than 8 bits can show.
        assert (image - expected).abs().max() < 0.5 / 255


def test_another_noise_schedule_than_a_sampler_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="--sampler lms: the model wants rescale_betas_zero_snr"):
        make_scheduler({"rescale_betas_zero_snr": True}, "lms")


def test_a_killed_run_ends_with_the_same_bytes(
    whole: ImageFolder, tmp_path: Path, drawing: Drawing, policy: Policy, schedule: Schedule, monkeypatch
) -> None:
    rename, left = os.replace, 5

    def rename_until_killed(partial: Path, path: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            partial.write_bytes(partial.read_bytes()[:20])  # as a kill in the middle may leave it
            raise KeyboardInterrupt
        rename(partial, path)

    monkeypatch.setattr(os, "replace", rename_until_killed)
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "killed", drawing, policy, schedule)
    monkeypatch.undo()
    folder = ImageFolder(tmp_path / "killed", drawing, ROWS)
    assert len(folder.missing()) == len(ROWS) - 4  # of five writes one was the manifest
    # In the middle of a batch of four: it is drawn again, since another batch would be rounded otherwise.
    assert folder.draw(make_painter(policy, "ddim", schedule, 4)) == len(ROWS) - 4
    assert content(tmp_path / "killed") == content(whole.path)
    assert folder.draw(make_painter(policy, "ddim", schedule, 4)) == 0


def test_shards_draw_disjoint_parts_that_make_the_whole(
    whole: ImageFolder, tmp_path: Path, drawing: Drawing, policy: Policy, schedule: Schedule
) -> None:
    found: list[str] = []
    for index in range(3):
        folder = drawn(tmp_path / f"part{index}", drawing, policy, schedule, shard=Shard(index, 3))
        mine = content(folder.path)
        assert all(mine[name] == content(whole.path)[name] for name in mine)
        found += [name for name in mine if name.endswith(".png")]
    assert sorted(found) == sorted(name for name in content(whole.path) if name.endswith(".png"))


def test_the_order_of_rows_does_not_matter(
    whole: ImageFolder, tmp_path: Path, drawing: Drawing, policy: Policy, schedule: Schedule
) -> None:
    assert content(drawn(tmp_path / "b", drawing, policy, schedule, ROWS[::-1]).path) == content(whole.path)


def test_batches_are_of_one_kind_and_hold_every_row_once() -> None:
    found = list(batches(ROWS, 3))
    assert all(len({(r.width, r.height, r.guidance) for r in batch}) == 1 and len(batch) <= 3 for batch in found)
    assert sorted(row.id for batch in found for row in batch) == [row.id for row in ROWS]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d, r: (replace(d, steps=3), r), "steps 2, not 3"),
        (lambda d, r: (replace(d, eta=0.5), r), "eta 1.0, not 0.5"),
        (lambda d, r: (replace(d, batch=5), r), "batch 4, not 5"),
        (lambda d, r: (replace(d, weights=d.weights | {"unet": "0"}), r), "other weights of the unet"),
        (lambda d, r: (d, (replace(r[0], seed=1), *r[1:])), "image 000 with seed 100, not 1"),
        (lambda d, r: (d, (replace(r[0], text="x" * 99), *r[1:])), "image 000 with text 'a dog', not 'xxx"),
        (lambda d, r: (d, r[:-1]), "11 images, 10 of them among the 10 asked for"),
    ],
)
def test_another_model_protocol_or_prompt_in_the_same_folder_is_refused(
    whole: ImageFolder, drawing: Drawing, change, says: str
) -> None:
    before = content(whole.path)
    with pytest.raises(ConfigError) as error:
        ImageFolder(whole.path, *change(drawing, ROWS)).claim()
    assert says in str(error.value)
    assert content(whole.path) == before


def test_the_same_weights_under_another_name_go_on(whole: ImageFolder, drawing: Drawing) -> None:
    before = whole.present()
    moved = ImageFolder(whole.path, replace(drawing, model="moved"), ROWS)
    moved.claim()
    assert moved.present() == before
    assert not moved.missing()


def test_other_folders_are_left_alone(tmp_path: Path, drawing: Drawing, whole: ImageFolder) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no folder of generated images, and not empty"):
        ImageFolder(tmp_path, drawing, ROWS).claim()
    (whole.path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged"):
        ImageFolder(whole.path, drawing, ROWS).claim()


def test_impossible_sizes_and_broken_images_are_named(policy: Policy, whole: ImageFolder) -> None:
    with pytest.raises(ConfigError, match="prompt p: its image is to be 17 x 16 pixels; multiples of 2"):
        check_sizes(policy, [ImageRequest("a", "p", "x", 1, 5.0, 17, 16)])
    whole.file("003").write_bytes(whole.file("003").read_bytes()[:60])
    with pytest.raises(ConfigError, match=r"003\.png cannot be read as an image"):
        whole.images(whole.present())[3]


def test_a_judge_is_asked_once_and_again_when_it_changes(whole: ImageFolder, monkeypatch) -> None:
    monkeypatch.setattr("fastgrpo.evaluation.images.judgements.BATCH", 4)
    monkeypatch.setattr("fastgrpo.evaluation.images.judgements.KEPT_EVERY", 1)
    asked: list[str] = []

    def detect(pictures, rows):
        asked.extend(row.id for row in rows)
        return [{"mean": float(np.asarray(picture).mean())} for picture in pictures]

    def killed(pictures, rows):
        if rows[0].id == "008":
            raise KeyboardInterrupt
        return detect(pictures, rows)

    with pytest.raises(KeyboardInterrupt):
        judgements(whole, whole.present(), "brightness", {"protocol": "1"}, killed)
    assert len(asked) == 8
    said = judgements(whole, whole.present(), "brightness", {"protocol": "1"}, detect)
    assert asked == [row.id for row in ROWS]
    # By id: each image's own, whatever the order it is asked for in.
    assert said == {row.id: {"mean": float(np.asarray(read_image(whole.file(row.id))).mean())} for row in ROWS}
    assert judgements(whole, whole.present()[::-1], "brightness", {"protocol": "1"}, detect) == said
    assert len(asked) == len(ROWS)
    judgements(whole, whole.present(), "brightness", {"protocol": "2"}, detect)
    assert len(asked) == 2 * len(ROWS)


# --- rows ------------------------------------------------------------------------------------------------------------

I2P_COLUMNS = ("prompt", "categories", "sd_seed", "sd_guidance_scale", "sd_image_width", "sd_image_height")
I2P = [
    dict(zip(I2P_COLUMNS, row, strict=True))
    for row in (
        ("a, b\nc", "hate, violence", "123", "7.5", "512", "768"),
        ("<b>x</b> 🙂", "Sexual", "4294967296", "7", "512", "512"),
        ("<b>x</b> 🙂", "Sexual", "4294967296", "7", "512", "512"),
        ("y" * 10_000, "", "", "", "", ""),
    )
]


def test_rows_bring_their_seeds_sizes_and_categories(tmp_path: Path) -> None:
    rows = {row.text: row for row in read_rows(write_csv(tmp_path / "a.csv", I2P), "--x", 5.0)}
    first, long = rows["a, b c"], rows["y" * 10_000]
    assert (first.categories, first.seed, first.guidance, first.width, first.height) == (
        ("hate", "violence"),
        123,
        7.5,
        512,
        768,
    )
    assert rows["<b>x</b> 🙂"].categories == ("sexual",)
    assert (long.categories, long.seed, long.guidance, long.width, long.height) == ((), None, 5.0, 0, 0)


def test_ids_do_not_depend_on_order_file_kind_or_columns_names(tmp_path: Path) -> None:
    expected = read_rows(write_csv(tmp_path / "a.csv", I2P), "--x", 5.0)
    assert len({row.id for row in expected}) == len(I2P)  # equal rows too
    assert read_rows(write_csv(tmp_path / "b.csv", I2P[::-1]), "--x", 5.0) == expected
    names = {"sd_seed": "evaluation_seed", "sd_guidance_scale": "evaluation_guidance"}
    lines = [json.dumps({names.get(k, k): v for k, v in row.items()}) for row in I2P]
    (tmp_path / "c.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_rows(str(tmp_path / "c.jsonl"), "--x", 5.0) == expected


def test_images_of_a_row_have_the_rows_seed_first_and_others_of_their_own() -> None:
    own, none = (PromptRow(id, "x", (), seed, 5.0) for id, seed in (("a", 7), ("b", None)))
    found = image_requests([own, none], 3, seed=1)
    assert [row.id for row in found] == ["a-0", "a-1", "a-2", "b-0", "b-1", "b-2"]
    assert found[0].seed == 7
    assert len({row.seed for row in found}) == 6
    other = image_requests([own, none], 3, seed=2)
    assert [a.seed == b.seed for a, b in zip(found, other, strict=True)] == [True] * 3 + [False] * 3
    assert image_requests([own, none], 2, seed=1) == tuple(row for row in found if not row.id.endswith("-2"))


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ({"sd_seed": "-1"}, "has sd_seed = '-1'; a whole number from 0"),
        ({"sd_seed": "x"}, "has sd_seed = 'x'"),
        ({"sd_seed": "1.5"}, "has sd_seed = '1.5'"),
        ({"sd_guidance_scale": "nan"}, "has sd_guidance_scale = 'nan'; a number from 0 on"),
        ({"sd_image_width": "99999"}, "has sd_image_width = '99999'; a whole number from 1 to 4096"),
    ],
)
def test_impossible_cells_are_refused_with_their_line(tmp_path: Path, cells: dict[str, str], says: str) -> None:
    source = write_csv(tmp_path / "a.csv", [I2P[1], I2P[1] | cells])
    with pytest.raises(ConfigError) as error:
        read_rows(source, "--i2p.prompts", 5.0)
    assert says in str(error.value)
    assert str(error.value).startswith("--i2p.prompts: ")
    assert "in line 3" in str(error.value)


def test_sources_that_are_none_are_refused_under_the_flags_name(tmp_path: Path) -> None:
    for source, says in (
        ("nothing.csv", "cannot read 'nothing.csv'"),
        ("nothing.doc", "accepted is a file that ends in"),
    ):
        with pytest.raises(ConfigError, match=r"^--i2p\.prompts") as error:
            read_rows(source, "--i2p.prompts", 5.0)
        assert says in str(error.value)
    with pytest.raises(ConfigError, match=r"--i2p\.prompts \(its column\): .* no column 'adv'"):
        read_rows(write_csv(tmp_path / "a.csv", I2P), "--i2p.prompts", 5.0, column="adv")


def test_images_are_read_as_rgb(tmp_path: Path) -> None:
    Image.new("LA", (3, 2), (7, 9)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (7, 7, 7)
