"""FID: the network beside torchvision's, resizing, distances and their errors against direct computations, folders."""

import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import save_file
from scipy.linalg import sqrtm

from fastgrpo.evaluation.images import files as files_module
from fastgrpo.evaluation.images.files import ImageFiles
from fastgrpo.evaluation.images.folder import Drawing, ImageFolder, ImageRequest
from fastgrpo.evaluation.metrics import fid as fid_module
from fastgrpo.evaluation.metrics import inception as inception_module
from fastgrpo.evaluation.metrics.fid import fid, folder_images, frechet, influence, reference_features
from fastgrpo.evaluation.metrics.inception import WIDTH, Inception, InceptionV3, load_inception, prepare
from fastgrpo.evaluation.results.file import number_json
from fastgrpo.evaluation.statistics.intervals import DELTA, distance
from fastgrpo.evaluation.suites.base import Loader
from fastgrpo.evaluation.suites.captions import FidSuite
from fastgrpo.settings.suites import DetectorSettings
from fastgrpo.system.distributed import Ranks
from fastgrpo.system.errors import ConfigError

SIZES = [(37, 53), (400, 311), (299, 299), (1, 700), (64, 64)]  # width, height


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    """With random weights that keep signals at about unit scale through all its layers."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        network = InceptionV3()
    network = network.to_empty(device="cpu").eval()
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, math.sqrt(2 / tensor[0].numel()), generator=generator)
        elif name.endswith("num_batches_tracked"):
            tensor.zero_()
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.8, 1.2, generator=generator)
        else:
            tensor.normal_(0, 0.1, generator=generator)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def inception(network: InceptionV3) -> Inception:
    return Inception(network, {"inception": "0123456789abcdef" * 4}, "cpu")


def noise(width: int, height: int, seed: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def features_of(folder: Path, inception: Inception) -> torch.Tensor:
    return reference_features(folder, folder_images(folder), inception, Ranks())


def folder_of_images(folder: Path) -> Path:
    (folder / "below").mkdir(parents=True)
    for index, (size, mode) in enumerate(zip(SIZES, ("RGB", "L", "RGBA", "P", "RGB"), strict=True)):
        noise(*size, index, mode).save(
            folder / ("below" if index == 3 else ".") / f"{index}.{'PNG' if index else 'png'}"
        )
    (folder / "notes.txt").write_text("no image")
    return folder


def test_the_network_is_torchvisions_with_tensorflows_pooling(
    network: InceptionV3, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    missing, unexpected = theirs.load_state_dict(network.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    theirs.fc = torch.nn.Identity()
    pooled = []

    def pool(x, **kwargs):
        # Called by nine blocks, of which the last, alone with 2,048 channels at its input, takes maxima.
        assert kwargs == {"kernel_size": 3, "stride": 1, "padding": 1}
        pooled.append(x.shape[1])
        return F.max_pool2d(x, **kwargs) if x.shape[1] == 2048 else average(x, **kwargs, count_include_pad=False)

    average = F.avg_pool2d
    pixels = torch.stack([prepare(noise(*size, 1)) for size in SIZES[:2]]).double()
    ours = network.double()(pixels)
    monkeypatch.setattr(F, "avg_pool2d", pool)
    expected = theirs.double().eval()(pixels)
    network.float()
    assert pooled == [192, 256, 288, 768, 768, 768, 768, 1280, 2048]
    assert ours.shape == (2, WIDTH)
    assert ours.std() > 0.1  # a signal arrives
    # Both in float64; only the order of sums may differ: some 1e-13 after 94 layers.
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def cubic(x: np.ndarray) -> np.ndarray:
    """The interpolation kernel with a = -1/2, of Keys (1981)."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def resampling(size: int, to: int) -> np.ndarray:
    """[to, size]: what an output pixel takes of each input pixel, the kernel as wide as the output's pixels."""
    scale = size / to
    distance = np.arange(size)[None] + 0.5 - (np.arange(to)[:, None] + 0.5) * scale
    weights = cubic(distance / max(scale, 1))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", SIZES)
