// Stratified sampling with exact counts, and the random words themselves. Work is cut by image.
//
// Per image: Philox words sixteen counters at a time, the keys of each stratum gathered side by side, then the lowest ones by
// counting how many keys are smaller (few keys) or by building the threshold bit by bit until it cuts off the wanted number (many).
// Integers only.
#include "../fixed_log2.h"
#include "../philox.h"
#include "isa.h"

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int64_t kMaxPatches = int64_t{1} << 20;
constexpr int64_t kRankLimit = 64;
constexpr int64_t kSmall = 1024;

struct Counter {
  uint64_t key;
  uint32_t id, epoch, tail;
};

// words[0 ... count) of a stream; the buffer holds count rounded up to 64.
void fill_words(const Counter& counter, uint32_t stream, int64_t count, uint32_t* words) {
  const uint32_t tail = (stream << 16) | counter.tail;
  for (int64_t block = 0; block * 64 < count; ++block)
    philox_words(static_cast<uint32_t>(block * kPhiloxLanes), counter.id, counter.epoch, tail, tail, counter.key, words + block * 64);
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
    const int64_t below = count_below(keys, count, candidate);
    if (below < wanted) threshold = candidate;
    if (below == wanted) {  // some ten bits tell a hundred keys apart
      for (int64_t i = 0; i < count; ++i) hide[i] = keys[i] < candidate;
      return;
    }
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
  Key *keys, *race;
  int32_t* place;
  uint8_t* hide;
  void* heap;
  alignas(64) char stack[kSmall * 32];

  Room(int64_t patches_, int64_t strata_) : patches(patches_), strata(strata_), heap(nullptr) {
    const int64_t padded = (patches + 63) / 64 * 64 + 64, kinds = (strata + 63) / 64 * 64 + 64;
    const int64_t bytes = padded * static_cast<int64_t>(8 + 2 * sizeof(Key) + 4 + 1) + kinds * 4 + 8 * 64;
    char* next = stack;
    if (bytes > static_cast<int64_t>(sizeof stack)) {
      heap = __builtin_malloc(static_cast<size_t>(bytes));
      if (heap) next = static_cast<char*>(heap);
    }
    ok = heap != nullptr || bytes <= static_cast<int64_t>(sizeof stack);
    keys = take<Key>(next, padded);
    race = take<Key>(next, padded);
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

uint64_t race_key(uint32_t word, uint32_t more, int64_t weight) {
  if (weight == 0) return (uint64_t{1} << 62) + word;
  const uint64_t bits = (static_cast<uint64_t>(word) << 32) | more;
  return (static_cast<uint64_t>(negative_log2(bits)) << 16) / static_cast<uint64_t>(weight);
}

struct Problem {
  const View *strata, *amounts, *ids, *weights, *active;
  bool exact;
  uint64_t key;
  uint32_t epoch, view;
  int64_t kinds;

  Counter counter(int64_t b) const {
    return {key, static_cast<uint32_t>(pointer<int64_t>(*ids)[b * ids->strides[0]]), epoch, view};
  }
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

// Number to hide of a stratum of `size` patches, or the negated code of a refusal. `chance` is asked only for a fractional count.
template <class Chance>
int64_t count_hidden(const Problem& problem, int64_t b, int64_t s, int64_t size, const Chance& chance) {
  const int64_t amount = problem.amount(b, s);
  if (problem.exact) return amount < 0 || amount > size ? -3 : amount;
  if (amount < 0 || amount > (int64_t{1} << 32)) return -4;
  const int64_t product = size * amount, fraction = product & 0xffffffffll;
  return (product >> 32) + (fraction != 0 && static_cast<int64_t>(chance(s)) < fraction);
}

template <class Stratum, class Key>
void sample_image(const Problem& problem, int64_t b, Room<Key>& room, Refusal& refusal) {
  const int64_t patches = room.patches, kinds = problem.kinds, step = problem.strata->strides[1];
  const Stratum* stratum = pointer<Stratum>(*problem.strata) + b * problem.strata->strides[0];
  uint8_t* active = pointer<uint8_t>(*problem.active) + b * patches;
  const Counter counter = problem.counter(b);
  fill_words(counter, kStreamKey, patches, room.words);
  if constexpr (sizeof(Key) == 8) {
    fill_words(counter, kStreamWeight, patches, room.more);
    const View& weights = *problem.weights;
    const int64_t* weight = pointer<int64_t>(weights) + b * weights.strides[0];
    for (int64_t i = 0; i < patches; ++i) room.race[i] = race_key(room.words[i], room.more[i], weight[i * weights.strides[1]]);
  }
  bool drawn = false;
  auto chance = [&](int64_t s) {
    if (!drawn) fill_words(counter, kStreamRounding, kinds, room.chance);
    drawn = true;
    return room.chance[s];
  };
  int64_t seen = 0;
  for (int64_t s = 0; s < kinds; ++s) {
    int64_t size = 0;
    for (int64_t i = 0; i < patches; ++i) {
      if constexpr (sizeof(Key) == 8) room.keys[size] = room.race[i];
      else room.keys[size] = room.words[i];
      room.place[size] = static_cast<int32_t>(i);
      size += static_cast<int64_t>(stratum[i * step]) == s;
    }
    seen += size;
    const int64_t hidden = count_hidden(problem, b, s, size, chance);
    if (hidden < 0) return refusal.note(b, static_cast<int>(-hidden));
    if (hidden == 0 || hidden == size) std::memset(room.hide, hidden != 0, static_cast<size_t>(size));
    else mark_lowest(room.keys, size, hidden, room.hide);
    for (int64_t i = 0; i < size; ++i) active[room.place[i]] = !room.hide[i];
  }
  if (seen != patches) refusal.note(b, 2);
}

#if defined(__AVX512BW__)
// Strata as int32 with -1 behind the last; false where one is out of range.
template <class Stratum>
bool copy_strata(const Problem& problem, int64_t b, int64_t patches, int32_t* out, int64_t room) {
  const int64_t step = problem.strata->strides[1];
  const Stratum* stratum = pointer<Stratum>(*problem.strata) + b * problem.strata->strides[0];
  const uint64_t kinds = static_cast<uint64_t>(problem.kinds);
  uint32_t outside = 0;
  auto copy = [&](int64_t i, Stratum value) {
    outside |= static_cast<uint64_t>(static_cast<int64_t>(value)) >= kinds ? 1u : 0u;
    out[i] = static_cast<int32_t>(value);
  };
  if (step == 1) for (int64_t i = 0; i < patches; ++i) copy(i, stratum[i]);
  else for (int64_t i = 0; i < patches; ++i) copy(i, stratum[i * step]);
  for (int64_t i = patches; i < room; ++i) out[i] = -1;
  return outside == 0;
}

// Grids of at most kMasked patches without weights: the words stay where they are, a stratum is a mask over them, and the limit is
// found bit by bit. False: the general way must decide, because something is to be refused or two equal words straddle a limit.
constexpr int64_t kMasked = 1024;

template <class Stratum>
bool sample_masked(const Problem& problem, int64_t b, int64_t patches) {
  alignas(64) int32_t strata[kMasked];
  alignas(64) uint32_t words[kMasked], rounding[64];
  __mmask16 member[kMasked / 16], hide[kMasked / 16] = {};
  const int vectors = static_cast<int>((patches + 15) / 16);
  if (!copy_strata<Stratum>(problem, b, patches, strata, vectors * 16)) return false;
  const Counter counter = problem.counter(b);
  const int64_t last = (patches - 1) / 64;
  fill_words(counter, kStreamKey, last * 64, words);
  const uint32_t tail = (kStreamKey << 16) | counter.tail, rounding_tail = (kStreamRounding << 16) | counter.tail;
  // The last four words of the last block are free for the rounding, if no patch needs them.
  const bool spare = patches - last * 64 <= 60 && problem.kinds <= 4;
  philox_words(static_cast<uint32_t>(last * kPhiloxLanes), counter.id, counter.epoch, tail, spare ? rounding_tail : tail, counter.key, words + last * 64);
  if (!spare) fill_words(counter, kStreamRounding, problem.kinds, rounding);
  auto chance = [&](int64_t s) { return spare ? words[last * 64 + 60 + s] : rounding[s]; };
  for (int64_t s = 0; s < problem.kinds; ++s) {
    int64_t size = 0;
    for (int q = 0; q < vectors; ++q) {
      member[q] = _mm512_cmpeq_epi32_mask(_mm512_load_si512(strata + 16 * q), _mm512_set1_epi32(static_cast<int>(s)));
      size += __builtin_popcount(member[q]);
    }
    const int64_t hidden = count_hidden(problem, b, s, size, chance);
    if (hidden < 0) return false;
    uint32_t threshold = 0, candidate = 0;
    int64_t below = hidden == 0 ? 0 : -1;
    for (int bit = 31; below != hidden && hidden < size; --bit) {
      if (bit < 0) return false;
      candidate = threshold | (uint32_t{1} << bit);
      below = 0;
      for (int q = 0; q < vectors; ++q)
        below += __builtin_popcount(_mm512_mask_cmplt_epu32_mask(member[q], _mm512_load_si512(words + 16 * q), _mm512_set1_epi32(static_cast<int>(candidate))));
      if (below < hidden) threshold = candidate;
    }
    for (int q = 0; q < vectors; ++q)
      hide[q] = static_cast<__mmask16>(hide[q] | (hidden == size ? member[q] : _mm512_mask_cmplt_epu32_mask(member[q], _mm512_load_si512(words + 16 * q),
                                                                             _mm512_set1_epi32(static_cast<int>(candidate)))));
  }
  uint8_t* active = pointer<uint8_t>(*problem.active) + b * patches;
  for (int q = 0; q < vectors; ++q) {
    const int64_t left = patches - 16 * q;
    const __mmask16 exist = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1);
    _mm_mask_storeu_epi8(active + 16 * q, exist, _mm_maskz_set1_epi8(static_cast<__mmask16>(~hide[q]), 1));
  }
  return true;
}
#else
template <class Stratum>
bool sample_masked(const Problem&, int64_t, int64_t) { return false; }
constexpr int64_t kMasked = 0;
#endif

template <class Stratum>
void sample_all(const Problem& problem, int64_t batch, int64_t patches, int64_t threads, Refusal& refusal) {
  const int64_t grain = 32768 / (patches + 1) + 1;  // about 0.1 ms: less is not worth waking a thread
  auto run = [&](auto key) {
    parallel_for(batch, grain, threads, [&](int64_t begin, int64_t end) {
      using Key = decltype(key);
      Room<Key> room(patches, problem.kinds);
      if (!room.ok) return refusal.note(begin, 5);
      const bool masked = patches > 0 && patches <= kMasked && sizeof(Key) == 4 && problem.kinds <= 64;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t id = pointer<int64_t>(*problem.ids)[b * problem.ids->strides[0]];
        if (id < 0 || id > 0xffffffffll) refusal.note(b, 1);
        else if (!masked || !sample_masked<Stratum>(problem, b, patches)) sample_image<Stratum>(problem, b, room, refusal);
      }
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
  parallel_for(batch, 32768 / (count + 1) + 1, threads, [&](int64_t begin, int64_t end) {
    const uint32_t tail = (static_cast<uint32_t>(stream) << 16) | static_cast<uint32_t>(view);
    uint32_t words[64];
    for (int64_t b = begin; b < end; ++b) {
      const uint32_t id = static_cast<uint32_t>(pointer<int64_t>(ids)[b * ids.strides[0]]);
      for (int64_t first = 0; first < count; first += 64) {
        philox_words(static_cast<uint32_t>(first / 4), id, static_cast<uint32_t>(epoch), tail, tail, static_cast<uint64_t>(seed), words);
        for (int64_t j = first; j < least(first + 64, count); ++j) pointer<int64_t>(out)[b * count + j] = words[j - first];
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
