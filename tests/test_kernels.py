"""The field's drive without its tensor H against the equation written with it."""

import os
import subprocess
import sys

import pytest
import torch

from mnemodyn.model import kernels
from mnemodyn.model.kernels import field_drive, field_drive_eager

ACTIVATIONS = list(kernels.ACTIVATIONS)
CUDA, INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"

# (batch, time, parcel, channel, rank): no multiple of a tile, one entry of each, a rank of its own.
SIZES = [(2, 41, 7, 35, 3), (1, 1, 1, 1, 1), (3, 5, 33, 2, 8), (1, 70, 2, 40, 5)]


def inputs(size, dtype=torch.float64, bias=True, seed=0, device="cpu"):
    batch, time, parcels, channels, rank = size
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, time, rank),
        (batch, time, parcels),
        (parcels * channels, rank),
        (parcels * channels,),
    ]
    made = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes
    ]
    return [a.requires_grad_() for a in made[: 3 + bias]] + [None] * (not bias)


def with_gradients(f, tensors, activation):
    """v, then the gradients of the tensors, for a gradient of v that every dtype holds exactly."""
    v = f(*tensors, activation)
    given = (torch.arange(v.numel(), device=v.device) % 17 - 8).view(v.shape).to(v.dtype) / 8
    return v, *torch.autograd.grad(v, [a for a in tensors if a is not None], given)


def oracle(tensors, activation):
    """The eager twin in float64, from the numbers the tensors really hold."""
    doubles = [None if a is None else a.detach().double().requires_grad_() for a in tensors]
    return with_gradients(field_drive_eager, doubles, activation)


def assert_close(got, expected, dtype, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        # Relative to the tensor: each entry is a sum with terms of either sign.
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), (a, b)


PRECISION = [
    (torch.float64, 1e-12),
    (torch.float32, 1e-5),
    (torch.bfloat16, 2**-8),
    (torch.float16, 2**-11),
]