def test_images_are_resized_antialiased_and_not_rounded(size: tuple[int, int]) -> None:
    image = noise(*size, 3)
    values = np.asarray(image, np.float64)
    resized = np.einsum("yh,xw,hwc->cyx", resampling(size[1], 299), resampling(size[0], 299), values, optimize=True)
    # float32 between the passes: up to 300 * 2^-24 in values up to 300; half a gray value would be 4e-3 here.
    np.testing.assert_allclose(prepare(image).numpy(), (resized.clip(0, 255) - 128) / 128, atol=2e-6)


def test_the_distance_of_two_gaussians_with_common_axes_has_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    one, two = rng.uniform(0, 3, (2, 40))
    one[:5] = two[3:9] = 0  # singular, in part in the same directions
    offset = rng.normal(size=40)
    expected = offset @ offset + ((np.sqrt(one) - np.sqrt(two)) ** 2).sum()
    distance = frechet(offset, axes * one @ axes.T, np.zeros(40), axes * two @ axes.T).distance
    # An eigenvalue of 0 is computed as up to some 1e-15, its root as up to 3e-8, for 10 of them.
    assert distance == pytest.approx(expected, abs=1e-6)


def test_the_distance_is_that_of_the_general_matrix_root() -> None:
    rng = np.random.default_rng(1)
    one, two = (np.cov(rng.normal(size=(100, 20)) @ rng.normal(size=(20, 20)), rowvar=False) for _ in range(2))
    means = rng.normal(size=(2, 20))
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(one + two - 2 * sqrtm(one @ two).real)
    # The covariances' condition numbers, some 1e5 together, times float64's 1e-16, in traces of some 400 each.
    assert frechet(means[0], one, means[1], two).distance == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("n", "m"), [(5, 9), (30, 12), (2, 2)])
def test_fewer_images_than_features(n: int, m: int) -> None:
    # With X and Y the centred features, tr (C_1 C_2)^(1/2) is the sum of the singular values of X Y', over the root of
    # (n - 1)(m - 1): no covariance is formed.
    rng = np.random.default_rng(2)
    one, two = (torch.from_numpy(rng.gamma(1.0, 1.0, (k, 64))).float() for k in (n, m))
    x, y = ((f.double() - f.double().mean(0)).numpy() for f in (one, two))
    roots = np.linalg.svd(x @ y.T, compute_uv=False).sum() / math.sqrt((n - 1) * (m - 1))
    offset = (one.double().mean(0) - two.double().mean(0)).numpy()
    expected = offset @ offset + (x**2).sum() / (n - 1) + (y**2).sum() / (m - 1) - 2 * roots
    # As above: up to 64 eigenvalues of 0, computed as up to 1e-14 for covariances of norm 30.
    assert fid(one, two).value == pytest.approx(expected, abs=3e-5)
    assert fid(one, one).value == pytest.approx(0, abs=3e-5)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="two images or more, not 1"):
        fid(torch.zeros(1, 4), torch.zeros(3, 4))


# --- the interval ---------------------------------------------------------------------------------------------------


def weighted_fid(weights: np.ndarray, values: np.ndarray, mean: np.ndarray, root: np.ndarray) -> float:
    """FID of images with shares of all that sum to 1, from the Gaussian of `mean` and covariance root root'.

    The trace of (C_1 C_2)^(1/2) is the sum of the singular values of X' R, where C_1 = X' X and C_2 = R R'.
    """
    own = weights @ values
    x = np.sqrt(weights)[:, None] * (values - own)
    return ((own - mean) ** 2).sum() + (x**2).sum() + (root**2).sum() - 2 * np.linalg.svd(x @ root)[1].sum()


@pytest.mark.parametrize("n", [40, 6])  # with more images than features, and with fewer
def test_the_influence_function_is_the_derivative_in_an_images_share(n: int) -> None:
    rng = np.random.default_rng(3)
    values, mean = rng.gamma(1.0, 1.0, (n, 12)), rng.uniform(0, 2, 12)
    root = rng.normal(size=(12, 12)) / 3
    even = np.full(n, 1 / n)
    own = values.mean(0)
    transport = frechet(own, np.cov(values, rowvar=False, bias=True), mean, root @ root.T).transport
    constant = np.linalg.svd(values - own)[2][n - 1 :]  # directions in which the images do not differ
    np.testing.assert_allclose(constant @ transport, 0, atol=1e-10)
    step = 1e-4 / n
    slopes = []
    for share in np.eye(n):
        up, down = (weighted_fid(even + h * (share - even), values, mean, root) for h in (step, -step))
        slopes.append((up - down) / (2 * step))
    # Central differences are off by some (step n)^2 = 1e-8 of the slopes, as FID changes much when an image's share of
    # 1 / n does; and by rounding, 1e-14 / step = 4e-9.
    np.testing.assert_allclose(
        influence(values, own - mean, transport), slopes, rtol=0, atol=1e-6 * np.abs(slopes).max()
    )


