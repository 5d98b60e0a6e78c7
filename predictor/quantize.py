"""Forms in which a shadow stores an expert's matrix: bfloat16, int8, or 4, 3 and 2 bits in groups.

Recall of the embedded model's true top 4, teacher-forced over 5120 held-out tokens with the trunk in float32, and the
relative error of the weights: int8 0.999 (0.7%), 4-bit 0.987 (7.7%), 3-bit 0.973 (17%), 2-bit 0.938 (39%). Groups
keep their smallest and largest value (asymmetric). For the same groups of 32, symmetric codes give 0.985, 0.971 and
0.920 at their best, nf4 0.985; fitting scale and minimum to the least error lowers the error by a tenth, but helps
recall by no more than chance, and harms it at 2 bits.

A scale and a minimum in float16 cost one bit per weight: 4 bits are 5, 3 are 4, 2 are 3.

The bytes are laid out for ``raymoe_quantized_experts`` in raymoe/kernels/native.cpp, which describes them too.

O outputs of a matrix, I inputs, G groups of 32 inputs, B blocks of four outputs; ... stands for any leading dimensions.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from raymoe.errors import ConfigError

GROUP = 32  # inputs; kGroup of the kernels
BLOCK = 4  # outputs
LANES = 16  # words of a block, each with eight codes
FIELDS = GROUP * BLOCK // LANES
SMALLEST_SCALE = 2.0**-24  # of float16: a group of equal values has none of its own
SPAN = 64  # inputs of int8 that lie in 16 words; kSpan of the kernels
LARGEST_CODE = 127  # of int8, on both sides


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMatrix:
    """A matrix, or several with the same leading dimensions, as a form stores it."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


