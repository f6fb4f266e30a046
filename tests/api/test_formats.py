"""The tables are what bitsandbytes and the QLoRA paper define, and the C++ header is current."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from scipy.stats import norm

from qkern import formats, reference
from qkern.backends import _args, _cuda_paths

# The float32 bit patterns bitsandbytes stores.
NF4_BITS = """bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000
              3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"""
FP4_BITS = """00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000
              80000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000"""

# The constants of bitsandbytes' NF4 decision tree, ascending.
BITSANDBYTES_NF4_THRESHOLDS = (
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
)

TABLES = {
    "nf4": formats.NF4_CODES,
    "fp4": formats.FP4_CODES,
    "fp4_magnitudes": formats.FP4_MAGNITUDES,
    "signed": formats.DYNAMIC_MAP_SIGNED,
    "unsigned": formats.DYNAMIC_MAP_UNSIGNED,
    "nf4_midpoints": formats.NF4_MIDPOINTS,
    "fp4_thresholds": formats.FP4_MAGNITUDE_THRESHOLDS,
    "thresholds_signed": formats.DYNAMIC_THRESHOLDS_SIGNED,
    "thresholds_unsigned": formats.DYNAMIC_THRESHOLDS_UNSIGNED,
}


def float32_bytes(values: tuple[float, ...]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def bits(values: tuple[float, ...]) -> list[str]:
    return [struct.pack(">f", value).hex() for value in values]


@pytest.mark.parametrize("name", TABLES)
def test_every_entry_is_exactly_a_float32(name: str) -> None:
    values = TABLES[name]
    assert struct.unpack(f"<{len(values)}f", float32_bytes(values)) == values


def test_bit_patterns() -> None:
    assert bits(formats.NF4_CODES) == NF4_BITS.split()
    assert bits(formats.FP4_CODES) == FP4_BITS.split()


def test_nf4_follows_from_normal_quantiles() -> None:
    offset = 0.9677083
    positive = norm.ppf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    negative = -norm.ppf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    values = sorted([*positive, 0.0, *negative])
    derived = [value / max(values) for value in values]
    assert derived == pytest.approx(formats.NF4_CODES, abs=1e-6)


def test_nf4_midpoints_are_the_thresholds_of_bitsandbytes() -> None:
    assert float32_bytes(formats.NF4_MIDPOINTS) == float32_bytes(BITSANDBYTES_NF4_THRESHOLDS)


def test_fp4_magnitudes_are_the_sorted_codes() -> None:
    assert tuple(sorted(formats.FP4_CODES[:8])) == formats.FP4_MAGNITUDES
    codes = formats.FP4_MAGNITUDE_CODES
    assert sorted(codes) == list(range(8))
    assert tuple(formats.FP4_CODES[code] for code in codes) == formats.FP4_MAGNITUDES


@pytest.mark.parametrize(
    ("name", "prefix"), [("signed", "e732639a65f497b4"), ("unsigned", "305f002cc11278fb")]
)
def test_dynamic_maps(name: str, prefix: str) -> None:
    values = TABLES[name]
    assert hashlib.sha256(float32_bytes(values)).hexdigest().startswith(prefix)
    assert len(values) == 256
    assert all(low < high for low, high in itertools.pairwise(values))
    assert values[-1] == 1.0


def test_signed_map_has_zero_in_the_middle_and_no_minus_one() -> None:
    assert formats.DYNAMIC_MAP_SIGNED[127] == 0.0
    assert formats.DYNAMIC_MAP_SIGNED[0] == -0.992968738079071


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_maps_equal_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=signed)
    ours = formats.map_tensor("signed" if signed else "unsigned")
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("name", ["fp4_magnitudes", "signed", "unsigned"])
def test_nearest_thresholds_decide_exactly(name: str) -> None:
    """On each threshold and its neighbours, counting agrees with exact rational distances."""
    values = TABLES[name]
    thresholds = formats.nearest_thresholds(values)
    for index, threshold in enumerate(thresholds):
        low, high = Fraction(values[index]), Fraction(values[index + 1])
        around = torch.tensor(threshold)
        for t in (
            torch.nextafter(around, torch.tensor(-math.inf)).item(),
            threshold,
            torch.nextafter(around, torch.tensor(math.inf)).item(),
        ):
            nearer_to_high = Fraction(t) - low > high - Fraction(t)
            assert (t > threshold) == nearer_to_high


def test_rounding_down() -> None:
    third = formats._float32_down(1 / 3)
    assert third < 1 / 3 < torch.nextafter(torch.tensor(third), torch.tensor(1.0)).item()
    assert formats._float32_down(-1 / 3) < -1 / 3
    assert formats._float32_down(0.25) == 0.25
    assert formats._float32_down(1e-50) == 0.0
    assert formats._float32_down(-1e-50) == -(2.0**-149)


def test_sizes() -> None:
    assert [formats.packed_size(n) for n in (0, 1, 2, 3, 2**40 + 1)] == [0, 1, 1, 2, 2**39 + 1]
    assert [formats.num_blocks(n, 64) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
    assert list(formats.BLOCK_SIZES) == [2**i for i in range(5, 15)]
    assert formats.BLOCK_SIZES[0] == formats.MIN_BLOCK_SIZE
    assert formats.BLOCK_SIZES[-1] == formats.MAX_BLOCK_SIZE


def test_tensors_are_new_each_time() -> None:
    first = formats.code_tensor("nf4")
    first.zero_()
    assert formats.code_tensor("nf4").tolist() == list(formats.NF4_CODES)
    assert formats.code_tensor("fp4").signbit().tolist() == [False] * 8 + [True] * 8
    with pytest.raises(ValueError, match="format: got 'custom'"):
        formats.code_tensor("custom")
    with pytest.raises(ValueError, match="map: got 'both'"):
        formats.map_tensor("both")


def test_numbers_of_names_are_positions() -> None:
    assert [formats.FORMAT_IDS[name] for name in formats.FORMATS] == [0, 1, 2]
    assert {str(dtype): number for dtype, number in _args.DTYPE_IDS.items()} == {
        f"torch.{name}": number for number, name in enumerate(formats.DTYPES)
    }
    assert _cuda_paths.PATHS[: len(formats.CUDA_PATHS)] == tuple(formats.CUDA_PATHS)


def test_factors_lie_in_the_order_of_their_names() -> None:
    """The header declares them, the reference writes them, Triton's kernel reads them."""
    lr, beta1, beta2, eps, decay, scale, skip, t = 0.5, 0.75, 0.875, 2.0, 0.25, 3.0, 5.0, 2.0
    (row,) = reference.adamw_factors(torch.tensor([t]), lr, beta1, beta2, eps, decay, scale, skip)
    found = dict(zip(formats.ADAMW_FACTORS, row.tolist(), strict=True))
    assert found.pop("root_bias2_inverse") == pytest.approx((1 - beta2**t) ** -0.5)
    assert found == {
        "grad_scale": scale,
        "decay": 1 - lr * decay,
        "beta1_complement": 1 - beta1,
        "beta2": beta2,
        "beta2_complement": 1 - beta2,
        "step_size": pytest.approx(lr / (1 - beta1**t)),
        "eps": eps,
        "skip": skip,
        "step": t,
    }
    struct_of_factors = formats.header().split("struct AdamWFactors {")[1].split("};")[0]
    declared = re.findall(r"^  float (\w+);", struct_of_factors, re.MULTILINE)
    assert declared == list(formats.ADAMW_FACTORS)