def test_the_influence_of_images_by_matrix_roots() -> None:
    rng = np.random.default_rng(4)
    one, two = (torch.from_numpy(rng.gamma(1.0, 1.0, (k, 10)) @ rng.normal(size=(10, 10))).float() for k in (60, 90))
    x, y = one.double().numpy(), two.double().numpy()
    cov, root = np.cov(x, rowvar=False), sqrtm(np.cov(y, rowvar=False)).real
    transport = root @ np.linalg.inv(sqrtm(root @ cov @ root).real) @ root
    np.testing.assert_allclose(transport @ cov @ transport, root @ root, atol=1e-8)
    centred = x - x.mean(0)
    quadratic = np.einsum("ne,ef,nf->n", centred, np.eye(10) - transport, centred)
    expected = 2 * centred @ (x.mean(0) - y.mean(0)) + quadratic
    # Condition numbers of some 1e4 and float64's 1e-16, in values of some 100.
    np.testing.assert_allclose(fid(one, two).influence, expected - expected.mean(), atol=1e-8)


@pytest.mark.parametrize(("prompts", "images"), [(300, 1), (150, 4)])
def test_the_interval_is_as_wide_as_fid_varies_with_the_images(prompts: int, images: int) -> None:
    rng = np.random.default_rng(5)
    reference = torch.from_numpy(rng.normal(size=(400, 6))).float()
    mixing = np.eye(6) + 0.3 * rng.normal(size=(6, 6))
    trials = 400
    values, widths, apart, ends = [], [], [], []
    for _ in range(trials):
        # Skewed features, of which the images of a prompt share half the variance.
        own, shared = (rng.exponential(size=(prompts, k, 6)) - 1 for k in (images, 1))
        latent = own if images == 1 else math.sqrt(0.5) * (own + shared)
        found = fid(torch.from_numpy(latent.reshape(-1, 6) @ mixing + 0.3), reference)
        estimate = distance(found.value, found.influence.reshape(prompts, images).sum(1), [images] * prompts)
        assert (estimate.n, estimate.method) == (prompts * images, DELTA)
        values.append(estimate.value)
        ends.append((estimate.low, estimate.high))
        widths.append(estimate.high - estimate.value)
        apart.append(found.influence.std() / math.sqrt(prompts * images))
    spread = np.std(values, ddof=1)
    # A standard deviation of 400 trials has a standard error of 3.5%, times 4; what the delta method leaves out is of
    # order E / prompts, 2 and 4%.
    assert np.sqrt(np.mean(np.square(widths))) / 1.97 == pytest.approx(spread, rel=0.18)
    # 95% nominal with a standard error of 1.1%, times 4, and 1% for the skewness of so few.
    low, high = np.transpose(ends)
    assert np.mean((low <= np.mean(values)) & (np.mean(values) <= high)) == pytest.approx(0.95, abs=0.05)
    if images > 1:  # images by themselves would look more certain than they are
        assert np.mean(apart) < 0.82 * spread


def test_evaluation_json_has_the_interval_over_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    ours, theirs = (torch.from_numpy(rng.normal(size=(n, 5)) + shift).float() for n, shift in ((90, 0.5), (70, 0)))
    rows = tuple(ImageRequest(f"p{i % 30:02d}-{i // 30}", f"p{i % 30:02d}", "x", i, 7.5) for i in range(90))

    def features(folder: Path, images: ImageFiles, *_: object) -> torch.Tensor:
        own = folder == Path("model/captions/images")
        assert not own or [file.stem for file in images.paths] == [row.id for row in rows]
        return ours if own else theirs

    folder = ImageFolder(Path("model/captions"), Drawing("x", {}, 50, 0.0, "fp32", 4), rows)

    class Network:
        name, protocol, hashes = "inception", "x", {}

    monkeypatch.setattr(inception_module, "load_inception", lambda *_, **__: Network())
    monkeypatch.setattr(fid_module, "folder_images", lambda *_, **__: ImageFiles([Path("real.png")] * 70))
    monkeypatch.setattr(fid_module, "folder_features", features)
    suite = FidSuite(rows, 3, "real", "weights.pth", 50, 0.0)
    scored = suite.prepare(Loader(DetectorSettings(), torch.device("cpu")))(folder, rows, None)
    (number,) = (number_json(number) for number in scored.tables[0].numbers)
    found = fid(ours, theirs)
    expected = distance(found.value, found.influence.reshape(3, 30).sum(0), [3] * 30)
    assert (number["name"], number["value"], number["n"], number["interval"]) == ("fid", found.value, 90, DELTA)
    assert 0 < number["low"] < number["value"] < number["high"]
    assert (number["low"], number["high"]) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert "against 70 images" in scored.notes[0]
    assert "interval is for 90" in scored.notes[0]