class MatrixForm(Protocol):
    """One way to store matrices [O, I] so that the kernels can read them."""

    bits: int

    def store(self, weight_OI: torch.Tensor) -> StoredMatrix:
        """Quantise one matrix of any floating type."""
        ...

    def restore(self, stored: StoredMatrix, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """The values that the codes stand for, [..., O, I] with ``shape`` as (O, I)."""
        ...


def matrix_form(bits: int) -> MatrixForm:
    """The form with this many bits per weight. Raises ConfigError where there is none."""
    if bits == 16:
        return PlainForm()
    if bits == 8:
        return ChannelForm()
    if bits in (4, 3, 2):
        return GroupForm(bits)
    raise ConfigError(f"a shadow's experts have 16, 8, 4, 3 or 2 bits, not {bits}")


class PlainForm:
    """bfloat16 as it is."""

    bits = 16

    def store(self, weight_OI: torch.Tensor) -> StoredMatrix:
        """A copy in bfloat16."""
        return StoredMatrix(
            codes=weight_OI.to(torch.bfloat16, copy=True).contiguous(),
            scales=weight_OI.new_empty(0, dtype=torch.float16),
        )

    def restore(self, stored: StoredMatrix, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """The bfloat16 values in ``dtype``."""
        return stored.codes.to(dtype)


class ChannelForm:
    """int8 with a float16 scale per output, symmetric: codes [..., O, I padded to 64], scales [..., O].

    Of each 64 inputs, word j holds 16 * k + j as its byte k. Outputs are padded to a multiple of 4.
    """

    bits = 8

    def store(self, weight_OI: torch.Tensor) -> StoredMatrix:
        """Codes from -127 to 127."""
        outputs, inputs = weight_OI.shape
        weight_OI = nn.functional.pad(weight_OI.float(), (0, -inputs % SPAN, 0, -outputs % BLOCK))
        largest_O = weight_OI.abs().amax(dim=1)
        scales_O = (largest_O / LARGEST_CODE).half().clamp_min(SMALLEST_SCALE)
        codes_OI = (weight_OI / scales_O.float().unsqueeze(1)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
        spans = codes_OI.to(torch.int8).unflatten(1, (-1, SPAN // LANES, LANES))
        return StoredMatrix(codes=spans.transpose(-1, -2).flatten(1), scales=scales_O)

    def restore(self, stored: StoredMatrix, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """code * scale, computed in float32."""
        spans = stored.codes.unflatten(-1, (-1, LANES, SPAN // LANES)).transpose(-1, -2)
        values = spans.flatten(-3).float() * stored.scales.float().unsqueeze(-1)
        return values[..., : shape[0], : shape[1]].to(dtype)


class GroupForm:
    """A few bits per weight, with a float16 scale and minimum for 32 neighbouring inputs of an output.

    value = scale * code + minimum. codes [..., B, G, 16 * bits] uint8, scales [..., B, G, 2, 4]: the scales of a
    block's four outputs, then their minima. Outputs are padded to a multiple of 4, inputs to one of 32, with their
    last value, so that padding widens no group.

    Args:
        bits: 4, 3 or 2.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def store(self, weight_OI: torch.Tensor) -> StoredMatrix:
        """Codes from 0 to 2^bits - 1, packed without gaps."""
        values = as_blocks(weight_OI.float())
        lowest, highest = values.aminmax(dim=-1, keepdim=True)
        minimum = lowest.half()
        scale = ((highest - lowest) / self._largest).half().clamp_min(SMALLEST_SCALE)
        codes = (values - minimum.float()).div_(scale.float()).round_().clamp_(0, self._largest)
        scales = torch.stack((scale, minimum), dim=-1)[:, :, :, 0].transpose(-1, -2)
        return StoredMatrix(codes=self._pack(codes.to(torch.int32)), scales=scales.contiguous())

    def restore(self, stored: StoredMatrix, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """scale * code + minimum, computed in float32."""
        scale, minimum = stored.scales.float().unsqueeze(-1).unbind(-3)
        return from_blocks(self._unpack(stored.codes).float() * scale + minimum, shape).to(dtype)

    @property
    def _largest(self) -> int:
        return (1 << self.bits) - 1

    def _pack(self, codes: torch.Tensor) -> torch.Tensor:
        """[B, G, 4, 32] -> [B, G, 16 * bits]; word j holds columns j and j + 16 of outputs 0, 1, 2, 3 in turn."""
        words = torch.zeros(*codes.shape[:2], LANES, dtype=torch.int32, device=codes.device)
        for place, field in enumerate(codes.reshape(*codes.shape[:2], FIELDS, LANES).unbind(-2)):
            words |= field << (self.bits * place)
        if self.bits == 4:
            return words.view(torch.uint8)
        low = words.to(torch.int16).view(torch.uint8)
        return low if self.bits == 2 else torch.cat((low, (words >> 16).to(torch.uint8)), dim=-1)

    def _unpack(self, codes: torch.Tensor) -> torch.Tensor:
        """[..., B, G, 16 * bits] -> [..., B, G, 4, 32]."""
        if self.bits == 4:
            words = codes.view(torch.int32)
        else:
            words = codes[..., : 2 * LANES].contiguous().view(torch.int16).int() & 0xFFFF
            if self.bits == 3:
                words = words | codes[..., 2 * LANES :].int() << 16
        fields = [(words >> (self.bits * place)) & self._largest for place in range(FIELDS)]
        return torch.stack(fields, dim=-2).reshape(*words.shape[:-1], BLOCK, GROUP)


def as_blocks(weight_OI: torch.Tensor) -> torch.Tensor:
    """[O, I] -> [B, G, 4, 32], padded with the last output and input."""
    outputs, inputs = weight_OI.shape
    more_outputs, more_inputs = -outputs % BLOCK, -inputs % GROUP
    if more_inputs:
        weight_OI = torch.cat((weight_OI, weight_OI[:, -1:].expand(-1, more_inputs)), dim=1)
    if more_outputs:
        weight_OI = torch.cat((weight_OI, weight_OI[-1:].expand(more_outputs, -1)))
    return weight_OI.reshape(-1, BLOCK, weight_OI.shape[1] // GROUP, GROUP).transpose(1, 2)


def from_blocks(blocks: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """[..., B, G, 4, 32] -> [..., O, I], without the padding."""
    *leading, count, groups, _, _ = blocks.shape
    padded = blocks.transpose(-3, -2).reshape(*leading, count * BLOCK, groups * GROUP)
    return padded[..., : shape[0], : shape[1]]
