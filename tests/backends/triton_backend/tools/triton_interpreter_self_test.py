"""Proof that this Triton's interpreter, repaired by ``triton_interpreter``, gives right numbers and raises where it
must.
"""

from triton_interpreter import configure, install


def self_test():
    """Raises AssertionError if this Triton version defeats a repair or a check; returns the list of what was proven."""
    install()
    import torch
    import triton
    import triton_interpreter_kernels as k  # kernels must live in a file whose source Triton can read
    from triton.runtime.errors import InterpreterError

    done, g = [], torch.Generator().manual_seed(0)

    def rand(*s):
        return torch.randn(*s, generator=g)

    def expect(name, ok):
        assert ok, f"triton {triton.__version__}: {name}"
        done.append(name)

    def raises(text, fn):
        try:
            fn()
        except (InterpreterError, AssertionError) as e:
            return text in str(e) + str(e.__cause__)
        return False

    bf = torch.bfloat16
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-40, -9e-39, 3.4e38])
    for name, x in (
        ("fp32", torch.cat([rand(1016) * 3, special])),
        ("fp64", rand(1024).double()),
        ("fp16", rand(1024).half()),
        ("int32", torch.arange(-512, 512, dtype=torch.int32)),
        ("int64", torch.arange(-512, 512) * 1000),
    ):
        y = torch.empty(1024, dtype=bf)
        k.copy[(1,)](x, y, B=1024)
        expect(f"{name} -> bf16 rounds to nearest even", torch.equal(y.nan_to_num(7), x.to(bf).nan_to_num(7)))
    x = (torch.rand(256, generator=g) * 1e-38).to(bf)
    y = torch.empty(256)
    k.copy[(1,)](x, y, B=256)
    expect("bf16 subnormals load", torch.equal(y, x.float()))
    a, b, z = rand(256).to(bf), rand(256).to(bf), torch.empty(4, 256, dtype=bf)
    k.bf16_ops[(1,)](a, b, z, B=256)
    expect("bf16 arithmetic", torch.equal(z, torch.stack([a * b + a, torch.minimum(a, b), -a, a.clamp(-1, 1)])))
    a, b, c = rand(32, 32), rand(32, 32), torch.empty(32, 32)
    for dt, precision, lo, hi in (
        (bf, "ieee", 0, 1e-5),
        (torch.float32, "ieee", 0, 1e-5),
        (torch.float32, "tf32", 1e-4, 1e-1),
    ):
        k.dot[(1,)](a.to(dt), b.to(dt), c, N=32, P=precision)
        err = (c.double() - a.to(dt).double() @ b.to(dt).double()).abs().max().item()
        expect(f"dot {dt} {precision}", lo <= err <= hi)
    x = torch.zeros(1, dtype=bf)
    k.atomic[(4,)](x)
    expect("bf16 atomic_add", x.item() == 4)
    x, y = torch.rand(8, generator=g), torch.empty(8)
    k.libdevice_log1p[(1,)](x, y, B=8)
    expect("libdevice", torch.allclose(y, x.log1p()))
    nan = float("nan")
    x, y = torch.tensor([nan, 1.0, 5.0, nan]), torch.empty(2, 4)
    k.nan_rules[(1,)](x, torch.tensor([1.0, nan, 2.0, nan]), y, B=4)
    want = torch.tensor([[1.0, 1.0, 5.0, 9.0], [-1.0, 1.0, 1.0, -1.0]])
    expect("maximum drops NaN, clamp maps NaN to the lower bound", torch.equal(y.nan_to_num(9), want))
    for i in (0, 1):
        with configure(config_index=i):
            y = torch.zeros(100)
            k.tuned[lambda m: (triton.cdiv(100, m["B"]),)](torch.zeros(100), y, 100)
            expect(f"autotune config {i}", bool((y == 1).all()))
    expect("int32 overflow", raises("overflow", lambda: k.overflow[(1,)](torch.zeros(1, dtype=torch.int64), 151936)))
    expect("device_assert", raises("bad value", lambda: k.asserts[(1,)](torch.zeros(1))))
    wide = torch.zeros(4, 80)[:, :37]
    expect(
        "bounds: past the end", raises("out of bounds", lambda: k.read_at[(1,)](torch.zeros(50), torch.zeros(1), 50))
    )
    expect("bounds: gap between rows", raises("out of bounds", lambda: k.read_at[(1,)](wide, torch.zeros(1), 40)))
    k.read_at[(1,)](wide, torch.zeros(1), 80 + 36)
    expect("bounds: inside a strided view", True)
    expect("race: store/store", raises("race", lambda: k.store_all[(2,)](torch.zeros(1, dtype=torch.int32))))
    expect("race: load/store", raises("race", lambda: k.shift[(4,)](torch.zeros(8))))
    results = []
    for order in ("forward", "reverse", 3):
        with configure(order=order, races=False):
            y = torch.zeros(1, dtype=torch.int32)
            k.store_all[(5,)](y)
            results.append(y.item())
    expect("program order", results[0] == 4 and results[1] == 0 and results[2] in range(5))
    for order in ("forward", "reverse", 3):
        with configure(order=order, programs=(1, 69_999)):
            y = torch.zeros(70_000, dtype=torch.int32)
            k.number[(70_000,)](y)
            expect("chosen programs", y.nonzero()[:, 0].tolist() == [1, 69_999] and y[1] == 70_001)
    expect("long second axis", raises("65535", lambda: k.number[(1, 70_000)](torch.zeros(1, dtype=torch.int32))))
    expect(
        "16-bit sum",
        raises("accumulates in 16 bits", lambda: k.sum16[(1,)](torch.ones(8, dtype=bf), torch.zeros(1), B=8)),
    )
    y = torch.zeros(1)
    k.no_other[(1,)](torch.ones(8), y, 5, B=8)
    expect("masked lanes are poisoned", bool(y.isnan()))
    y = torch.zeros(2, dtype=bf)
    k.max16[(1,)](-torch.arange(1.0, 9.0).to(bf), y, B=8)
    expect("bf16 max and min", y.tolist() == [-1.0, -8.0])
    return done