@pytest.fixture(params=[4096, kernels.CPU_TILE_BYTES], ids=["small tiles", "tiles"])
def tile_bytes(request, monkeypatch):
    """Small: several tiles of rows and of parcels, with remainders."""
    monkeypatch.setattr(kernels, "CPU_TILE_BYTES", request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_drive_and_gradients_are_those_of_the_equation(
    tile_bytes, activation, dtype, tolerance, size, bias
):
    tensors = inputs(size, dtype, bias)
    assert_close(
        with_gradients(field_drive, tensors, activation),
        oracle(tensors, activation),
        dtype,
        tolerance,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    assert torch.autograd.gradcheck(lambda *a: field_drive(*a, activation), inputs((2, 3, 2, 2, 2)))


def test_differentiates_once():
    z, *rest = inputs((1, 3, 2, 2, 2))
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(field_drive(z, *rest, "tanh").sum(), z, create_graph=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_where_the_derivative_is_data(activation):
    """As in the first block, where the work for its gradient is left out."""
    z, derivative, weight, bias = inputs((2, 9, 4, 3, 2))
    expected = torch.autograd.grad(
        field_drive_eager(z, derivative, weight, bias, activation).sum(), [z, weight, bias]
    )
    got = torch.autograd.grad(
        field_drive(z, derivative.detach(), weight, bias, activation).sum(), [z, weight, bias]
    )
    torch.testing.assert_close(got, expected)


def test_large_arguments_saturate():
    z, derivative, weight, bias = (t.detach().float() for t in inputs((1, 4, 3, 2, 2)))
    for activation in ACTIVATIONS:
        tensors = [
            a.requires_grad_() for a in (1e4 * z, derivative.clone(), weight.clone(), bias.clone())
        ]
        assert_close(
            with_gradients(field_drive, tensors, activation),
            oracle(tensors, activation),
            z.dtype,
            1e-5,
        )


def test_strided_inputs():
    z, derivative, weight, bias = (t.detach() for t in inputs((2, 6, 5, 4, 3)))
    strided = [
        z.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([derivative, derivative], dim=-1)[..., 0],
        weight.T.contiguous().T,
        bias[:1].expand(20),
    ]
    assert not any(a.is_contiguous() for a in strided)
    tensors = [a.requires_grad_() for a in strided]
    got = with_gradients(field_drive, tensors, "tanh")
    assert_close(got, oracle(tensors, "tanh"), torch.float64, 1e-12)


def test_dtypes_may_differ():
    """As they do inside autocast, which gives a latent in bfloat16 and leaves weights and data in float32."""
    z, derivative, weight, bias = inputs((2, 6, 5, 4, 3), torch.float32)
    low = z.detach().bfloat16().requires_grad_()
    expected = oracle([low, derivative, weight, bias], "tanh")
    with torch.autocast("cpu", torch.bfloat16):
        v, dz, *others = with_gradients(field_drive, [low, derivative, weight, bias], "tanh")
    assert_close([v, *others], [expected[0], *expected[2:]], torch.float32, 1e-5)
    assert_close([dz], [expected[1]], torch.bfloat16, 2**-8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_threads_share_the_work(monkeypatch, activation):
    monkeypatch.setattr(kernels, "CPU_TILE_BYTES", 1024)
    tensors = inputs((2, 41, 7, 35, 3))
    alone = with_gradients(field_drive, tensors, activation)
    try:
        torch.set_num_threads(3)
        shared = with_gradients(field_drive, tensors, activation)
        again = with_gradients(field_drive, tensors, activation)
        with torch.inference_mode():
            assert torch.equal(field_drive(*tensors, activation), shared[0])
        monkeypatch.setattr(kernels.Tiles, "drive", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            field_drive(*tensors, activation)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(shared, again, strict=True))
    torch.testing.assert_close(shared, alone, rtol=1e-12, atol=1e-12)


def test_no_scans():
    tensors = inputs((0, 6, 5, 4, 3))
    v, *gradients = with_gradients(field_drive, tensors, "tanh")
    assert v.shape == (0, 6, 4)
    assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, tensors, strict=True))


MEMORY = r"""
import re, torch
from pathlib import Path
from mnemodyn.model.kernels import field_drive, field_drive_eager
torch.set_num_threads(2)
def peak():  # bytes; ru_maxrss would begin at the parent's
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
def grown(f, time, parcels, channels):
    shapes = [(1, time, 3), (1, time, parcels), (parcels * channels, 3), (parcels * channels,)]
    tensors = [torch.randn(s).requires_grad_() for s in shapes]
    before = peak()
    f(*tensors, "tanh").sum().backward()
    return peak() - before
for f in field_drive, field_drive_eager:
    grown(f, 10, 10, 10)
    print(grown(f, 500, 200, 1000) / (500 * 200 * 1000 * 4))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_h_never_exists():
    """Growth of the process over forward and backward, in units of H (400 MB)."""
    out = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    ).stdout
    lean, eager = map(float, out.split())
    assert lean < 0.1
    assert eager > 0.9


def test_triton_in_the_interpreter():
    """The kernels on the CPU, in a process of their own: triton reads the variable when it is imported."""
    pytest.importorskip(
        "triton", reason="needs triton: pip install 'mnemodyn[triton]'", exc_type=ImportError
    )
    command = [sys.executable, "-m", "pytest", "-k", "test_triton_kernels", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "16 passed" in done.stdout


@pytest.mark.skipif(
    not (CUDA or INTERPRETED), reason="needs CUDA; test_triton_in_the_interpreter runs it without"
)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "size", "bias"),
    [
        (torch.float32, 1e-5, SIZES[0], True),
        (torch.float32, 1e-5, SIZES[1], False),
        (torch.float32, 1e-5, SIZES[2], False),
        (torch.bfloat16, 2**-8, SIZES[3], True),
    ],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_kernels(monkeypatch, activation, dtype, tolerance, size, bias):
    from mnemodyn.model import field_triton

    if CUDA:
        assert kernels._core(torch.zeros(1, 1, device="cuda")) is field_triton
    else:
        monkeypatch.setattr(kernels, "_core", lambda z: field_triton)
    tensors = inputs(size, dtype, bias, device="cuda" if CUDA else "cpu")
    got = with_gradients(field_drive, tensors, activation)
    assert_close(got, oracle(tensors, activation), dtype, tolerance)
    if CUDA:
        again = with_gradients(field_drive, tensors, activation)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.filterwarnings(
    "ignore:AnnAssign.__init__ missing"
)  # Triton's own, from Python 3.13 on
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_compiles_without_a_gpu(tmp_path, monkeypatch, activation):
    """To machine code for an H100: what the interpreter accepts, the compiler need not."""
    triton = pytest.importorskip(
        "triton", reason="needs triton: pip install 'mnemodyn[triton]'", exc_type=ImportError
    )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mnemodyn.model import field_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "R": 4,
        "RR": 4,
        "NAME": activation,
        "BN": field_triton.ROWS,
        "BK": field_triton.CHANNELS,
    }
    for kernel in (field_triton._drive, field_triton._drive_rows, field_triton._drive_weights):
        signature = {
            a: "constexpr"
            if a in constants
            else "i32"
            if a in ("N", "P", "K", "SHARE")
            else "*fp32"
            for a in kernel.arg_names
        }
        source = ASTSource(
            kernel, signature, {a: c for a, c in constants.items() if a in kernel.arg_names}
        )
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=field_triton.FUSED)
        assert made.asm["cubin"]
