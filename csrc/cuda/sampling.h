// Stratified sampling with exact counts of one image by a team of threads: sample_active and region_active. Integers only.
#pragma once

#include "../fixed_log2.h"
#include "../philox_scalar.h"
#include "device.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kMaxKinds = 64;  // strata of the kernels that keep an image in shared memory

// What the random words of an image depend on.
struct Draw {
  uint64_t key;
  uint32_t epoch, view;

  __device__ void words(uint32_t id, uint32_t stream, uint32_t block, uint32_t* out) const { philox_scalar(block, id, epoch, (stream << 16) | view, key, out); }
};

__device__ inline uint32_t checked_id(int64_t id) {
  MWM_REQUIRE(id >= 0 && id <= 0xffffffffll, "sample_active: ids must be integers in [0, 2**32).");
  return static_cast<uint32_t>(id);
}

// The exponential race of weighted patches; weight zero comes last.
__device__ inline uint64_t race_key(uint32_t word, uint32_t more, int64_t weight) {
  if (weight <= 0) return (uint64_t{1} << 62) + word;
  const uint64_t bits = (static_cast<uint64_t>(word) << 32) | more;
  return (static_cast<uint64_t>(negative_log2(bits)) << 16) / static_cast<uint64_t>(weight);
}

// Number to hide of `size` patches with a Q32 probability: the floor, plus one with the probability of the fraction.
__device__ inline int64_t count_hidden(const Draw& draw, uint32_t id, int32_t stratum, int64_t size, int64_t amount) {
  MWM_REQUIRE(amount >= 0 && amount <= (int64_t{1} << 32), "sample_active: ratio must be Q32 integers in [0, 2**32]. Use to_q32.");
  const int64_t product = size * amount, fraction = product & 0xffffffffll;
  if (fraction == 0) return product >> 32;
  uint32_t words[4];
  draw.words(id, kStreamRounding, static_cast<uint32_t>(stratum) / 4, words);
  const uint32_t low = stratum & 1 ? words[1] : words[0], high = stratum & 1 ? words[3] : words[2];
  return (product >> 32) + (static_cast<int64_t>(stratum & 2 ? high : low) < fraction);
}

template <int kTeam>
__device__ inline void team_barrier() {
  if (kTeam == kWarp) __syncwarp();
  else __syncthreads();
}

// Buffers of one image in shared memory.
struct Room {
  uint64_t* keys;
  int32_t *strata, *hidden;
};

// Hides the lowest keys of each stratum, ties by the lower index, by counting how many keys are smaller.
// stratum(i), key(i, word, more) and hide(stratum, size) say what is sampled; `lane` of kTeam threads.
template <int kTeam, class Stratum, class Key, class Hide>
__device__ void sample_ranked(const Draw& draw, uint32_t id, int32_t patches, int32_t kinds, int lane, bool weighted, const Room& room, const Stratum& stratum,
                              const Key& key, const Hide& hide, uint8_t* active) {
  for (int block = lane; 4 * block < patches; block += kTeam) {
    uint32_t words[4], more[4] = {};
    draw.words(id, kStreamKey, static_cast<uint32_t>(block), words);
    if (weighted) draw.words(id, kStreamWeight, static_cast<uint32_t>(block), more);
    MWM_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int i = 4 * block + k;
      if (i >= patches) break;
      const int64_t kind = stratum(i);
      MWM_REQUIRE(kind >= 0 && kind < kinds, "sample_active: strata must lie in [0, S).");
      room.keys[i] = key(i, words[k], more[k]);
      room.strata[i] = static_cast<int32_t>(kind);
    }
  }
  team_barrier<kTeam>();
  for (int kind = lane; kind < kinds; kind += kTeam) {
    int size = 0;
    for (int i = 0; i < patches; ++i) size += room.strata[i] == kind;
    room.hidden[kind] = static_cast<int32_t>(hide(kind, size));
  }
  team_barrier<kTeam>();
  for (int i = lane; i < patches; i += kTeam) {
    const uint64_t mine = room.keys[i];
    const int32_t kind = room.strata[i];
    int rank = 0;
    MWM_UNROLL_BY(4)
    for (int j = 0; j < patches; ++j) rank += room.strata[j] == kind && room.keys[j] < mine + (j < i ? 1 : 0);
    active[i] = rank >= room.hidden[kind];
  }
}

}  // namespace
}  // namespace cuda
}  // namespace mwm
