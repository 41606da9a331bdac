// Stratified sampling with exact counts, and the random words themselves. Work is cut by image.
//
// Per image: Philox words sixteen counters at a time, the keys of each stratum gathered side by side, then the lowest ones by
// counting how many keys are smaller (few keys) or by building the threshold bit by bit (many). Integers only.
#include "../fixed_log2.h"
#include "../philox.h"
#include "isa.h"

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int64_t kMaxPatches = int64_t{1} << 20;
constexpr int64_t kRankLimit = 128;
constexpr int64_t kSmall = 1024;

struct Counter {
  uint64_t key;
  uint32_t id, epoch, tail;
};

// words[0 ... count) of a stream, count rounded up to 64 by the caller's buffer.
void fill_words(const Counter& counter, uint32_t stream, int64_t count, uint32_t* words) {
  uint32_t c0[kPhiloxLanes], c3[kPhiloxLanes], out[4][kPhiloxLanes];
  for (uint32_t& word : c3) word = (stream << 16) | counter.tail;
  for (int64_t block = 0; block * 64 < count; ++block) {
    for (int i = 0; i < kPhiloxLanes; ++i) c0[i] = static_cast<uint32_t>(block * kPhiloxLanes + i);
    philox16(c0, counter.id, counter.epoch, c3, counter.key, out);
    for (int i = 0; i < kPhiloxLanes; ++i)
      for (int w = 0; w < 4; ++w) words[block * 64 + 4 * i + w] = out[w][i];
  }
}

template <class Key>
int64_t count_below(const Key* keys, int64_t count, Key limit) {
  Key below = 0;
  for (int64_t i = 0; i < count; ++i) below += keys[i] < limit ? 1 : 0;
  return static_cast<int64_t>(below);
}

// Marks the `wanted` lowest keys, ties by the lower position; 0 < wanted < count. hide[i] = 1 where chosen.
template <class Key>
void mark_lowest(const Key* keys, int64_t count, int64_t wanted, uint8_t* hide) {
  if (count <= kRankLimit) {
    Key rank[kRankLimit] = {};
    const int64_t padded = (count + 15) / 16 * 16;
    for (int64_t j = 0; j < count; ++j) {
      const Key key = keys[j];
      for (int64_t i = 0; i < padded; ++i) rank[i] += key < keys[i] ? 1 : 0;
    }
    int64_t chosen = 0;
    for (int64_t i = 0; i < count; ++i) {
      hide[i] = static_cast<int64_t>(rank[i]) < wanted;
      chosen += hide[i];
    }
    if (chosen == wanted) return;
    // Equal keys straddle the limit; the threshold below sorts them out.
  }
  Key threshold = 0;
  for (int bit = static_cast<int>(sizeof(Key)) * 8 - 1; bit >= 0; --bit) {
    const Key candidate = threshold | (Key{1} << bit);
    if (count_below(keys, count, candidate) < wanted) threshold = candidate;
  }
  int64_t equal_left = wanted - count_below(keys, count, threshold);
  for (int64_t i = 0; i < count; ++i) {
    hide[i] = keys[i] < threshold;
    if (keys[i] == threshold && equal_left > 0) {
      hide[i] = 1;
      --equal_left;
    }
  }
}

// Buffers of one thread, on the stack for usual grids.
template <class Key>
struct Room {
  int64_t patches, strata;
  uint32_t *words, *more, *chance;
  Key* keys;
  int32_t* place;
  uint8_t* hide;
  int64_t* sizes;
  void* heap;
  alignas(64) char stack[kSmall * 32];

  Room(int64_t patches_, int64_t strata_) : patches(patches_), strata(strata_), heap(nullptr) {
    const int64_t padded = (patches + 63) / 64 * 64 + 64, kinds = (strata + 63) / 64 * 64 + 64;
    const int64_t bytes = padded * static_cast<int64_t>(8 + sizeof(Key) + 4 + 1) + kinds * 12 + 8 * 64;
    char* next = stack;
    if (bytes > static_cast<int64_t>(sizeof stack)) {
      heap = __builtin_malloc(static_cast<size_t>(bytes));
      if (heap) next = static_cast<char*>(heap);
    }
    ok = heap != nullptr || bytes <= static_cast<int64_t>(sizeof stack);
    sizes = take<int64_t>(next, kinds);
    keys = take<Key>(next, padded);
    words = take<uint32_t>(next, padded);
    more = take<uint32_t>(next, padded);
    chance = take<uint32_t>(next, kinds);
    place = take<int32_t>(next, padded);
    hide = take<uint8_t>(next, padded);
  }
  ~Room() { __builtin_free(heap); }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;

  template <class T>
  static T* take(char*& next, int64_t count) {
    T* here = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return here;
  }

