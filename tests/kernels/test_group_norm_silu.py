import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.kernels import group_norm_silu as module
from fastgrpo.kernels import group_norm_silu_triton as kernels
from fastgrpo.kernels import native
from fastgrpo.kernels.group_norm_silu import group_norm_silu, reference
from fastgrpo.kernels.operators import DTYPES
from fastgrpo.kernels.specs.group_norm_silu import SPEC
from support.kernels import GROUP_CHANNELS, on_kernels, poisoned

EPS = 1e-5

# [N, C, H, W], groups: one pixel, one value a group, odd sides, channels a group of 1 to 120, spatial sides of 1 to 64.
SHAPES = [
    ((2, 5, 1, 1), 5),
    ((1, 120, 1, 1), 1),
    ((2, 6, 5, 7), 6),
    ((1, 8, 64, 64), 4),
    ((2, 40, 8, 8), 4),
    ((3, 30, 3, 17), 3),
    ((1, 240, 6, 5), 2),
    ((1, 21, 1, 64), 3),
]


def make(
    shape: tuple[int, ...], dtype: torch.dtype, temb: bool = True, offset: float = 0.0
) -> dict[str, Tensor | None]:
    """Arguments and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    made = {
        "x": (normal(*shape) + offset).to(dtype).to(memory_format=torch.channels_last),
        "weight": normal(shape[1]).to(dtype),
        "bias": normal(shape[1]).to(dtype),
        "temb": normal(*shape[:2]).to(dtype) if temb else None,
        "dy": normal(*shape).to(dtype).to(memory_format=torch.channels_last),
    }
    return made


def launch(
    x, weight, bias, temb, dy, groups: int, silu: bool = True, device: str = "cpu", **options
) -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias, dtemb of the Triton kernels, on the CPU."""
    x, weight, bias, temb, dy = (None if t is None else t.to(device) for t in (x, weight, bias, temb, dy))
    with poisoned():
        y, mean, rstd = kernels.launch_forward(x, weight, bias, groups, EPS, silu, temb, **options)
        dx, vectors, dtemb = kernels.launch_backward(dy, x, weight, bias, mean, rstd, groups, silu, temb, **options)
    return tuple(tensor.cpu() for tensor in (y, dx, *vectors, dtemb))


def differentiate(function, x, weight, bias, temb, dy, groups: int, silu: bool = True) -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias, dtemb by autograd."""
    leaves = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in (x, weight, bias, temb)]
    y = function(*leaves[:3], groups, EPS, silu, leaves[3])
    gradients = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy)
    return (y.detach(), *gradients, *([dy.new_empty(0)] if temb is None else []))


def exact(made: dict[str, Tensor | None], groups: int, silu: bool = True) -> tuple[Tensor, ...]:
    double = {name: None if value is None else value.double() for name, value in made.items()}
    return differentiate(reference, **double, groups=groups, silu=silu)


def assert_near(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype, scale: float = 1) -> None:
    """Within SPEC's tolerance, which is for gradients of vectors that are sums of a thousand terms: times `scale`."""
    rtol, atol = SPEC.tolerance(dtype)
    for name, a, e in zip(("y", "dx", "dweight", "dbias", "dtemb"), actual, expected, strict=True):
        torch.testing.assert_close(
            a.double(), e.double(), rtol=rtol, atol=atol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_reference_is_pytorchs_group_norm() -> None:
    made = make((2, 12, 5, 3), torch.float64)
    expected = F.silu(F.group_norm(made["x"] + made["temb"][..., None, None], 3, made["weight"], made["bias"], EPS))
    actual = reference(made["x"], made["weight"], made["bias"], 3, EPS, True, made["temb"])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)  # float64, a hundred operations deep


@on_kernels
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_kernels_equal_the_float64_reference(shape: tuple[int, ...], groups: int, device: str) -> None:
    made = make(shape, torch.float32)
    # One value a group: x - mean is 0, but its gradient divides by sqrt(eps), 300 times the rounding of its terms.
    scale = 300 if shape[1] * shape[2] * shape[3] == groups else 1
    for silu in (True, False):
        assert_near(
            launch(**made, groups=groups, device=device, silu=silu), exact(made, groups, silu), torch.float32, scale
        )


