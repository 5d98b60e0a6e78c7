// What the host does in a MoE layer before anything else, while the device waits for it: a few microseconds here, where
// Python takes a hundred. Rows are decided, where the rule is a common one; those whose experts are all in slots are
// answered, and at the first other one loads are begun. Everything else raymoe.engine.turns does, the books above all.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr uint32_t kUnheard = 0xFFC0DEAD;  // engine/dialogue.py
constexpr int32_t kAbsent = -1;            // experts/slots.py: in no slot, nor on its way into one
constexpr int64_t kMostExperts = 64;       // of a token
constexpr int64_t kMostOfLayer = 1024;     // experts
constexpr float kSmallestSum = 1e-20f;     // model/router_rule.py
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
  int64_t experts;          // of the layer
  int32_t* chosen;          // takes the k experts to compute,
  float* weights;           // their weights,
  int32_t* replaced;        // and how many of them the router did not choose
};
static_assert(sizeof(Turn) == 18 * 8, "as an array of int64 has it");

// How experts may be replaced (raymoe.placement.routing.route for one token, ranked by score).
struct Rule {
  float alpha;  // 0: never
  int32_t is_sigmoid;
  int32_t is_renormalised;
  float scale;
};

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
    uint32_t bits[2] = {static_cast<uint32_t>(slots[i]), 0};
    std::memcpy(bits + 1, turn.weights + i, sizeof(float));
    for (int64_t j = 0; j < 2; j++)
      __atomic_store_n(turn.decided + j * turn.k + i, number_of_turn << 32 | bits[j], __ATOMIC_RELEASE);
  }
}

// Replaces low-scored experts that are in no slot by the best-scored ones that are, within the window that alpha opens
// around the best of those that were not chosen.
void substitute(const Turn& turn, const Rule& rule, int32_t* slots) {
  float scores[kMostOfLayer];
  float most = -INFINITY, total = 0;
  for (int64_t e = 0; e < turn.experts; e++) most = std::max(most, scores[e] = number(turn, 2 * turn.k + e));
  for (int64_t e = 0; e < turn.experts; e++) {
    scores[e] = rule.is_sigmoid ? 1 / (1 + std::exp(-scores[e])) : std::exp(scores[e] - most);
    total += scores[e];
  }
  if (!rule.is_sigmoid)
    for (int64_t e = 0; e < turn.experts; e++) scores[e] /= total;
  bool is_taken[kMostOfLayer] = {};
  for (int64_t i = 0; i < turn.k; i++) is_taken[turn.chosen[i]] = true;
  float best_rest = 0;
  for (int64_t e = 0; e < turn.experts; e++)
    if (!is_taken[e]) best_rest = std::max(best_rest, scores[e]);
  const float high = (1 + rule.alpha) * best_rest, low = (1 - rule.alpha) * best_rest;
  bool is_tried[kMostExperts] = {};
  for (;;) {
    int64_t place = -1;  // of the lowest-scored one that may go
    for (int64_t i = 0; i < turn.k; i++) {
      const int32_t e = turn.chosen[i];
      if (slots[i] >= 0 || is_tried[i] || !(scores[e] < high)) continue;
      if (place < 0 || scores[e] < scores[turn.chosen[place]] ||
          (scores[e] == scores[turn.chosen[place]] && e < turn.chosen[place]))
        place = i;
    }
    if (place < 0) break;
    is_tried[place] = true;
    int64_t best = -1;
    for (int64_t e = 0; e < turn.experts; e++)
      if (!is_taken[e] && turn.slot_of[e] >= 0 && scores[e] > low && (best < 0 || scores[e] > scores[best])) best = e;
    if (best < 0) break;
    is_taken[best] = true;
    turn.chosen[place] = static_cast<int32_t>(best);
    slots[place] = turn.slot_of[best];
    ++*turn.replaced;
  }
  if (!*turn.replaced) return;
  float sum = 0;
  for (int64_t i = 0; i < turn.k; i++) sum += turn.weights[i] = scores[turn.chosen[i]];
  for (int64_t i = 0; i < turn.k; i++) {
    if (rule.is_renormalised) turn.weights[i] /= std::max(sum, kSmallestSum);
    turn.weights[i] *= rule.scale;
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

// Experts that weigh less than `least` are left to others.
int64_t begin(const Turn& turn, const int32_t* slots, float least, int64_t most, Copy copy, void* stream,
              int32_t* begun) {
  const int32_t* experts = turn.chosen;
  const int32_t* ranked = turn.ranked;
  int64_t count = 0;
  for (int32_t after = -1; count < most;) {  // by expert, as the books have it
    int64_t next = -1;
    for (int64_t i = 0; i < turn.k; i++)
      if (experts[i] > after && (next < 0 || experts[i] < experts[next])) next = i;
    if (next < 0) break;
    after = experts[next];
    if (slots[next] != kAbsent || turn.weights[next] < least) continue;
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
// and then the expert and the slot of each. Begun are at most `most`. Rows are decided by `rule`; without one the
// router's choice stands, and only those experts are loaded that weigh at least `factor` times the lightest.
int64_t raymoe_turns(const Turn* turns, int64_t first, int64_t last, int64_t number_of_turn, const Rule* rule,
                     float factor, int64_t most, int64_t patience_ns, Copy copy, void* stream, int32_t* out) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + std::chrono::nanoseconds(patience_ns);
  out[0] = out[1] = 0;
  for (int64_t layer = first; layer < last; layer++) {
    const Turn& turn = turns[layer];
    for (int looks = 0; !heard(turn); looks++)
      if (looks % kLooks == kLooks - 1 && Clock::now() > end) return layer;
    int32_t slots[kMostExperts];
    *turn.replaced = 0;
    for (int64_t i = 0; i < turn.k; i++) {
      turn.chosen[i] = static_cast<int32_t>(number(turn, i));
      turn.weights[i] = number(turn, turn.k + i);
      slots[i] = turn.slot_of[turn.chosen[i]];
    }
    const bool is_plain = std::all_of(slots, slots + turn.k, [](int32_t slot) { return slot >= 0; });
    if (!is_plain && rule && rule->alpha > 0) substitute(turn, *rule, slots);
    std::memset(turn.shielded, 0, turn.slots);
    bool all = true;
    for (int64_t i = 0; i < turn.k; i++) {
      if (slots[i] >= 0)
        turn.shielded[slots[i]] = 1;
      else
        all = false;
    }
    if (!all) {
      out[0] = 1;
      const float least = rule ? -INFINITY : factor * *std::min_element(turn.weights, turn.weights + turn.k);
      out[1] = copy ? begin(turn, slots, least, most, copy, stream, out + 2) : 0;
      return layer;
    }
    answer(turn, number_of_turn, slots);
  }
  return last;
}
}