# --- folders and files ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_features_of_a_folder_and_its_distance_by_direct_computation(inception: Inception, tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "reference")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() == ".png")
    assert list(folder_images(folder).paths) == files
    features = features_of(folder, inception)

    double = copy.deepcopy(inception.network).double()
    with torch.no_grad():
        direct = torch.cat([double(prepare(Image.open(file).convert("RGB"))[None].double()) for file in files[::2]])
    # float32 through 94 layers, whose errors of 6e-8 each add up in part: some 1e-6 of the features' scale.
    scale = direct.abs().max().item()
    torch.testing.assert_close(features[::2].double(), direct, rtol=0, atol=2e-5 * scale)

    other = inception([noise(80, 60, seed) for seed in range(20, 24)])
    one, two = features.double(), other.double()
    x, y = one - one.mean(0), two - two.mean(0)
    roots = torch.linalg.svdvals(x @ y.T).sum() / math.sqrt(4 * 3)
    offset = one.mean(0) - two.mean(0)
    expected = offset @ offset + (x**2).sum() / 4 + (y**2).sum() / 3 - 2 * roots
    # 2,048 eigenvalues of which 2,045 are 0 and computed as 1e-15 of the largest: roots of 3e-8 each, twice.
    assert fid(features, other).value == pytest.approx(expected.item(), abs=2e-4 * (x**2).sum().item())


def test_features_do_not_depend_on_the_batch(inception: Inception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "BATCH", 2)
    images = [noise(50, 40, seed) for seed in range(3)]
    alone = torch.cat([inception([image]) for image in images])
    # Sums in another order: as above.
    torch.testing.assert_close(inception(images), alone, rtol=0, atol=2e-5 * alone.abs().max().item())
    assert inception([]).shape == (0, WIDTH)


