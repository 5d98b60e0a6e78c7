"""What an expert call costs on a wire, by hand; and the message whose frames are counted is the one that is sent."""

import numpy as np
import pytest
import torch

from raymoe.experts.call import ExpertAnswer, ExpertCall
from raymoe.transport.frames import pack_answer, pack_call
from tests.testbed.wire import Cable, Call, acknowledgements, link_bytes, packets, stream_bytes

DECODE = Call(rows=1, pairs=4, hidden=256)
PROMPT = Call(rows=16, pairs=64, hidden=256)


def lengths(message: list) -> tuple[int, ...]:
    return tuple(len(memoryview(frame).cast("B")) for frame in message)


@pytest.mark.parametrize("call", [DECODE, PROMPT])
def test_frames_are_as_long_as_the_data_planes(call: Call) -> None:
    experts = np.zeros(call.pairs, dtype=np.int32)
    request = ExpertCall(
        layer=0, hidden_RH=torch.zeros(call.rows, call.hidden), experts_P=experts, rows_P=experts, scores_E=None
    )
    assert lengths(pack_call(1, request)) == call.request
    answer = ExpertAnswer(output_PH=torch.zeros(call.pairs, call.hidden), hits=0, misses=0)
    assert lengths(pack_answer(1, answer)) == call.answer


def test_a_decode_call_by_hand() -> None:
    # 64 + 1024 + 16 + 16 bytes in four frames of CURVE (33 each), three of them short (2), one long (9)
    assert stream_bytes(DECODE.request) == 1120 + 4 * 33 + 3 * 2 + 9 == 1267
    assert stream_bytes(DECODE.answer) == 4168 + 3 * 33 + 2 * 2 + 9 == 4280
    assert (packets(DECODE.request), packets(DECODE.answer)) == (1, 3)
    assert (acknowledgements(DECODE.request), acknowledgements(DECODE.answer)) == (0, 1)
    assert link_bytes(DECODE) == (1267 + 2 * 66, 4280 + 3 * 66)


def test_a_message_takes_the_delay_and_its_bytes_time_once_and_its_last_packet_again() -> None:
    cable = Cable(bits_per_s=1e6, delay_s=0.01)
    assert cable.message_s(DECODE.request) == pytest.approx(0.01 + 2 * 8 * (1267 + 90) / 1e6)
    rest = 4280 - 2 * 1448 + 90
    assert cable.message_s(DECODE.answer) == pytest.approx(0.01 + 8 * (4280 + 3 * 90 + rest) / 1e6)
    assert cable.call_s(DECODE) == cable.message_s(DECODE.request) + cable.message_s(DECODE.answer)