def test_header_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert formats.main(["--check"]) == 0, capsys.readouterr().err


def test_header_literals_give_the_tables_back() -> None:
    """Reads the hexadecimal literals as a compiler does."""
    text = formats.header()
    for name, values in {
        "kNf4Codes": formats.NF4_CODES,
        "kNf4Midpoints": formats.NF4_MIDPOINTS,
        "kFp4Codes": formats.FP4_CODES,
        "kFp4Magnitudes": formats.FP4_MAGNITUDES,
        "kFp4MagnitudeMidpoints": formats.FP4_MAGNITUDE_THRESHOLDS,
        "kDynamicMapSigned": formats.DYNAMIC_MAP_SIGNED,
        "kDynamicThresholdsSigned": formats.DYNAMIC_THRESHOLDS_SIGNED,
        "kDynamicMapUnsigned": formats.DYNAMIC_MAP_UNSIGNED,
        "kDynamicThresholdsUnsigned": formats.DYNAMIC_THRESHOLDS_UNSIGNED,
    }.items():
        start = text.index(f"float {name}[{len(values)}] = {{")
        body = text[text.index("{", start) + 1 : text.index("}", start)]
        read = tuple(float.fromhex(item.strip().removesuffix("f")) for item in body.split(","))
        assert float32_bytes(read) == float32_bytes(values), name


def test_stale_header_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(formats, "HEADER_PATH", tmp_path / "codes.h")
    assert formats.main(["--check"]) == 1
    assert formats.main([]) == 0
    assert formats.main(["--check"]) == 0
    written = (tmp_path / "codes.h").read_text()
    (tmp_path / "codes.h").write_text(written.replace("kMaxBlockSize = 16384", "kMaxBlockSize = 1"))
    capsys.readouterr()
    assert formats.main(["--check"]) == 1
    assert "+inline constexpr int kMaxBlockSize = 16384;" in capsys.readouterr().err


def test_no_source_tree_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(formats, "HEADER_PATH", tmp_path / "missing" / "codes.h")
    assert formats.main([]) == 2
    assert "source tree" in capsys.readouterr().err


def test_script_runs_without_torch() -> None:
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['formats.py', '--check'];"
        f"runpy.run_path({str(Path(formats.__file__))!r}, run_name='__main__')"
    )
    subprocess.run([sys.executable, "-S", "-c", code], check=True, capture_output=True)


def test_a_table_of_another_machine_is_the_table() -> None:
    """Where torch has no AVX2, bitsandbytes computes 42 values one or two floats away."""
    table = formats.map_tensor("signed")
    bits = table.view(torch.int32)
    for floats, is_it in ((1, True), (-2, True), (9, False), (-9, False)):
        moved = (bits + floats * (torch.arange(256) % 6 == 0).int()).view(torch.float32)
        assert not torch.equal(moved, table)
        assert formats.is_table(moved, table) is is_it
    assert formats.is_table(torch.tensor([0.0]), torch.tensor([-0.0]))
    for wrong in (table[:-1], table * math.nan, table.flip(0)):
        assert not formats.is_table(wrong, table)
