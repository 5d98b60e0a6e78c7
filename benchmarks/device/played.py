"""A GPU played by a thread, as far as the host of a captured step sees it: in each layer it computes for a while, tells
what a router says, and waits for slots and weights. In C++, so that it does not share Python's lock with its host."""

import ctypes
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raymoe.engine.dialogue import Dialogue, Shared
from raymoe.kernels.building import find_compiler

SOURCE = r"""
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace {
using Clock = std::chrono::steady_clock;
std::thread device;
std::atomic<bool> is_done{true};

void compute_until(Clock::time_point end) {
  while (Clock::now() < end) {
  }
}
}  // namespace

extern "C" {

// told: by layer where to tell, words: how many, data: what; decided: where the answer is awaited, 2 k words of it.
void played_step(int64_t layers, uint32_t* const* told, const uint32_t* const* data, const int64_t* words,
                 int64_t* const* decided, int64_t k, int64_t turn, int64_t layer_ns, int64_t head_ns,
                 double* waited_s) {
  if (device.joinable()) device.join();
  is_done = false;
  device = std::thread([=] {
    auto begun = Clock::now();
    for (int64_t layer = 0; layer < layers; layer++) {
      compute_until(begun + std::chrono::nanoseconds(layer_ns));
      for (int64_t i = 0; i < words[layer]; i++) __atomic_store_n(told[layer] + i, data[layer][i], __ATOMIC_RELAXED);
      const auto asked = Clock::now();
      for (bool is_answered = false; !is_answered;) {
        is_answered = true;
        for (int64_t i = 0; i < 2 * k; i++)
          if (__atomic_load_n(decided[layer] + i, __ATOMIC_ACQUIRE) >> 32 < turn) is_answered = false;
      }
      begun = Clock::now();
      waited_s[layer] = std::chrono::duration<double>(begun - asked).count();
    }
    compute_until(begun + std::chrono::nanoseconds(head_ns));
    is_done = true;
  });
}

int played_is_done() { return is_done; }

void played_close() {
  if (device.joinable()) device.join();
}
}
"""


class PlayedDevice:
    """Runs steps.

    Args:
        talks: of the layers, which know what each of them tells.
        layer_s, head_s: for which it computes a layer, and what comes after the last one.

    Attributes:
        waited_s: for which it waited in each layer of the last step.

    Raises:
        OSError: there is no C++ compiler.
    """

    def __init__(self, talks: list[Dialogue], layer_s: float, head_s: float) -> None:
        self._library = _built()
        self._told = _addresses([talk.told for talk in talks])
        self._decided = np.array([talk.memory()["decided"] for talk in talks], dtype=np.uint64)
        self._words = np.array([talk.words.total for talk in talks], dtype=np.int64)
        self._top_k = talks[0].memory()["k"]
        self._times_ns = int(1e9 * layer_s), int(1e9 * head_s)
        self._data: list[np.ndarray] = []
        self.waited_s = np.zeros(len(talks))

    def run(self, turn: int, data: list[np.ndarray]) -> None:
        """Begin a step in which the layers tell this."""
        self._data = data
        number, pointer = ctypes.c_int64, lambda array: ctypes.c_void_p(array.ctypes.data)
        data_addresses = self._data_addresses = _addresses(data)
        self._library.played_step(
            number(len(data)),
            pointer(self._told),
            pointer(data_addresses),
            pointer(self._words),
            pointer(self._decided),
            number(self._top_k),
            number(turn),
            *map(number, self._times_ns),
            pointer(self.waited_s),
        )

    def is_done(self) -> bool:
        """Whether the step has ended."""
        return bool(self._library.played_is_done())

    def close(self) -> None:
        """Wait for the step's end."""
        self._library.played_close()


def share(elements: int, dtype: torch.dtype) -> Shared:
    """Memory that host and a played device both see: the host's."""
    memory = torch.zeros(elements, dtype=dtype)
    return Shared(memory.numpy(), memory)


def _addresses(arrays: list[np.ndarray]) -> np.ndarray:
    return np.array([array.ctypes.data for array in arrays], dtype=np.uint64)


def _built() -> Any:
    compiler = find_compiler()
    if compiler is None:
        raise OSError("a played device needs a C++ compiler: c++, g++ or clang++")
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "played.cpp"), Path(directory, "played.so")
        source.write_text(SOURCE)
        command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", "-pthread", str(source), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(str(library))