  bool ok;
};

template <class Key>
Key patch_key(uint32_t word, uint32_t more, int64_t weight) {
  if constexpr (sizeof(Key) == 4) return word;
  if (weight == 0) return (uint64_t{1} << 62) + word;
  const uint64_t bits = (static_cast<uint64_t>(word) << 32) | more;
  return static_cast<Key>((static_cast<uint64_t>(negative_log2(bits)) << 16) / static_cast<uint64_t>(weight));
}

struct Problem {
  const View *strata, *amounts, *ids, *weights, *active;
  bool exact;
  uint64_t key;
  uint32_t epoch, view;
  int64_t kinds;

  int64_t amount(int64_t b, int64_t s) const {
    const int64_t* values = pointer<int64_t>(*amounts);
    return amounts->ndim == 1 ? values[s * amounts->strides[0]] : values[b * amounts->strides[0] + s * amounts->strides[1]];
  }
};

// What a parallel body cannot throw is kept here; the lowest image wins, so that the message does not depend on threads.
struct Refusal {
  int64_t image = INT64_MAX;
  int code = 0;
  void note(int64_t b, int why) {
    // At most a handful of bad images; a lock-free minimum is enough.
    int64_t seen = __atomic_load_n(&image, __ATOMIC_RELAXED);
    while (b < seen && !__atomic_compare_exchange_n(&image, &seen, b, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    __atomic_store_n(&code, why, __ATOMIC_RELAXED);
  }
};

template <class Stratum, class Key>
void sample_image(const Problem& problem, int64_t b, Room<Key>& room, Refusal& refusal) {
  const int64_t patches = room.patches, kinds = problem.kinds, step = problem.strata->strides[1];
  const Stratum* stratum = pointer<Stratum>(*problem.strata) + b * problem.strata->strides[0];
  uint8_t* active = pointer<uint8_t>(*problem.active) + b * patches;
  const int64_t id = pointer<int64_t>(*problem.ids)[b * problem.ids->strides[0]];
  if (id < 0 || id > 0xffffffffll) return refusal.note(b, 1);
  for (int64_t s = 0; s < kinds; ++s) room.sizes[s] = 0;
  for (int64_t i = 0; i < patches; ++i) {
    const int64_t s = static_cast<int64_t>(stratum[i * step]);
    if (s < 0 || s >= kinds) return refusal.note(b, 2);
    ++room.sizes[s];
  }
  const Counter counter{problem.key, static_cast<uint32_t>(id), problem.epoch, problem.view};
  fill_words(counter, kStreamKey, patches, room.words);
  if (sizeof(Key) == 8) fill_words(counter, kStreamWeight, patches, room.more);
  bool need_chance = !problem.exact;
  for (int64_t s = 0; s < kinds; ++s) {
    const int64_t size = room.sizes[s], amount = problem.amount(b, s);
    int64_t hidden = amount;
    if (problem.exact) {
      if (amount < 0 || amount > size) return refusal.note(b, 3);
    } else {
      if (amount < 0 || amount > (int64_t{1} << 32)) return refusal.note(b, 4);
      const int64_t product = size * amount;
      hidden = product >> 32;
      if ((product & 0xffffffffll) != 0) {
        if (need_chance) fill_words(counter, kStreamRounding, kinds, room.chance);
        need_chance = false;
        hidden += static_cast<int64_t>(room.chance[s]) < (product & 0xffffffffll);
      }
    }
    if (hidden == 0 || hidden == size) {
      const uint8_t value = hidden == 0;
      for (int64_t i = 0; i < patches; ++i) active[i] = static_cast<int64_t>(stratum[i * step]) == s ? value : active[i];
      continue;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < patches; ++i) {
      const int64_t weight = sizeof(Key) == 8 ? pointer<int64_t>(*problem.weights)[b * problem.weights->strides[0] + i * problem.weights->strides[1]] : 1;
      room.keys[count] = patch_key<Key>(room.words[i], sizeof(Key) == 8 ? room.more[i] : 0, weight);
      room.place[count] = static_cast<int32_t>(i);
      count += static_cast<int64_t>(stratum[i * step]) == s;
    }
    for (int64_t i = count; i < (count + 15) / 16 * 16; ++i) room.keys[i] = 0;
    mark_lowest(room.keys, count, hidden, room.hide);
    for (int64_t i = 0; i < count; ++i) active[room.place[i]] = !room.hide[i];
  }
}

template <class Stratum>
void sample_all(const Problem& problem, int64_t batch, int64_t patches, int64_t threads, Refusal& refusal) {
  const int64_t grain = 4096 / (patches + 1) + 1;
  auto run = [&](auto key) {
    parallel_for(batch, grain, threads, [&](int64_t begin, int64_t end) {
      Room<decltype(key)> room(patches, problem.kinds);
      if (!room.ok) return refusal.note(begin, 5);
      for (int64_t b = begin; b < end; ++b) sample_image<Stratum>(problem, b, room, refusal);
    });
  };
  if (is_none(*problem.weights)) run(uint32_t{});
  else run(uint64_t{});
}

}  // namespace

void random_words(const View& ids, int64_t seed, int64_t epoch, int64_t view, int64_t stream, const View& out, int64_t threads) {
  check("random_words: ids", ids, 1, DType::kInt64);
  check("random_words: out", out, 2, DType::kInt64);
  check_contiguous("random_words: out", out);
  const int64_t batch = ids.shape[0], count = out.shape[1];
  if (out.shape[0] != batch) fail("random_words: out must have one row per id");
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t id = pointer<int64_t>(ids)[b * ids.strides[0]];
    if (id < 0 || id > 0xffffffffll) fail("random_words: ids must be integers in [0, 2**32), got %lld", static_cast<long long>(id));
  }
  parallel_for(batch, 4096 / (count + 1) + 1, threads, [&](int64_t begin, int64_t end) {
    uint32_t c0[kPhiloxLanes], c3[kPhiloxLanes], words[4][kPhiloxLanes];
    for (uint32_t& word : c3) word = (static_cast<uint32_t>(stream) << 16) | static_cast<uint32_t>(view);
    for (int64_t b = begin; b < end; ++b) {
      const uint32_t id = static_cast<uint32_t>(pointer<int64_t>(ids)[b * ids.strides[0]]);
      for (int64_t first = 0; first < count; first += 64) {
        for (int i = 0; i < kPhiloxLanes; ++i) c0[i] = static_cast<uint32_t>(first / 4 + i);
        philox16(c0, id, static_cast<uint32_t>(epoch), c3, static_cast<uint64_t>(seed), words);
        for (int64_t j = first; j < least(first + 64, count); ++j)
          pointer<int64_t>(out)[b * count + j] = words[(j - first) % 4][(j - first) / 4];
      }
    }
  });
}

