// What the host does in a MoE layer before anything else, while the device waits for it: a few microseconds here, where
// Python takes a hundred. Rows whose experts are all in slots are answered; at the first other one the loads that it
// surely needs are begun. Everything else is decided, and entered into the books, by raymoe.engine.turns.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

namespace {

constexpr uint32_t kUnheard = 0xFFC0DEAD;  // engine/dialogue.py
constexpr int32_t kAbsent = -1;            // experts/slots.py: in no slot, nor on its way into one
constexpr int64_t kMostExperts = 64;       // of a token
constexpr int kLooks = 64;                 // between two looks at the clock

// One layer. The fields are those of raymoe.kernels.turns.
struct Turn {
  const uint32_t* told;     // what the device tells: k experts, k weights, and more, float32
  int64_t words;            // of it
  int64_t* decided;         // what it waits for: k slots and k weights, each beside the turn
  int64_t k;
  const int32_t* slot_of;   // by expert; negative where it can't be computed yet
  uint8_t* ready;           // by slot
  uint8_t* shielded;
  int64_t slots;
  const int64_t* layer_of;  // by slot
  int64_t layer;
  const uint64_t* source;   // by expert, its address in pinned host memory; 0: not to be begun here
  const uint64_t* target;   // by slot, its address on the device
  int64_t bytes;            // of an expert
  const int32_t* ranked;    // slots in the order in which they would be emptied, ended by -1
};
static_assert(sizeof(Turn) == 14 * 8, "as an array of int64 has it");

using Copy = int (*)(uint64_t target, const void* source, uint64_t bytes, void* stream);

uint32_t look(const uint32_t* word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }

bool heard(const Turn& turn) {
  for (int64_t i = turn.words - 1; i >= 0; i--)
    if (look(turn.told + i) == kUnheard) return false;
  std::atomic_thread_fence(std::memory_order_acquire);
  return true;
}

float number(const Turn& turn, int64_t i) {
  const uint32_t bits = look(turn.told + i);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void answer(const Turn& turn, int64_t number_of_turn, const int32_t* slots) {
  for (int64_t i = 0; i < turn.k; i++) {
    const uint32_t bits[2] = {static_cast<uint32_t>(slots[i]), look(turn.told + turn.k + i)};
    for (int64_t j = 0; j < 2; j++)
      __atomic_store_n(turn.decided + j * turn.k + i, number_of_turn << 32 | bits[j], __ATOMIC_RELEASE);
  }
}

// The next slot of the layer's own that may be emptied; -1: none is known.
int32_t victim(const Turn& turn, const int32_t*& ranked) {
  for (; *ranked >= 0; ranked++) {
    const int32_t slot = *ranked;
    if (turn.ready[slot] && !turn.shielded[slot] && turn.layer_of[slot] == turn.layer) return *ranked++;
  }
  return -1;
}

int64_t begin(const Turn& turn, const int32_t* experts, const int32_t* slots, float factor, int64_t most, Copy copy,
              void* stream, int32_t* begun) {
  float least = number(turn, turn.k);
  for (int64_t i = 1; i < turn.k; i++) least = std::min(least, number(turn, turn.k + i));
  least *= factor;
  const int32_t* ranked = turn.ranked;
  int64_t count = 0;
  for (int32_t after = -1; count < most;) {  // by expert, as the books have it
    int64_t next = -1;
    for (int64_t i = 0; i < turn.k; i++)
      if (experts[i] > after && (next < 0 || experts[i] < experts[next])) next = i;
    if (next < 0) break;
    after = experts[next];
    if (slots[next] != kAbsent || number(turn, turn.k + next) < least) continue;
    const uint64_t source = turn.source[after];
    const int32_t slot = source ? victim(turn, ranked) : -1;
    if (slot < 0 || copy(turn.target[slot], reinterpret_cast<const void*>(source), turn.bytes, stream)) break;
    turn.shielded[slot] = 1;
    begun[2 * count] = after;
    begun[2 * count + 1] = slot;
    count++;
  }
  return count;
}

}  // namespace

extern "C" {

// Goes through the layers from `first` on; returns the one that it stopped at, or `last`. out[0]: 0 where the device had
// not come to that layer within `patience_ns`, 1 where experts of its row are in no slot; out[1]: loads begun for these,
// and then the expert and the slot of each. Begun are at most `most`, and only of experts that weigh at least `factor`
// times the lightest.
int64_t raymoe_turns(const Turn* turns, int64_t first, int64_t last, int64_t number_of_turn, float factor, int64_t most,
                     int64_t patience_ns, Copy copy, void* stream, int32_t* out) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + std::chrono::nanoseconds(patience_ns);
  out[0] = out[1] = 0;
  for (int64_t layer = first; layer < last; layer++) {
    const Turn& turn = turns[layer];
    for (int looks = 0; !heard(turn); looks++)
      if (looks % kLooks == kLooks - 1 && Clock::now() > end) return layer;
    int32_t experts[kMostExperts], slots[kMostExperts];
    bool all = true;
    std::memset(turn.shielded, 0, turn.slots);
    for (int64_t i = 0; i < turn.k; i++) {
      experts[i] = static_cast<int32_t>(number(turn, i));
      slots[i] = turn.slot_of[experts[i]];
      if (slots[i] >= 0)
        turn.shielded[slots[i]] = 1;
      else
        all = false;
    }
    if (!all) {
      out[0] = 1;
      out[1] = copy ? begin(turn, experts, slots, factor, most, copy, stream, out + 2) : 0;
      return layer;
    }
    answer(turn, number_of_turn, slots);
  }
  return last;
}
}