@on_kernels
@pytest.mark.parametrize("plain", [True, False])
def test_every_number_of_channels_a_group(plain: bool, device: str) -> None:
    """Plain or with SiLU and time embedding; as many groups to a program as go."""
    for channels in GROUP_CHANNELS:
        made = make((1, 2 * channels, 3, 5), torch.float32, temb=not plain)
        actual = launch(**made, groups=2, silu=not plain, device=device, programs=1)
        assert_near(actual, exact(made, 2, not plain), torch.float32)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_in_half_precision(dtype: torch.dtype, device: str) -> None:
    made = make((2, 24, 7, 5), dtype)
    actual = launch(**made, groups=4, device=device)
    assert all(tensor.dtype == dtype for tensor in actual)
    assert_near(actual, exact(made, 4), dtype)


@on_kernels
def test_weights_in_float32_beside_half_precision(device: str) -> None:
    made = make((2, 24, 7, 5), torch.bfloat16)
    made |= {name: torch.randn(24, generator=torch.Generator().manual_seed(1)) for name in ("weight", "bias")}
    y, dx, dweight, dbias, dtemb = launch(**made, groups=4, device=device)
    expected = exact(made, 4)
    assert dweight.dtype == dbias.dtype == torch.float32
    assert_near((y, dx, *expected[2:4], dtemb), expected, torch.bfloat16)
    assert_near((*expected[:2], dweight, dbias, expected[4]), expected, torch.float32)


@on_kernels
def test_without_a_time_embedding(device: str) -> None:
    made = make((2, 12, 5, 3), torch.float32, temb=False)
    actual = launch(**made, groups=4, device=device)
    assert actual[-1].numel() == 0
    assert_near(actual, exact(made, 4), torch.float32)


@pytest.mark.slow
@on_kernels
@pytest.mark.parametrize("programs", [1, 24])
@pytest.mark.parametrize("pixels", [(8, 16), (13, 29)])
def test_many_tiles_in_one_launch_and_in_two(
    monkeypatch: pytest.MonkeyPatch, pixels: tuple[int, int], programs: int, device: str
) -> None:
    """Tiles so small that a slab takes many of them; `programs` decides whether one program or several take them."""
    monkeypatch.setattr(kernels, "_TILE", 512)
    shape = (2, 12, *pixels)
    plan = kernels.plan_launch(2, pixels[0] * pixels[1], 12, 4, 4, programs=programs)
    assert not plan.one_tile(pixels[0] * pixels[1])
    assert (plan.splits > 1) == (programs > 1)
    made = make(shape, torch.float32, offset=3.0)
    assert_near(launch(**made, groups=4, device=device, programs=programs), exact(made, 4), torch.float32)


@on_kernels
@pytest.mark.parametrize("programs", [1, 24])
@pytest.mark.parametrize("tile", [512, 8192])
def test_a_large_offset_costs_no_more_than_its_own_rounding(
    monkeypatch: pytest.MonkeyPatch, tile: int, programs: int, device: str
) -> None:
    """Mean 1e4, deviation 1: x is taken as it is in float32; the mean may be off by half its last bit, 5e-4."""
    monkeypatch.setattr(kernels, "_TILE", tile)
    made = make((1, 8, 16, 24), torch.float32, temb=False, offset=1e4)
    made["x"][0, 0, 0, 0] = 1e4 + 50  # an outlier in the corner, where a shift by the first value would take it
    given = (made[name].to(device) for name in ("x", "weight", "bias"))
    y, mean, rstd = (t.cpu() for t in kernels.launch_forward(*given, 4, EPS, False, None, programs=programs))
    grouped = made["x"].double().reshape(1, 4, -1)
    half_bit = 2.0**-11
    torch.testing.assert_close(mean.double(), grouped.mean(-1), rtol=0, atol=1.01 * half_bit)
    # m2 is a sum of 768 squares, each off by the mean's error twice; that averages out to less than its square.
    torch.testing.assert_close(rstd.double() ** -2, grouped.var(-1, correction=0) + EPS, rtol=2e-4, atol=0)
    expected = reference(*(made[name].double() for name in ("x", "weight", "bias")), 4, EPS, False)
    # (x - mean) is off by half a bit, times a weight of up to 3; the deviation adds 1e-4 of values up to 20.
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=3.5 * half_bit)


