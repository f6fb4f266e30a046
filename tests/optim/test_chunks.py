"""How moments are laid out in chunks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qkern import formats
from qkern.optim._chunks import plan
from qkern.optim._moments import BLOCK


@given(
    numels=st.lists(st.integers(0, 40_000) | st.integers(0, 600), max_size=12),
    bits=st.lists(st.sampled_from([32, 8]), min_size=12, max_size=12),
    chunk_bytes=st.integers(1, 64).map(lambda pages: pages * 4096),
)
def test_plan_has_every_element_once(numels: list[int], bits: list[int], chunk_bytes: int) -> None:
    bits = bits[: len(numels)]
    reached = [0] * len(numels)
    chunks = plan(numels, bits, chunk_bytes)
    for pieces in chunks:
        taken = 0
        buffer = memoryview(bytearray(chunk_bytes))
        for piece in pieces:
            assert piece.bits == bits[piece.param]
            assert piece.first == reached[piece.param]  # in order, without gaps
            assert piece.first % BLOCK == 0
            assert piece.numel > 0
            reached[piece.param] += piece.numel
            for offset, numel, dtype in piece.parts():
                assert offset >= taken
                assert offset % 64 == 0
                taken = offset + numel * dtype.itemsize
            assert taken <= piece.end <= chunk_bytes
            moments = piece.moments(buffer)
            assert moments.bits == piece.bits
            assert moments.exp_avg.numel() == moments.exp_avg_sq.numel() == piece.numel
            if piece.bits == 8:
                blocks = formats.num_blocks(piece.numel, BLOCK)
                assert [t.numel() for t in moments.absmaxes()] == [blocks, blocks]
        assert pieces
    assert reached == numels
    held = sum(n * (8 if b == 32 else 2) for n, b in zip(numels, bits, strict=True))
    assert len(chunks) <= 1 + held // (chunk_bytes // 2)