def test_features_are_kept_beside_the_images_until_something_changes(
    network: InceptionV3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "reference"
    folder.mkdir()
    for index in range(3):
        noise(20, 20, index).save(folder / f"{index}.bmp")
    seen = []
    monkeypatch.setattr(
        InceptionV3, "forward", lambda self, x: seen.append(len(x)) or x.mean((2, 3)).repeat(1, 683)[:, :WIDTH]
    )
    inception = Inception(network, {"inception": "a" * 64}, "cpu")

    first = features_of(folder, inception)
    assert torch.equal(features_of(folder, inception), first)
    assert seen == [3]
    # Of the same size on disk: only the time tells.
    noise(20, 20, 9).save(folder / "1.bmp")
    os.utime(folder / "1.bmp", ns=(1, 1))
    changed = features_of(folder, inception)
    assert seen == [3, 3]
    assert [torch.equal(a, b) for a, b in zip(first, changed, strict=True)] == [True, False, True]
    (folder / "2.bmp").rename(folder / "3.bmp")
    features_of(folder, inception)
    features_of(folder, Inception(network, {"inception": "b" * 64}, "cpu"))
    assert seen == [3, 3, 3, 3]
    for kept in folder.glob(".fid-*"):
        kept.write_bytes(b"\x00" * 40)
    features_of(folder, inception)
    assert seen == [3] * 5
    assert not list(folder.glob("*.partial"))


def test_a_file_that_is_no_image_is_named_and_nothing_is_kept(inception: Inception, tmp_path: Path) -> None:
    noise(20, 20, 0).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for broken in (b"not an image", b"", content[: len(content) // 2]):
        (tmp_path / "b.png").write_bytes(broken)
        with pytest.raises(ConfigError, match=r"fid\.reference: '.*b\.png' is no image that can be read \(.+\)\.$"):
            features_of(tmp_path, inception)
        if len(broken) < 20:  # what does not even begin as one is found before anything is drawn
            with pytest.raises(ConfigError, match=r"--captions\.reference: '.*b\.png' is no image that can be read"):
                folder_images(tmp_path, "--captions.reference")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_which_files_of_a_folder_are_its_images(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "reference", tmp_path / "elsewhere"
    for file in ("a.png", "b/c.JPG", "b/d/e.webp"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        noise(8, 8, 0).save(folder / file)
    elsewhere.mkdir()
    noise(8, 8, 1).save(elsewhere / "f.png")
    (folder / "link").symlink_to(elsewhere)
    (folder / "g.png").symlink_to(elsewhere / "f.png")
    # None of these is one: loops, what macOS, notebooks and lost disks leave.
    (folder / "b" / "loop").symlink_to(folder)
    (elsewhere / "loop").symlink_to(elsewhere)
    (folder / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "folder.png").mkdir()
    for file in ("._a.png", "__MACOSX/._a.png", "b/._c.JPG", ".ipynb_checkpoints/a-checkpoint.png", "notes.txt"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"\x00\x05\x16\x07 no image")
    expected = ["a.png", "b/c.JPG", "b/d/e.webp", "g.png", "link/f.png"]
    assert [file.relative_to(folder).as_posix() for file in folder_images(folder).paths] == expected


def test_features_of_images_behind_a_link(inception: Inception, tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    folder = folder_of_images(tmp_path / "images")
    (tmp_path / "reference" / "link").symlink_to(folder)
    behind = features_of(tmp_path / "reference", inception)
    assert torch.equal(behind, features_of(folder, inception))


def test_folders_that_will_not_do_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--reference: '.*nowhere' is not a folder"):
        folder_images(tmp_path / "nowhere", "--reference")
    noise(20, 20, 0).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="has 1 images; FID needs two or more"):
        folder_images(tmp_path)


def test_weights_are_read_with_and_without_the_classifier(network: InceptionV3, tmp_path: Path) -> None:
    state = network.state_dict()
    full = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    full |= {"fc.weight": torch.zeros(1008, WIDTH), "fc.bias": torch.zeros(1008)}
    torch.save(full, tmp_path / "a.pth")
    save_file(state, tmp_path / "b.safetensors")
    pixels = prepare(noise(30, 30, 0))[None]
    expected = network(pixels)
    hashes = set()
    for name in ("a.pth", "b.safetensors"):
        loaded = load_inception(str(tmp_path / name))
        assert torch.equal(loaded.network(pixels), expected)
        hashes.add(loaded.hashes["inception"])
    assert len(hashes) == 2


def test_other_files_are_refused_in_one_sentence(network: InceptionV3, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    state = dict(list(network.state_dict().items())[:4])  # tensors are looked at in order
    torch.save(Hostile(), tmp_path / "hostile.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(state | {"AuxLogits.fc.weight": torch.zeros(1)}, tmp_path / "torchvision.pth")
    torch.save(state | {"Conv2d_1a_3x3.bn.bias": torch.zeros(3)}, tmp_path / "shape.pth")
    torch.save({}, tmp_path / "empty.pth")
    torch.save(state | {"Conv2d_1a_3x3.bn.bias": torch.full((32,), math.nan)}, tmp_path / "nan.pth")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "text.safetensors").write_text("<html>not found</html>")
    reasons = {
        "hostile.pth": "cannot be read as tensors",
        "list.pth": "holds a list",
        "torchvision.pth": "holds torchvision's Inception-v3",
        "shape.pth": r"no tensor Conv2d_1a_3x3\.bn\.bias of shape \(32,\)",
        "empty.pth": r"no tensor Conv2d_1a_3x3\.conv\.weight of shape",
        "nan.pth": r"numbers in Conv2d_1a_3x3\.bn\.bias that are not finite",
        "text.pth": "is a web page, not weights",
        "text.safetensors": "is a web page, not weights",
        "nowhere.pth": "is no file",
    }
    for name, reason in reasons.items():
        with pytest.raises(ConfigError, match=rf"^fid\.inception: .*{reason}.*pt_inception-2015-12-05") as caught:
            load_inception(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    assert not ran.exists()
