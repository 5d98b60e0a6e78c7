"""The kernels' pool of threads runs each task of each job once, also where a helper is late between two jobs."""

import shutil
import subprocess
from pathlib import Path

import pytest

from raymoe.kernels.building import COMPILERS, SOURCE

JOBS, HELPERS = 4000, 5
BETWEEN_JOBS = "    done_.store(0, std::memory_order_relaxed);\n"
MAIN = r"""
#include <cstdio>
#include <memory>

int main() {
  unsigned state = 1;
  long wrong = 0;
  for (int job = 0; job < JOBS; job++) {
    state = state * 1664525u + 1013904223u;
    const int count = 2 + (state >> 24) % 40;
    auto ran = std::make_unique<std::atomic<int>[]>(64);
    for (int i = 0; i < 64; i++) ran[i] = 0;
    parallel(count, HELPERS + 1, [&](int64_t index) { ran[index]++; });
    for (int i = 0; i < 64; i++) wrong += ran[i] != (i < count);
  }
  std::printf("%ld", wrong);
  std::fflush(stdout);
  std::_Exit(0);  // helpers never end
}
"""


def test_a_late_helper_takes_no_task_of_the_next_job(tmp_path: Path) -> None:
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source = SOURCE.read_text()
    end = source.index("\n}\n", source.index("void parallel(")) + 3
    assert source.count(BETWEEN_JOBS) == 1
    slow = BETWEEN_JOBS + "    for (volatile int k = 0; k < 2000; k++) {}\n    std::this_thread::yield();\n"
    program = source[:end].replace(BETWEEN_JOBS, slow) + "}  // namespace\n"
    file = tmp_path / "pool.cpp"
    file.write_text(f"#define JOBS {JOBS}\n#define HELPERS {HELPERS}\n#include <cstdlib>\n{program}{MAIN}")
    subprocess.run([compiler, "-O2", "-std=c++17", "-pthread", str(file), "-o", str(tmp_path / "pool")], check=True)
    done = subprocess.run([str(tmp_path / "pool")], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0", "tasks that did not run once"
