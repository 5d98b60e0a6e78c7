// Decode-time kernels for small CPUs: matrix times vector, and one token through its experts.
//
// At one row per call the work is reading weights once, so the aim is to stream them at the memory's rate with
// no intermediate tensors. Accumulation is float32 in a fixed order per output element, so results do not depend
// on the number of threads. Intermediate values are rounded to the storage type where the eager modules would.
//
// Plain C interface for ctypes; GCC/Clang vector extensions instead of intrinsics, so ARM boards work too.

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>

namespace {

// Threads that help while they can. The caller works through the tasks of a job itself; helpers that are awake take
// tasks from the same counter. Nobody ever waits for a helper that has not begun, as an OpenMP barrier would: on a
// small machine whose cores are busy that wait can last longer than the whole job.
class Pool {
 public:
  using Task = void (*)(const void* context, int64_t index);

  // Runs task(context, 0 .. count-1) on the caller and up to `helpers` more threads.
  void run(Task task, const void* context, int64_t count, int helpers) {
    std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
    if (helpers <= 0 || count < 2 || !mine.owns_lock()) {  // another caller has the pool: do without
      for (int64_t i = 0; i < count; i++) task(context, i);
      return;
    }
    while (started_ < helpers) {
      started_++;
      std::thread([this] { help(); }).detach();
    }
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint64_t job = (next_.load(std::memory_order_relaxed) >> 32) + 1;
    next_.store(job << 32);
    if (sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    while (take()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < count; spins++)
      if (spins > kSpins) std::this_thread::yield();
  }

 private:
  static constexpr int kSpins = 20000;  // some tens of microseconds: about the gap between two calls in a decode step

  // One task of the current job, if any is left. A success of the exchange proves that the job read is still the
  // current one: a new one begins only after every task of the old one was taken and done.
  bool take() {
    uint64_t seen = next_.load(std::memory_order_acquire);
    for (;;) {
      const int64_t index = int64_t(seen & 0xffffffffu);
      const Task task = task_.load(std::memory_order_relaxed);
      const void* context = context_.load(std::memory_order_relaxed);
      if (index >= count_.load(std::memory_order_relaxed)) return false;
      if (next_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) {
        task(context, index);
        done_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
  }

  void help() {
    for (;;) {
      const uint64_t job = next_.load(std::memory_order_acquire) >> 32;
      while (take()) {
      }
      int spins = 0;
      while (next_.load(std::memory_order_acquire) >> 32 == job && ++spins < kSpins) pause();
      if (spins < kSpins) continue;
      std::unique_lock<std::mutex> lock(sleep_);
      sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return next_.load() >> 32 != job; });
      sleeping_.fetch_sub(1);
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
  int started_ = 0;
  alignas(64) std::atomic<uint64_t> next_{0};  // job number << 32 | next task of it
  std::atomic<Task> task_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> count_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

Pool& pool() {
  static Pool* shared = new Pool;  // never destroyed: its threads may outlive main
  return *shared;
}

template <class Body>
void parallel(int64_t count, int threads, const Body& body) {
  pool().run([](const void* context, int64_t index) { (*static_cast<const Body*>(context))(index); }, &body, count,
             threads - 1);
}

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

struct F32 {
  using Storage = float;
  static float get(const Storage* p) { return *p; }
  static Floats load(const Storage* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static Storage put(float v) { return v; }
};

struct BF16 {
  using Storage = uint16_t;
  static float get(const Storage* p) {
    uint32_t word = uint32_t(*p) << 16;
    float v;
    std::memcpy(&v, &word, sizeof v);
    return v;
  }
  static Floats load(const Storage* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    Words w = __builtin_convertvector(h, Words) << 16;
    Floats v;
    std::memcpy(&v, &w, sizeof v);
    return v;
  }
  static Storage put(float v) {  // round to nearest even
    uint32_t word;
    std::memcpy(&word, &v, sizeof word);
    if ((word & 0x7fffffffu) > 0x7f800000u) return uint16_t((word >> 16) | 0x40);
    return uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
  }
};

template <class T>
float rounded(float v) {
  typename T::Storage s = T::put(v);
  return T::get(&s);
}

typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats4 __attribute__((vector_size(16)));

// Halving instead of adding lane after lane: a chain of sixteen additions would outlast the products of a short row.
float sum(Floats v) {
  Floats8 half[2];
  std::memcpy(half, &v, sizeof v);
  const Floats8 eight = half[0] + half[1];
  Floats4 quarter[2];
  std::memcpy(quarter, &eight, sizeof eight);
  const Floats4 four = quarter[0] + quarter[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Four rows at once: each vector of x is loaded once for four weights, and four chains hide latency. The next four
// rows are fetched ahead: they mostly lie in another page, where the processor's own prefetcher does not look, and
// reading weights that are in no cache becomes half as fast again.
template <class T>
void dot4(const typename T::Storage* w, int64_t stride, const float* x, int64_t n, float* out) {
  Floats a0 = {}, a1 = {}, a2 = {}, a3 = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats v = F32::load(x + i);
    for (int r = 0; r < 4; r++) __builtin_prefetch(w + (4 + r) * stride + i);
    a0 += T::load(w + i) * v;
    a1 += T::load(w + stride + i) * v;
    a2 += T::load(w + 2 * stride + i) * v;
    a3 += T::load(w + 3 * stride + i) * v;
  }
  out[0] = sum(a0), out[1] = sum(a1), out[2] = sum(a2), out[3] = sum(a3);
  for (; i < n; i++)
    for (int r = 0; r < 4; r++) out[r] += T::get(w + r * stride + i) * x[i];
}

template <class T>
float dot1(const typename T::Storage* w, const float* x, int64_t n) {
  Floats a = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) a += T::load(w + i) * F32::load(x + i);
  float total = sum(a);
  for (; i < n; i++) total += T::get(w + i) * x[i];
  return total;
}

template <class T>
void rows_times(const typename T::Storage* w, const float* x, int64_t columns, int64_t from, int64_t to, float* out) {
  int64_t row = from;
  for (; row + 4 <= to; row += 4) dot4<T>(w + row * columns, columns, x, columns, out + row - from);
  for (; row < to; row++) out[row - from] = dot1<T>(w + row * columns, x, columns);
}

constexpr int64_t kBlock = 32;  // output rows per task; a multiple of four

template <class T>
void widen(const typename T::Storage* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = T::get(x + i);
}

template <class T>
void linear(const typename T::Storage* w, const typename T::Storage* bias, const typename T::Storage* x,
            typename T::Storage* out, int64_t rows, int64_t columns, float* wide, int threads) {
  widen<T>(x, columns, wide);
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  parallel(blocks, threads, [=](int64_t block) {
    float result[kBlock];
    const int64_t from = block * kBlock, to = from + kBlock < rows ? from + kBlock : rows;
    rows_times<T>(w, wide, columns, from, to, result);
    for (int64_t row = from; row < to; row++) {
      float v = result[row - from];
      if (bias) v += T::get(bias + row);
      out[row] = T::put(v);
    }
  });
}

// Every pair is (expert, row of x): out[p] = down(silu(gate(x)) * up(x)), gate and up stacked in one matrix.
// Weights are found by index in tables of pointers, so that the caller builds nothing per expert.
template <class T>
void experts(const void* const* gate_up, const void* const* down, const int32_t* index,
             const typename T::Storage* x, const int32_t* rows, typename T::Storage* out, int64_t pairs,
             int64_t n_rows, int64_t hidden, int64_t inner, float* scratch, int threads) {
  float* wide = scratch;                        // [n_rows, hidden]
  float* activated = scratch + n_rows * hidden;  // [pairs, inner]
  widen<T>(x, n_rows * hidden, wide);
  const int64_t up_blocks = (inner + kBlock - 1) / kBlock, down_blocks = (hidden + kBlock - 1) / kBlock;
  parallel(pairs * up_blocks, threads, [=](int64_t task) {
      const int64_t pair = task / up_blocks, from = task % up_blocks * kBlock;
      const int64_t to = from + kBlock < inner ? from + kBlock : inner;
      const auto* w = static_cast<const typename T::Storage*>(gate_up[index[pair]]);
      const float* input = wide + rows[pair] * hidden;
      float gate[kBlock], up[kBlock];
      rows_times<T>(w, input, hidden, from, to, gate);
      rows_times<T>(w + inner * hidden, input, hidden, from, to, up);
      for (int64_t i = 0; i < to - from; i++) {
        const float g = rounded<T>(gate[i]), u = rounded<T>(up[i]);
        activated[pair * inner + from + i] = rounded<T>(rounded<T>(g / (1.0f + std::exp(-g))) * u);
      }
  });
  parallel(pairs * down_blocks, threads, [=](int64_t task) {
      const int64_t pair = task / down_blocks, from = task % down_blocks * kBlock;
      const int64_t to = from + kBlock < hidden ? from + kBlock : hidden;
      float result[kBlock];
      rows_times<T>(static_cast<const typename T::Storage*>(down[index[pair]]), activated + pair * inner, inner, from, to,
                    result);
      for (int64_t row = from; row < to; row++) out[pair * hidden + row] = T::put(result[row - from]);
  });
}

// Root mean square norm of each row. `early` rounds the normalised value before the weight is applied, as modules
// do that cast back first; the others multiply in float32 and round once.
template <class T>
void rms_norm(const typename T::Storage* x, const float* weight, typename T::Storage* out, int64_t rows,
              int64_t columns, float epsilon, int early) {
  for (int64_t row = 0; row < rows; row++, x += columns, out += columns) {
    Floats squares = {};
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) {
      Floats v = T::load(x + i);
      squares += v * v;
    }
    float total = sum(squares);
    for (; i < columns; i++) total += T::get(x + i) * T::get(x + i);
    const float scale = 1.0f / std::sqrt(total / float(columns) + epsilon);
    for (i = 0; i < columns; i++) {
      const float v = T::get(x + i) * scale;
      out[i] = T::put((early ? rounded<T>(v) : v) * weight[i]);
    }
  }
}

// Attention of one new token over the cached ones: query [heads, d], keys and values [kv_heads, length, d] with the
// given strides in elements, out [heads, dv]. Scores and sums are float32, as in torch's own fused attention.
template <class T>
void attention(const typename T::Storage* q, const typename T::Storage* k, const typename T::Storage* v,
               typename T::Storage* out, int64_t heads, int64_t kv_heads, int64_t length, int64_t d, int64_t dv,
               const int64_t* strides, float scale, float* scratch, int threads) {
  const int64_t group = heads / kv_heads, room = d + length + dv;
  const int64_t k_head = strides[0], k_row = strides[1], v_head = strides[2], v_row = strides[3];
  parallel(heads, threads, [=](int64_t head) {
    float* query = scratch + head * room;
    float* scores = query + d;
    float* total = scores + length;
    widen<T>(q + head * d, d, query);
    const auto* keys = k + head / group * k_head;
    const auto* values = v + head / group * v_head;
    float top = -INFINITY;
    for (int64_t row = 0; row < length; row++) {
      scores[row] = dot1<T>(keys + row * k_row, query, d) * scale;
      if (scores[row] > top) top = scores[row];
    }
    float weight = 0;
    for (int64_t i = 0; i < dv; i++) total[i] = 0;
    for (int64_t row = 0; row < length; row++) {
      const float p = std::exp(scores[row] - top);
      weight += p;
      for (int64_t i = 0; i < dv; i++) total[i] += p * T::get(values + row * v_row + i);
    }
    for (int64_t i = 0; i < dv; i++) out[head * dv + i] = T::put(total[i] / weight);
  });
}

}  // namespace

extern "C" {

int raymoe_abi() { return 4; }

void raymoe_attention_f32(const float* q, const float* k, const float* v, float* out, int64_t heads, int64_t kv_heads,
                          int64_t length, int64_t d, int64_t dv, const int64_t* strides, float scale, float* scratch,
                          int threads) {
  attention<F32>(q, k, v, out, heads, kv_heads, length, d, dv, strides, scale, scratch, threads);
}

void raymoe_attention_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, int64_t heads,
                           int64_t kv_heads, int64_t length, int64_t d, int64_t dv, const int64_t* strides, float scale,
                           float* scratch, int threads) {
  attention<BF16>(q, k, v, out, heads, kv_heads, length, d, dv, strides, scale, scratch, threads);
}

void raymoe_linear_f32(const float* w, const float* bias, const float* x, float* out, int64_t rows, int64_t columns,
                       float* scratch, int threads) {
  linear<F32>(w, bias, x, out, rows, columns, scratch, threads);
}

void raymoe_linear_bf16(const uint16_t* w, const uint16_t* bias, const uint16_t* x, uint16_t* out, int64_t rows,
                        int64_t columns, float* scratch, int threads) {
  linear<BF16>(w, bias, x, out, rows, columns, scratch, threads);
}

void raymoe_experts_f32(const void* const* gate_up, const void* const* down, const int32_t* index, const float* x,
                        const int32_t* rows, float* out, int64_t pairs, int64_t n_rows, int64_t hidden, int64_t inner,
                        float* scratch, int threads) {
  experts<F32>(gate_up, down, index, x, rows, out, pairs, n_rows, hidden, inner, scratch, threads);
}

void raymoe_experts_bf16(const void* const* gate_up, const void* const* down, const int32_t* index, const uint16_t* x,
                         const int32_t* rows, uint16_t* out, int64_t pairs, int64_t n_rows, int64_t hidden,
                         int64_t inner, float* scratch, int threads) {
  experts<BF16>(gate_up, down, index, x, rows, out, pairs, n_rows, hidden, inner, scratch, threads);
}

void raymoe_rms_norm_f32(const float* x, const float* weight, float* out, int64_t rows, int64_t columns, float epsilon,
                         int early) {
  rms_norm<F32>(x, weight, out, rows, columns, epsilon, early);
}

void raymoe_rms_norm_bf16(const uint16_t* x, const float* weight, uint16_t* out, int64_t rows, int64_t columns,
                          float epsilon, int early) {
  rms_norm<BF16>(x, weight, out, rows, columns, epsilon, early);
}
}