void sample_active(const View& strata, const View& amounts, int64_t exact, int64_t seed, const View& ids, int64_t epoch, int64_t view,
                   const View& weights, const View& active, int64_t threads) {
  check("sample_active: strata", strata, 2);
  check("sample_active: amounts", amounts, amounts.ndim == 1 ? 1 : 2, DType::kInt64);
  check("sample_active: ids", ids, 1, DType::kInt64);
  check("sample_active: active", active, 3, DType::kBool);
  check_contiguous("sample_active: active", active);
  const int64_t batch = strata.shape[0], patches = strata.shape[1];
  if (patches > kMaxPatches || active.shape[0] != batch || active.shape[1] * active.shape[2] != patches || ids.shape[0] != batch ||
      (amounts.ndim == 2 && amounts.shape[0] != batch))
    fail("sample_active: the shapes of strata, ids, amounts and grid do not fit");
  if (!is_none(weights)) {
    check("sample_active: weights", weights, 2, DType::kInt64);
    if (weights.shape[0] != batch || weights.shape[1] != patches) fail("sample_active: weights must have the shape of strata");
  }
  const Problem problem{&strata, &amounts, &ids, &weights, &active, exact != 0, static_cast<uint64_t>(seed), static_cast<uint32_t>(epoch),
                        static_cast<uint32_t>(view), amounts.shape[amounts.ndim - 1]};
  Refusal refusal;
  switch (strata.dtype) {
    case DType::kInt64: sample_all<int64_t>(problem, batch, patches, threads, refusal); break;
    case DType::kInt32: sample_all<int32_t>(problem, batch, patches, threads, refusal); break;
    case DType::kInt16: sample_all<int16_t>(problem, batch, patches, threads, refusal); break;
    case DType::kUInt8: case DType::kBool: sample_all<uint8_t>(problem, batch, patches, threads, refusal); break;
    default: fail("sample_active: strata must be int64, int32, int16, uint8 or bool");
  }
  const long long image = static_cast<long long>(refusal.image);
  switch (refusal.code) {
    case 0: return;
    case 1: fail("sample_active: ids must be integers in [0, 2**32), see image %lld.", image);
    case 2: fail("sample_active: strata must lie in [0, %lld), see image %lld.", static_cast<long long>(problem.kinds), image);
    case 3: fail("sample_active: hidden must be between 0 and the number of patches of each stratum, see image %lld.", image);
    case 4: fail("sample_active: ratio must be Q32 integers in [0, 2**32], see image %lld. Use to_q32.", image);
    default: fail("sample_active: out of memory");
  }
}

}  // namespace MWM_ISA
}  // namespace mwm
