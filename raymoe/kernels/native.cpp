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
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

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
    // The old job is closed before anything of it is overwritten: a helper that is late would else take its next index
    // for one of this job's, whose count is larger, and run it with what it has read of either.
    const uint64_t old = next_.load(std::memory_order_relaxed) >> 32;
    next_.store(old << 32 | kClosed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    next_.store((old + 1) << 32);
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
  static constexpr uint64_t kClosed = 0xffffffffu;  // in place of an index: more than any count
  static constexpr int kSpins = 20000;  // some tens of microseconds: about the gap between two calls in a decode step

  // One task of the current job, if any is left. A success of the exchange proves that what was read is of that job: a new
  // one is made known only after the old one was closed, and an exchange with a closed one fails.
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

// Rows `from` to `to` of a matrix times several vectors: each group of four rows is read from memory once and stays in
// the first cache for all of them. Vector i begins at x + at(i); put(i, row, value) takes the products, which are those
// of a single vector, bit by bit.
template <class T, class At, class Put>
void rows_times_all(const typename T::Storage* w, const float* x, int64_t columns, int64_t from, int64_t to,
                    int64_t count, const At& at, const Put& put) {
  for (int64_t row = from; row < to; row += 4) {
    const int64_t end = row + 4 < to ? row + 4 : to;
    for (int64_t i = 0; i < count; i++) {
      float result[4];
      rows_times<T>(w, x + at(i), columns, row, end, result);
      for (int64_t r = row; r < end; r++) put(i, r, result[r - row]);
    }
  }
}

// x is [count, columns], out [count, rows]; the sums are those of a single row of x, bit by bit.
template <class T>
void linear(const typename T::Storage* w, const typename T::Storage* bias, const typename T::Storage* x,
            typename T::Storage* out, int64_t rows, int64_t columns, int64_t count, float* wide, int threads) {
  widen<T>(x, count * columns, wide);
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  parallel(blocks, threads, [=](int64_t block) {
    const int64_t last = (block + 1) * kBlock < rows ? (block + 1) * kBlock : rows;
    rows_times_all<T>(
        w, wide, columns, block * kBlock, last, count, [=](int64_t i) { return i * columns; },
        [=](int64_t i, int64_t row, float v) { out[i * rows + row] = T::put(bias ? v + T::get(bias + row) : v); });
  });
}

// silu(gate(x)) * up(x), rows `from` to `to` of both matrices, for several x.
template <class T, class At, class Put>
void activate(const typename T::Storage* gate_weight, const typename T::Storage* up_weight, const float* x,
              int64_t hidden, int64_t from, int64_t to, int64_t count, const At& at, const Put& put) {
  for (int64_t row = from; row < to; row += 4) {
    const int64_t end = row + 4 < to ? row + 4 : to;
    for (int64_t i = 0; i < count; i++) {
      float gate[4], up[4];
      rows_times<T>(gate_weight, x + at(i), hidden, row, end, gate);
      rows_times<T>(up_weight, x + at(i), hidden, row, end, up);
      for (int64_t r = row; r < end; r++) {
        const float g = rounded<T>(gate[r - row]), u = rounded<T>(up[r - row]);
        put(i, r, rounded<T>(rounded<T>(g / (1.0f + std::exp(-g))) * u));
      }
    }
  }
}

// Every pair is (expert, row of x): out[p] = down(silu(gate(x)) * up(x)), gate and up stacked in one matrix. Pairs of
// one expert that lie together share the reading of its weights. Weights are found by index in tables of pointers, so
// that the caller builds nothing per expert.
template <class T>
void experts(const void* const* gate_up, const void* const* down, const int32_t* index,
             const typename T::Storage* x, const int32_t* rows, typename T::Storage* out, int64_t pairs,
             int64_t n_rows, int64_t hidden, int64_t inner, float* scratch, int threads) {
  using Storage = typename T::Storage;
  float* wide = scratch;                        // [n_rows, hidden]
  float* activated = scratch + n_rows * hidden;  // [pairs, inner]
  widen<T>(x, n_rows * hidden, wide);
  std::vector<int64_t> starts;
  for (int64_t pair = 0; pair < pairs; pair++)
    if (pair == 0 || index[pair] != index[pair - 1]) starts.push_back(pair);
  const int64_t runs = int64_t(starts.size());
  starts.push_back(pairs);
  const int64_t* start = starts.data();
  const int64_t up_blocks = (inner + kBlock - 1) / kBlock, down_blocks = (hidden + kBlock - 1) / kBlock;
  parallel(runs * up_blocks, threads, [=](int64_t task) {
    const int64_t first = start[task / up_blocks], count = start[task / up_blocks + 1] - first;
    const int64_t from = task % up_blocks * kBlock, to = from + kBlock < inner ? from + kBlock : inner;
    const auto* w = static_cast<const Storage*>(gate_up[index[first]]);
    activate<T>(
        w, w + inner * hidden, wide, hidden, from, to, count, [=](int64_t i) { return rows[first + i] * hidden; },
        [=](int64_t i, int64_t row, float v) { activated[(first + i) * inner + row] = v; });
  });
  parallel(runs * down_blocks, threads, [=](int64_t task) {
    const int64_t first = start[task / down_blocks], count = start[task / down_blocks + 1] - first;
    const int64_t from = task % down_blocks * kBlock, to = from + kBlock < hidden ? from + kBlock : hidden;
    rows_times_all<T>(
        static_cast<const Storage*>(down[index[first]]), activated + first * inner, inner, from, to, count,
        [=](int64_t i) { return i * inner; },
        [=](int64_t i, int64_t row, float v) { out[(first + i) * hidden + row] = T::put(v); });
  });
}

// A gated MLP of some rows, its three matrices apart: out = down(silu(gate(x)) * up(x)).
template <class T>
void gated(const typename T::Storage* gate, const typename T::Storage* up, const typename T::Storage* down,
           const typename T::Storage* x, typename T::Storage* out, int64_t hidden, int64_t inner, int64_t count,
           float* scratch, int threads) {
  float* wide = scratch;                        // [count, hidden]
  float* activated = scratch + count * hidden;  // [count, inner]
  widen<T>(x, count * hidden, wide);
  parallel((inner + kBlock - 1) / kBlock, threads, [=](int64_t block) {
    const int64_t from = block * kBlock, to = from + kBlock < inner ? from + kBlock : inner;
    activate<T>(
        gate, up, wide, hidden, from, to, count, [=](int64_t i) { return i * hidden; },
        [=](int64_t i, int64_t row, float v) { activated[i * inner + row] = v; });
  });
  parallel((hidden + kBlock - 1) / kBlock, threads, [=](int64_t block) {
    const int64_t from = block * kBlock, to = from + kBlock < hidden ? from + kBlock : hidden;
    rows_times_all<T>(
        down, activated, inner, from, to, count, [=](int64_t i) { return i * inner; },
        [=](int64_t i, int64_t row, float v) { out[i * hidden + row] = T::put(v); });
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

// Turns a head to its position, halves against each other.
template <class T>
void rotate(typename T::Storage* head, const typename T::Storage* cosines, const typename T::Storage* sines,
            int64_t d) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = T::get(head + i), b = T::get(head + half + i);
    const float low = rounded<T>(a * T::get(cosines + i)) + rounded<T>(-b * T::get(sines + i));
    const float high = rounded<T>(b * T::get(cosines + half + i)) + rounded<T>(a * T::get(sines + half + i));
    head[i] = T::put(low), head[half + i] = T::put(high);
  }
}

// Queries, keys and values of some tokens, one after the other in each row of `out` [count, heads + 2 kv_heads, d];
// queries and keys are normalised head by head where there is a weight for that, and rotated to their positions.
// `weights` are the three matrices, each with its bias, and the weights of the two norms; null is what there is not.
template <class T>
void projections(const void* const* weights, const typename T::Storage* x, const typename T::Storage* cosines,
                 const typename T::Storage* sines, typename T::Storage* out, int64_t heads, int64_t kv_heads, int64_t d,
                 int64_t hidden, int64_t count, const float* epsilons, int early, float* wide, int threads) {
  using Storage = typename T::Storage;
  widen<T>(x, count * hidden, wide);
  const int64_t places[] = {0, heads * d, (heads + kv_heads) * d, (heads + 2 * kv_heads) * d};
  const int64_t q_blocks = (places[1] + kBlock - 1) / kBlock, kv_blocks = (kv_heads * d + kBlock - 1) / kBlock;
  parallel(q_blocks + 2 * kv_blocks, threads, [=](int64_t task) {
    const int part = task < q_blocks ? 0 : task < q_blocks + kv_blocks ? 1 : 2;
    const int64_t block = part == 0 ? task : (task - q_blocks) % kv_blocks;
    const int64_t rows = places[part + 1] - places[part];
    const int64_t from = block * kBlock, to = from + kBlock < rows ? from + kBlock : rows;
    const auto* bias = static_cast<const Storage*>(weights[2 * part + 1]);
    Storage* target = out + places[part];
    rows_times_all<T>(
        static_cast<const Storage*>(weights[2 * part]), wide, hidden, from, to, count,
        [=](int64_t i) { return i * hidden; },
        [=](int64_t i, int64_t row, float v) {
          target[i * places[3] + row] = T::put(bias ? v + T::get(bias + row) : v);
        });
  });
  for (int64_t i = 0; i < count; i++) {
    Storage* token = out + i * places[3];
    for (int part = 0; part < 2; part++) {
      const float* norm = static_cast<const float*>(weights[6 + part]);
      Storage* place = token + places[part];
      if (norm) rms_norm<T>(place, norm, place, part == 0 ? heads : kv_heads, d, epsilons[part], early);
    }
    for (int64_t head = 0; head < heads + kv_heads; head++)
      rotate<T>(token + head * d, cosines + i * d, sines + i * d, d);
  }
}

// e^x for x <= 0, to about an ulp of float32 (Cephes' polynomial); 1e-38 where it would be less.
Floats exponential(Floats x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
  const Floats least = Floats{} - 87.0f;
  x = x < least ? least : x;
  const Floats shifted = x * 1.44269504f + kMagic;
  const Floats n = shifted - kMagic;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Words power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power << 23) + 0x3f800000u;
  Floats scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

// In place of scores [length], with room up to a multiple of kLanes: e^(score - top). Returns their sum.
float soften(float* scores, int64_t length, float top) {
  const int64_t padded = (length + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = length; i < padded; i++) scores[i] = top;
  Floats total = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    Floats p = exponential(F32::load(scores + i) - top);
    if (i + kLanes > length)
      for (int lane = int(length - i); lane < kLanes; lane++) p[lane] = 0;
    std::memcpy(scores + i, &p, sizeof p);
    total += p;
  }
  return sum(total);
}

// One head's attention over cached keys and values, `k_row` and `v_row` elements apart. Scores and sums are float32, as
// in torch's own fused attention. scratch has room for d + length + dv + kLanes floats.
template <class T>
void attend(const typename T::Storage* q, const typename T::Storage* keys, const typename T::Storage* values,
            typename T::Storage* out, int64_t length, int64_t d, int64_t dv, int64_t k_row, int64_t v_row, float scale,
            float* scratch) {
  float* query = scratch;
  float* total = query + d;
  float* scores = total + dv;
  widen<T>(q, d, query);
  for (int64_t i = 0; i < d; i++) query[i] *= scale;
  float top = -INFINITY;
  int64_t row = 0;
  for (; row + 4 <= length; row += 4) dot4<T>(keys + row * k_row, k_row, query, d, scores + row);
  for (; row < length; row++) scores[row] = dot1<T>(keys + row * k_row, query, d);
  for (row = 0; row < length; row++) top = scores[row] > top ? scores[row] : top;
  const float weight = soften(scores, length, top);
  for (int64_t i = 0; i < dv; i++) total[i] = 0;
  for (row = 0; row + 4 <= length; row += 4) {
    const auto *v0 = values + row * v_row, *v1 = v0 + v_row, *v2 = v1 + v_row, *v3 = v2 + v_row;
    const float p0 = scores[row], p1 = scores[row + 1], p2 = scores[row + 2], p3 = scores[row + 3];
    for (int64_t i = 0; i < dv; i++)
      total[i] += (p0 * T::get(v0 + i) + p1 * T::get(v1 + i)) + (p2 * T::get(v2 + i) + p3 * T::get(v3 + i));
  }
  for (; row < length; row++)
    for (int64_t i = 0; i < dv; i++) total[i] += scores[row] * T::get(values + row * v_row + i);
  for (int64_t i = 0; i < dv; i++) out[i] = T::put(total[i] / weight);
}

// Attention of one new token over the cached ones: query [heads, d], keys and values [kv_heads, length, d] with the
// given strides in elements, out [heads, dv].
template <class T>
void attention(const typename T::Storage* q, const typename T::Storage* k, const typename T::Storage* v,
               typename T::Storage* out, int64_t heads, int64_t kv_heads, int64_t length, int64_t d, int64_t dv,
               const int64_t* strides, float scale, float* scratch, int threads) {
  const int64_t group = heads / kv_heads, room = d + length + dv + kLanes;
  const int64_t k_head = strides[0], k_row = strides[1], v_head = strides[2], v_row = strides[3];
  parallel(heads, threads, [=](int64_t head) {
    attend<T>(q + head * d, k + head / group * k_head, v + head / group * v_head, out + head * dv, length, d, dv, k_row,
              v_row, scale, scratch + head * room);
  });
}

// Where a token's keys and values go in the cache of its sequence, whose heads are `stride` elements apart.
template <class T>
struct CachePlace {
  typename T::Storage *keys, *values;
  int64_t stride, position;
};

// Attention of tokens of any sequences, each over its own cache up to its own position. `mixed` is what `projections`
// gave for them; their keys and values are put into the caches first, so that tokens of one sequence see each other.
// out is [count, heads, d]; scratch has room for 2 d + longest + kLanes floats for each pair of token and head.
template <class T>
void attention_rows(const typename T::Storage* mixed, const CachePlace<T>* places, typename T::Storage* out,
                    int64_t count, int64_t heads, int64_t kv_heads, int64_t d, int64_t longest, float scale,
                    float* scratch, int threads) {
  using Storage = typename T::Storage;
  const int64_t group = heads / kv_heads, width = (heads + 2 * kv_heads) * d, room = 2 * d + longest + kLanes;
  for (int64_t i = 0; i < count; i++) {
    const CachePlace<T>& place = places[i];
    const Storage* keys = mixed + i * width + heads * d;
    for (int64_t head = 0; head < kv_heads; head++) {
      const int64_t at = head * place.stride + place.position * d;
      std::memcpy(place.keys + at, keys + head * d, d * sizeof(Storage));
      std::memcpy(place.values + at, keys + (kv_heads + head) * d, d * sizeof(Storage));
    }
  }
  parallel(count * heads, threads, [=](int64_t task) {
    const int64_t i = task / heads, head = task % heads;
    const CachePlace<T>& place = places[i];
    const int64_t at = head / group * place.stride;
    attend<T>(mixed + i * width + head * d, place.keys + at, place.values + at, out + task * d, place.position + 1, d,
              d, d, d, scale, scratch + task * room);
  });
}

// ---- Quantised experts: weights of 16, 8, 4, 3 or 2 bits, activations of float32 or bfloat16. predictor/quantize.py
// writes them in these forms:
//
// 16: bfloat16 as it is.
// 8: int8, a scale per output row. Rows are padded with zeros to a multiple of kSpan; word j of a span holds columns
//    j, j + 16, j + 32 and j + 48.
// 4, 3, 2: a scale and a minimum for kGroup neighbours of a row, value = scale * code + minimum, in blocks of four rows
//    by one group; a block is 16 words of eight codes, word j holds columns j and j + 16 of rows 0, 1, 2, 3 in turn.
//
// Codes lie in words so that a shift brings sixteen of them into place: compilers widen vectors of bytes poorly.

constexpr int64_t kGroup = 32, kSpan = 64;
typedef uint8_t Octets __attribute__((vector_size(kLanes)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

template <int place>
Floats signed_code(Ints w) {
  return __builtin_convertvector((w << (24 - 8 * place)) >> 24, Floats);
}

// Four rows of int8 codes times x, without their scales.
void bytes4(const uint8_t* codes, int64_t stride, const float* x, int64_t n, float* out) {
  Floats a[4] = {};
  for (int64_t i = 0; i < n; i += kSpan) {
    const Floats x0 = F32::load(x + i), x1 = F32::load(x + i + 16);
    const Floats x2 = F32::load(x + i + 32), x3 = F32::load(x + i + 48);
    for (int r = 0; r < 4; r++) {
      __builtin_prefetch(codes + (4 + r) * stride + i);
      Ints w;
      std::memcpy(&w, codes + r * stride + i, sizeof w);
      a[r] += signed_code<0>(w) * x0 + signed_code<1>(w) * x1 + signed_code<2>(w) * x2 + signed_code<3>(w) * x3;
    }
  }
  for (int r = 0; r < 4; r++) out[r] = sum(a[r]);
}

// Eight values of half precision.
Floats8 halves(const uint16_t* p) {
#if defined(__F16C__)
  __m128i h;
  std::memcpy(&h, p, sizeof h);
  const __m256 v = _mm256_cvtph_ps(h);
  Floats8 result;
  std::memcpy(&result, &v, sizeof v);
  return result;
#else
  typedef uint16_t Halves8 __attribute__((vector_size(16)));
  typedef uint32_t Words8 __attribute__((vector_size(32)));
  Halves8 h;
  std::memcpy(&h, p, sizeof h);
  const Words8 w = __builtin_convertvector(h, Words8);
  Words8 magnitude = (w & 0x7fffu) << 13;  // a float whose exponent is 112 too low; what was subnormal, too
  Floats8 v;
  std::memcpy(&v, &magnitude, sizeof v);
  v *= 0x1p112f;
  std::memcpy(&magnitude, &v, sizeof v);
  magnitude |= (w & 0x8000u) << 16;
  std::memcpy(&v, &magnitude, sizeof v);
  return v;
#endif
}

Floats4 halves4(const uint16_t* p) {
  uint16_t eight[8] = {p[0], p[1], p[2], p[3]};
  const Floats8 wide = halves(eight);
  return Floats4{wide[0], wide[1], wide[2], wide[3]};
}

// A word holds eight codes, the first in its lowest bits. Three bits lie as 16 low bits and 8 high ones.
template <int bits>
Words codes_of(const uint8_t* block) {
  if constexpr (bits == 4) {
    Words w;
    std::memcpy(&w, block, sizeof w);
    return w;
  } else {
    Halves low;
    std::memcpy(&low, block, sizeof low);
    Words w = __builtin_convertvector(low, Words);
    if constexpr (bits == 3) {
      Octets high;
      std::memcpy(&high, block + sizeof low, sizeof high);
      // in steps, else GCC goes byte by byte
      w |= __builtin_convertvector(__builtin_convertvector(high, Halves), Words) << 16;
    }
    return w;
  }
}

// The code as the leading bits of a mantissa: 1 + code / 2^bits, without a conversion from integer.
template <int bits, int place>
Floats code(Words w) {
  constexpr int shift = 23 - bits - bits * place;
  if constexpr (shift >= 0)
    w <<= shift;
  else
    w >>= -shift;
  w = (w & (((1u << bits) - 1) << (23 - bits))) | 0x3f800000u;
  Floats v;
  std::memcpy(&v, &w, sizeof v);
  return v;
}

// Four rows times x. sums holds the sum of x over each group, by which minima count.
template <int bits>
void packed4(const uint8_t* codes, const uint16_t* scales, const float* x, const float* sums, int64_t groups,
             float* out) {
  constexpr int64_t kBlockBytes = kLanes * bits;
  Floats a0 = {}, a1 = {}, a2 = {}, a3 = {};
  Floats4 base = {};
  for (int64_t g = 0; g < groups; g++, codes += kBlockBytes, scales += 8, x += kGroup) {
    __builtin_prefetch(codes + 16 * kBlockBytes);  // beyond the page, where the processor's prefetcher does not look
    const Words w = codes_of<bits>(codes);
    const Floats left = F32::load(x), right = F32::load(x + kLanes);
    const Floats8 both = halves(scales);
    Floats4 pair[2];
    std::memcpy(pair, &both, sizeof both);
    const Floats4 scale = pair[0] * float(1 << bits);
    base += (pair[1] - scale) * sums[g];
    a0 += (code<bits, 0>(w) * left + code<bits, 1>(w) * right) * scale[0];
    a1 += (code<bits, 2>(w) * left + code<bits, 3>(w) * right) * scale[1];
    a2 += (code<bits, 4>(w) * left + code<bits, 5>(w) * right) * scale[2];
    a3 += (code<bits, 6>(w) * left + code<bits, 7>(w) * right) * scale[3];
  }
  out[0] = sum(a0) + base[0], out[1] = sum(a1) + base[1], out[2] = sum(a2) + base[2], out[3] = sum(a3) + base[3];
}

int64_t groups_of(int64_t columns) { return (columns + kGroup - 1) / kGroup; }
int64_t padded(int64_t columns) { return (columns + kSpan - 1) / kSpan * kSpan; }

// Floats of one vector: padded with zeros, behind it the sum of each group.
int64_t room(int64_t columns) { return padded(columns) + padded(columns) / kGroup; }

void pad_and_sum(float* x, int64_t columns) {
  const int64_t wide = padded(columns);
  for (int64_t i = columns; i < wide; i++) x[i] = 0;
  for (int64_t i = 0; i < wide; i += kGroup) x[wide + i / kGroup] = sum(F32::load(x + i) + F32::load(x + i + kLanes));
}

// A matrix in one of the forms: the rows from `from` to before `to`, both multiples of four, times such a vector.
struct Dense {
  static void rows(const void* data, const void*, const float* x, int64_t columns, int64_t from, int64_t to,
                   float* out) {
    rows_times<BF16>(static_cast<const uint16_t*>(data), x, columns, from, to, out);
  }
};

struct Channels {
  static void rows(const void* data, const void* scales, const float* x, int64_t columns, int64_t from, int64_t to,
                   float* out) {
    const int64_t stride = padded(columns);
    for (int64_t row = from; row < to; row += 4) {
      bytes4(static_cast<const uint8_t*>(data) + row * stride, stride, x, stride, out + row - from);
      const Floats4 scale = halves4(static_cast<const uint16_t*>(scales) + row);
      for (int r = 0; r < 4; r++) out[row - from + r] *= scale[r];
    }
  }
};

template <int bits>
struct Groups {
  static void rows(const void* data, const void* scales, const float* x, int64_t columns, int64_t from, int64_t to,
                   float* out) {
    const int64_t groups = groups_of(columns);
    for (int64_t row = from; row < to; row += 4) {
      const int64_t block = row / 4 * groups;
      packed4<bits>(static_cast<const uint8_t*>(data) + block * kLanes * bits,
                    static_cast<const uint16_t*>(scales) + block * 8, x, x + padded(columns), groups,
                    out + row - from);
    }
  }
};

// Where one expert's weights lie.
struct QuantizedExpert {
  const void *first, *first_scales, *down, *down_scales;
};

// As `experts`, with weights in form M and activations of type T. hidden and inner are multiples of four.
template <class M, class T>
void quantized_experts(const QuantizedExpert* table, const int32_t* index, const typename T::Storage* x,
                       const int32_t* rows, typename T::Storage* out, int64_t pairs, int64_t n_rows, int64_t hidden,
                       int64_t inner, float* scratch, int threads) {
  const int64_t wide_room = room(hidden), inner_room = room(inner);
  float* wide = scratch;
  float* activated = scratch + n_rows * wide_room;
  for (int64_t row = 0; row < n_rows; row++) {
    widen<T>(x + row * hidden, hidden, wide + row * wide_room);
    pad_and_sum(wide + row * wide_room, hidden);
  }
  const int64_t up_blocks = (inner + kBlock - 1) / kBlock, down_blocks = (hidden + kBlock - 1) / kBlock;
  parallel(pairs * up_blocks, threads, [=](int64_t task) {
    const int64_t pair = task / up_blocks, from = task % up_blocks * kBlock;
    const int64_t to = from + kBlock < inner ? from + kBlock : inner;
    const QuantizedExpert& expert = table[index[pair]];
    const float* input = wide + rows[pair] * wide_room;
    float gate[kBlock], up[kBlock];
    M::rows(expert.first, expert.first_scales, input, hidden, from, to, gate);
    M::rows(expert.first, expert.first_scales, input, hidden, inner + from, inner + to, up);
    for (int64_t i = 0; i < to - from; i++) {
      const float g = rounded<T>(gate[i]), u = rounded<T>(up[i]);
      activated[pair * inner_room + from + i] = rounded<T>(rounded<T>(g / (1.0f + std::exp(-g))) * u);
    }
  });
  for (int64_t pair = 0; pair < pairs; pair++) pad_and_sum(activated + pair * inner_room, inner);
  parallel(pairs * down_blocks, threads, [=](int64_t task) {
    const int64_t pair = task / down_blocks, from = task % down_blocks * kBlock;
    const int64_t to = from + kBlock < hidden ? from + kBlock : hidden;
    const QuantizedExpert& expert = table[index[pair]];
    float result[kBlock];
    M::rows(expert.down, expert.down_scales, activated + pair * inner_room, inner, from, to, result);
    for (int64_t row = from; row < to; row++) out[pair * hidden + row] = T::put(result[row - from]);
  });
}

// Whole vectors of a row, as far as the row goes.
void put_row(const Floats* values, int64_t count, float* out, int64_t left) {
  std::memcpy(out, values, (count * kLanes < left ? count * kLanes : left) * sizeof(float));
}

// The values that the codes of a matrix stand for.
void restore_bytes(const uint8_t* codes, const uint16_t* scales, float* out, int64_t rows, int64_t columns,
                   int threads) {
  const int64_t stride = padded(columns);
  parallel((rows + kBlock - 1) / kBlock, threads, [=](int64_t task) {
    for (int64_t row = task * kBlock; row < rows && row < (task + 1) * kBlock; row++) {
      const float scale = halves4(scales + row / 4 * 4)[row % 4];
      for (int64_t i = 0; i < columns; i += kSpan) {
        Ints w;
        std::memcpy(&w, codes + row * stride + i, sizeof w);
        const Floats values[] = {signed_code<0>(w) * scale, signed_code<1>(w) * scale, signed_code<2>(w) * scale,
                                 signed_code<3>(w) * scale};
        put_row(values, 4, out + row * columns + i, columns - i);
      }
    }
  });
}

template <int bits>
void restore_groups(const uint8_t* codes, const uint16_t* scales, float* out, int64_t rows, int64_t columns,
                    int threads) {
  const int64_t groups = groups_of(columns), blocks = (rows + 3) / 4, each = kBlock / 4;
  parallel((blocks + each - 1) / each, threads, [=](int64_t task) {
    const int64_t end = (task + 1) * each < blocks ? (task + 1) * each : blocks;
    for (int64_t block = task * each * groups; block < end * groups; block++) {
      const int64_t row = block / groups * 4, column = block % groups * kGroup;
      const Words w = codes_of<bits>(codes + block * kLanes * bits);
      const Floats8 both = halves(scales + block * 8);
      const Floats values[] = {code<bits, 0>(w), code<bits, 1>(w), code<bits, 2>(w), code<bits, 3>(w),
                               code<bits, 4>(w), code<bits, 5>(w), code<bits, 6>(w), code<bits, 7>(w)};
      for (int r = 0; r < 4 && row + r < rows; r++) {
        const float scale = both[r] * float(1 << bits), minimum = both[4 + r];
        const Floats pair[] = {(values[2 * r] - 1.0f) * scale + minimum, (values[2 * r + 1] - 1.0f) * scale + minimum};
        put_row(pair, 2, out + (row + r) * columns + column, columns - column);
      }
    }
  });
}

template <class T, class... Arguments>
int quantized_experts_of(int bits, Arguments... arguments) {
  switch (bits) {
    case 16: quantized_experts<Dense, T>(arguments...); return 0;
    case 8: quantized_experts<Channels, T>(arguments...); return 0;
    case 4: quantized_experts<Groups<4>, T>(arguments...); return 0;
    case 3: quantized_experts<Groups<3>, T>(arguments...); return 0;
    case 2: quantized_experts<Groups<2>, T>(arguments...); return 0;
    default: return 1;
  }
}

}  // namespace

extern "C" {

int raymoe_abi() { return 9; }

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
                       int64_t count, float* scratch, int threads) {
  linear<F32>(w, bias, x, out, rows, columns, count, scratch, threads);
}

void raymoe_linear_bf16(const uint16_t* w, const uint16_t* bias, const uint16_t* x, uint16_t* out, int64_t rows,
                        int64_t columns, int64_t count, float* scratch, int threads) {
  linear<BF16>(w, bias, x, out, rows, columns, count, scratch, threads);
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

void raymoe_gated_f32(const float* gate, const float* up, const float* down, const float* x, float* out, int64_t hidden,
                      int64_t inner, int64_t count, float* scratch, int threads) {
  gated<F32>(gate, up, down, x, out, hidden, inner, count, scratch, threads);
}

void raymoe_gated_bf16(const uint16_t* gate, const uint16_t* up, const uint16_t* down, const uint16_t* x, uint16_t* out, int64_t hidden,
                      int64_t inner, int64_t count, float* scratch, int threads) {
  gated<BF16>(gate, up, down, x, out, hidden, inner, count, scratch, threads);
}

void raymoe_projections_f32(const void* const* weights, const float* x, const float* cosines, const float* sines,
                            float* out, int64_t heads, int64_t kv_heads, int64_t d, int64_t hidden, int64_t count,
                            const float* epsilons, int early, float* scratch, int threads) {
  projections<F32>(weights, x, cosines, sines, out, heads, kv_heads, d, hidden, count, epsilons, early, scratch, threads);
}

void raymoe_attention_rows_f32(const float* mixed, const void* places, float* out, int64_t count, int64_t heads,
                               int64_t kv_heads, int64_t d, int64_t longest, float scale, float* scratch, int threads) {
  attention_rows<F32>(mixed, static_cast<const CachePlace<F32>*>(places), out, count, heads, kv_heads, d, longest, scale,
                      scratch, threads);
}

void raymoe_projections_bf16(const void* const* weights, const uint16_t* x, const uint16_t* cosines, const uint16_t* sines,
                            uint16_t* out, int64_t heads, int64_t kv_heads, int64_t d, int64_t hidden, int64_t count,
                            const float* epsilons, int early, float* scratch, int threads) {
  projections<BF16>(weights, x, cosines, sines, out, heads, kv_heads, d, hidden, count, epsilons, early, scratch, threads);
}

void raymoe_attention_rows_bf16(const uint16_t* mixed, const void* places, uint16_t* out, int64_t count, int64_t heads,
                               int64_t kv_heads, int64_t d, int64_t longest, float scale, float* scratch, int threads) {
  attention_rows<BF16>(mixed, static_cast<const CachePlace<BF16>*>(places), out, count, heads, kv_heads, d, longest, scale,
                      scratch, threads);
}

// Return 1 where there is no such number of bits, else 0. The table holds four addresses per expert.
int raymoe_quantized_experts_f32(int bits, const void* table, const int32_t* index, const float* x, const int32_t* rows,
                                 float* out, int64_t pairs, int64_t n_rows, int64_t hidden, int64_t inner,
                                 float* scratch, int threads) {
  return quantized_experts_of<F32>(bits, static_cast<const QuantizedExpert*>(table), index, x, rows, out, pairs, n_rows,
                                   hidden, inner, scratch, threads);
}

int raymoe_quantized_experts_bf16(int bits, const void* table, const int32_t* index, const uint16_t* x,
                                  const int32_t* rows, uint16_t* out, int64_t pairs, int64_t n_rows, int64_t hidden,
                                  int64_t inner, float* scratch, int threads) {
  return quantized_experts_of<BF16>(bits, static_cast<const QuantizedExpert*>(table), index, x, rows, out, pairs,
                                    n_rows, hidden, inner, scratch, threads);
}

int raymoe_restore(int bits, const uint8_t* codes, const uint16_t* scales, float* out, int64_t rows, int64_t columns,
                   int threads) {
  switch (bits) {
    case 8: restore_bytes(codes, scales, out, rows, columns, threads); return 0;
    case 4: restore_groups<4>(codes, scales, out, rows, columns, threads); return 0;
    case 3: restore_groups<3>(codes, scales, out, rows, columns, threads); return 0;
    case 2: restore_groups<2>(codes, scales, out, rows, columns, threads); return 0;
    default: return 1;
  }
}
}