@on_kernels
def test_constant_groups_are_finite(device: str) -> None:
    made = make((1, 8, 4, 4), torch.float32, temb=False)
    made["x"].fill_(7.25)
    actual = launch(**made, groups=4, device=device)
    bias = made["bias"][:, None, None].expand(1, 8, 4, 4)
    torch.testing.assert_close(actual[0], F.silu(bias))
    assert all(torch.isfinite(tensor).all() for tensor in actual)
    # 1 / sqrt(eps) = 316 multiplies the rounding of dx's terms.
    assert_near(actual, exact(made, 4), torch.float32, scale=316)


@on_kernels
@pytest.mark.filterwarnings("ignore:overflow encountered")  # exp(1e4) is infinite, and the sigmoid 0, as it should be
def test_extreme_outputs_give_the_limits_of_silu(device: str) -> None:
    made = make((1, 4, 4, 4), torch.float32, temb=False)
    made["weight"] = torch.tensor([1e4, -1e4, 1e-4, 0.0])
    actual = launch(**made, groups=2, device=device)
    expected = exact(made, 2)
    assert all(torch.isfinite(tensor).all() for tensor in actual)
    for a, e in zip(actual[:4], expected[:4], strict=True):
        # Relative to the tensor: its parts are sums over terms of the largest size.
        assert (a - e).abs().max() <= 1e-5 * e.abs().max()


@on_kernels
def test_the_same_bits_every_time(device: str) -> None:
    made = make((3, 24, 9, 11), torch.float32)
    for programs in (1, 264):
        first, second = (launch(**made, groups=4, device=device, programs=programs) for _ in range(2))
        assert all(map(torch.equal, first, second))


def views() -> dict[str, Tensor]:
    wide = torch.randn(4, 24, 10, 12, generator=torch.Generator().manual_seed(2))
    return {
        "contiguous": wide[:2].clone(),
        "channels_last": wide[:2].to(memory_format=torch.channels_last),
        "slice": wide[::2, 6:18, ::2, 1:],
        "transposed": wide.transpose(2, 3),
        "expanded": wide[:1].expand(3, 24, 10, 12),
        "one pixel": wide[:2, :, :1, :1],
    }


@pytest.mark.parametrize("name", views())
def test_operator_on_memory_of_any_kind(name: str) -> None:
    x = views()[name]
    made = make(tuple(x.shape), torch.float32) | {"x": x}

    def operator(x, weight, bias, groups, eps, silu, temb):
        return module._forward_op(x, weight, bias, groups, eps, silu, temb)[0]

    actual = differentiate(operator, **made, groups=3)
    assert_near(actual, exact(made, 3), torch.float32)
    assert actual[0].is_contiguous(memory_format=module._format(x))
    assert_near(differentiate(group_norm_silu, **made, groups=3), exact(made, 3), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_the_cpu_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    made = make((2, 24, 7, 5), dtype)
    assert_near(differentiate(group_norm_silu, **made, groups=4), exact(made, 4), dtype)


def test_on_the_cpu_it_is_diffusers_to_the_last_bit() -> None:
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = resnet.ResnetBlock2D(in_channels=16, temb_channels=8, groups=4, eps=EPS)
    made = make((2, 16, 9, 7), torch.float32)
    with torch.no_grad():
        block.norm2.weight.copy_(made["weight"])
        block.norm2.bias.copy_(made["bias"])

    def as_in_the_block(x, weight, bias, groups, eps, silu, temb):
        hidden = block.norm2(x + temb[:, :, None, None])
        return block.nonlinearity(hidden)

    made["x"] = made["x"].requires_grad_()
    ours = group_norm_silu(made["x"], block.norm2.weight, block.norm2.bias, 4, EPS, True, made["temb"])
    theirs = as_in_the_block(made["x"], None, None, 4, EPS, True, made["temb"])
    leaves = [made["x"], block.norm2.weight, block.norm2.bias]
    assert torch.equal(ours, theirs)
    gradients = (torch.autograd.grad(y, leaves, made["dy"]) for y in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("temb", [True, False])
def test_opcheck(temb: bool) -> None:
    made = make((2, 12, 5, 3), torch.float32, temb=temb)
    leaves = [
        None if leaf is None else leaf.requires_grad_()
        for leaf in (made["x"], made["weight"], made["bias"], made["temb"])
    ]
    torch.library.opcheck(module._forward_op, (*leaves[:3], 4, EPS, True, leaves[3]))
    x, weight, bias, temb_ = (None if leaf is None else leaf.detach() for leaf in leaves)
    _, mean, rstd = module._forward_op(x, weight, bias, 4, EPS, True, temb_)
    torch.library.opcheck(module._backward_op, (made["dy"], x, weight, bias, mean, rstd, 4, True, temb_))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 12, 3)}, "x has shape"),
        ({"x": torch.zeros(0, 12, 3, 3)}, "x has shape"),
        ({"x": torch.zeros(2, 12, 3, 3, dtype=torch.float64)}, "x is torch.float64"),
        ({"groups": 5}, "groups is 5"),
        ({"groups": 0}, "groups is 0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"weight": torch.zeros(11)}, "weight is"),
        ({"bias": torch.zeros(12, dtype=torch.bfloat16)}, "bias is"),
        ({"temb": torch.zeros(1, 12)}, "temb is"),
        ({"weight": torch.zeros(12, device="meta")}, r"weight is torch.float32 \[12\] on meta"),
        ({"temb": torch.zeros(2, 12, device="meta")}, r"temb is torch.float32 \[2, 12\] on meta"),
    ],
)
def test_what_it_does_not_take(change: dict, message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 12, 3, 3),
        "weight": torch.zeros(12),
        "bias": torch.zeros(12),
        "groups": 4,
        "eps": EPS,
    }
    with pytest.raises(ValueError, match=f"^group_norm_silu: {message}"):
        group_norm_silu(**arguments | change)


def test_plans_of_sd_shapes() -> None:
    """Bundles divide the groups, tiles cover the slab, and 132 bundles that are wide enough fit into L2."""
    for case in SPEC.bench:
        samples, channels, height, width = map(int, case.name.split()[0].split("x"))
        pixels = height * width
        for backward in (False, True):
            for n in (1, 2, samples):
                plan = kernels.plan_launch(n, pixels, channels, 32, 2, backward=backward)
                assert 32 % plan.bundle == 0
                assert plan.block_c >= plan.bundle * channels // 32
                assert plan.splits * plan.split_rows >= pixels > (plan.splits - 1) * plan.split_rows
                row = plan.bundle * (channels // 32) * 2
                assert plan.bundle == 1 or row // 2 < kernels._ROW_BYTES or row * pixels <= kernels._SLAB_BYTES
                assert plan.rows * plan.block_c <= 512 * 32


# Side and channels of every group norm of SD 1.x and 2.x at 512 x 512.
SD_NORMS = [(64, (320, 640, 960)), (32, (320, 640, 960, 1280, 1920)), (16, (640, 1280, 1920, 2560)), (8, (1280, 2560))]


def test_rows_of_sd_shapes_touch_few_sectors() -> None:
    """Counted sector by sector: at most 1.2 times those that x has, at any number of rows of a micro-batch.

    And x is read from memory once: no slab is split over programs of two launches.
    """
    sector = 32
    for side, widths in SD_NORMS:
        for channels in widths:
            for samples in range(32, 67):
                for backward in (False, True):
                    plan = kernels.plan_launch(samples, side * side, channels, 32, 2, backward=backward)
                    row = plan.bundle * channels // 32 * 2
                    starts = range(0, channels * 2, row)  # of the bundles, in a pixel; a pixel begins with a sector
                    touched = sum((start + row - 1) // sector - start // sector + 1 for start in starts)
                    assert touched * sector <= 1.2 * channels * 2, (side, channels, samples)
                    assert plan.splits == 1, (side, channels, samples)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_backends_on_a_gpu(monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype) -> None:
    if backend == "native" and (reason := native.available()):
        pytest.skip(reason)
    monkeypatch.setattr(module.BACKENDS, "_setting", backend)
    shapes = [((2, 320, 64, 64), 32), ((2, 1280, 16, 16), 32), ((1, 2560, 8, 8), 32)]
    if backend == "native":  # Triton would compile each of them: the tests above are enough
        shapes += [*SHAPES[2:], *(((2, 32 * channels, 5, 3), 32) for channels in GROUP_CHANNELS)]
    for shape, groups in shapes:
        for temb, silu in ((True, True), (False, False)):
            made = make(shape, dtype, temb=temb)
            moved = {name: None if value is None else value.cuda() for name, value in made.items()}
            with poisoned():
                first, second = (differentiate(group_norm_silu, **moved, groups=groups, silu=silu) for _ in range(2))
            assert all(map(torch.equal, first, second)), "the same bits every time"
            # 8,192 terms at most, where SPEC's tolerance is for a thousand.
            assert_near(tuple(t.cpu() for t in first), exact(made, groups, silu), dtype, scale=8)
