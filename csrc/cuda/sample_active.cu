// Stratified sampling of visible patches, and the random words themselves.
//
// Up to 128 patches a warp samples an image, up to 2048 a block does, by counting ranks in shared memory: 4096 images of 7 x 7 are one
// launch of 1024 blocks. Beyond, a block finds each stratum's limit bit by bit and computes the keys again for every bit.
#include "sampling.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kThreads = 128, kWarpPatches = 128, kBlockThreads = 256, kBlockPatches = 2048, kMaxPatches = 1 << 20;

struct Problem {
  const void* strata;
  const int64_t *amounts, *ids, *weights;
  int64_t strata_row, strata_step, amounts_row, amounts_step, ids_step, weights_row, weights_step, batch;
  uint8_t* active;
  Draw draw;
  int32_t patches, kinds, strata_size;  // bytes of a stratum number; 1: unsigned
  bool exact;

  __device__ int64_t stratum(int64_t image, int i) const {
    const int64_t at = image * strata_row + i * strata_step;
    switch (strata_size) {
      case 8: return static_cast<const int64_t*>(strata)[at];
      case 4: return static_cast<const int32_t*>(strata)[at];
      case 2: return static_cast<const int16_t*>(strata)[at];
      default: return static_cast<const uint8_t*>(strata)[at];
    }
  }
  __device__ uint64_t key(int64_t image, int i, uint32_t word, uint32_t more) const {
    return weights ? race_key(word, more, weights[image * weights_row + i * weights_step]) : word;
  }
  __device__ int64_t hide(int64_t image, uint32_t id, int kind, int64_t size) const {
    const int64_t amount = amounts[image * amounts_row + kind * amounts_step];
    if (!exact) return count_hidden(draw, id, kind, size, amount);
    MWM_REQUIRE(amount >= 0 && amount <= size, "sample_active: hidden must be between 0 and the number of patches of each stratum.");
    return amount;
  }
};

template <int kTeam, int kLimit, int kBlock>
__global__ void __launch_bounds__(kBlock) sample_ranked_kernel(Problem p) {
  constexpr int kTeams = kBlock / kTeam;
  __shared__ uint64_t keys[kTeams][kLimit];
  __shared__ int32_t strata[kTeams][kLimit], hidden[kTeams][kMaxKinds];
  const int team = static_cast<int>(threadIdx.x) / kTeam, lane = static_cast<int>(threadIdx.x) % kTeam;
  const int64_t image = static_cast<int64_t>(blockIdx.x) * kTeams + team;
  if (image >= p.batch) return;
  const uint32_t id = checked_id(p.ids[image * p.ids_step]);
  sample_ranked<kTeam>(
      p.draw, id, p.patches, p.kinds, lane, p.weights != nullptr, Room{keys[team], strata[team], hidden[team]}, [&](int i) { return p.stratum(image, i); },
      [&](int i, uint32_t word, uint32_t more) { return p.key(image, i, word, more); }, [&](int kind, int64_t size) { return p.hide(image, id, kind, size); },
      p.active + image * p.patches);
}

// Sum over the block, the same in every thread. `room` has one place per warp.
__device__ int block_sum(int value, int* room) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = value;
  __syncthreads();
  int sum = 0;
  for (int warp = 0; warp < kBlockThreads / kWarp; ++warp) sum += room[warp];
  return sum;
}

__global__ void __launch_bounds__(kBlockThreads) sample_searched_kernel(Problem p) {
  __shared__ int room[kBlockThreads / kWarp];
  const int64_t image = blockIdx.x;
  const uint32_t id = checked_id(p.ids[image * p.ids_step]);
  uint8_t* active = p.active + image * p.patches;
  const int thread = static_cast<int>(threadIdx.x);
  // Calls body(i, key) for this thread's patches of a stratum.
  auto each = [&](int kind, const auto& body) {
    for (int block = thread; 4 * block < p.patches; block += kBlockThreads) {
      uint32_t words[4], more[4] = {};
      p.draw.words(id, kStreamKey, static_cast<uint32_t>(block), words);
      if (p.weights) p.draw.words(id, kStreamWeight, static_cast<uint32_t>(block), more);
      // Not unrolled: four divisions side by side do not fit the registers.
      MWM_UNROLL_BY(1)
      for (int k = 0; k < 4 && 4 * block + k < p.patches; ++k) {
        if (p.stratum(image, 4 * block + k) == kind) body(4 * block + k, p.key(image, 4 * block + k, words[0], more[0]));
        words[0] = words[1], words[1] = words[2], words[2] = words[3];
        more[0] = more[1], more[1] = more[2], more[2] = more[3];
      }
    }
  };
  for (int i = thread; i < p.patches; i += kBlockThreads) {
    const int64_t kind = p.stratum(image, i);
    MWM_REQUIRE(kind >= 0 && kind < p.kinds, "sample_active: strata must lie in [0, S).");
  }
  for (int kind = 0; kind < p.kinds; ++kind) {
    int mine = 0;
    each(kind, [&](int, uint64_t) { ++mine; });
    const int size = block_sum(mine, room);
    const int64_t hidden = p.hide(image, id, kind, size);
    // The limit (key, index): the largest pair with fewer than `hidden` patches before it.
    uint64_t limit = 0;
    int32_t index = 0;
    if (hidden > 0) {
      for (int bit = p.weights ? 62 : 31; bit >= 0; --bit) {
        const uint64_t candidate = limit | (uint64_t{1} << bit);
        mine = 0;
        each(kind, [&](int, uint64_t key) { mine += key < candidate; });
        if (block_sum(mine, room) < hidden) limit = candidate;
      }
      for (int bit = 19; bit >= 0; --bit) {
        const int32_t candidate = index | (1 << bit);
        mine = 0;
        each(kind, [&](int i, uint64_t key) { mine += key < limit || (key == limit && i < candidate); });
        if (block_sum(mine, room) < hidden) index = candidate;
      }
    }
    each(kind, [&](int i, uint64_t key) { active[i] = hidden == 0 || key > limit || (key == limit && i > index); });
  }
}

__global__ void __launch_bounds__(kBlockThreads) random_words_kernel(const int64_t* ids, int64_t ids_step, Draw draw, uint32_t tag, int64_t batch, int64_t count, int64_t* out) {
  const int64_t blocks = ceil_div<int64_t>(count, 4), item = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (item >= batch * blocks) return;
  const int64_t image = item / blocks, block = item % blocks;
  uint32_t words[4];
  draw.words(checked_id(ids[image * ids_step]), tag, static_cast<uint32_t>(block), words);
  for (int k = 0; k < 4 && 4 * block + k < count; ++k) out[image * count + 4 * block + k] = words[k];
}

}  // namespace

void random_words(const View& ids, int64_t seed, int64_t epoch, int64_t view, int64_t tag, const View& out, int64_t device, int64_t stream) {
  const char* op = "random_words";
  check(op, ids, 1, DType::kInt64);
  check(op, out, 2, DType::kInt64);
  check_contiguous(op, out);
  if (out.shape[0] != ids.shape[0]) fail("%s: out must have one row per id", op);
  const Place place(device, stream);
  const Draw draw{static_cast<uint64_t>(seed), static_cast<uint32_t>(epoch), static_cast<uint32_t>(view)};
  const int64_t items = ids.shape[0] * ceil_div<int64_t>(out.shape[1], 4);
  launch(op, place, ceil_div<int64_t>(items, kBlockThreads), 1, kBlockThreads, random_words_kernel, pointer<int64_t>(ids), ids.strides[0], draw, static_cast<uint32_t>(tag),
         ids.shape[0], out.shape[1], pointer<int64_t>(out));
}

void sample_active(const View& strata, const View& amounts, int64_t exact, int64_t seed, const View& ids, int64_t epoch, int64_t view, const View& weights,
                   const View& active, int64_t device, int64_t stream) {
  const char* op = "sample_active";
  check(op, strata, 2);
  check(op, amounts, amounts.ndim == 1 ? 1 : 2, DType::kInt64);
  check(op, ids, 1, DType::kInt64);
  check(op, active, 3, DType::kBool);
  check_contiguous(op, active);
  const int64_t batch = strata.shape[0], patches = strata.shape[1], kinds = amounts.shape[amounts.ndim - 1];
  if (patches > kMaxPatches || kinds > INT32_MAX || active.shape[0] != batch || active.shape[1] * active.shape[2] != patches || ids.shape[0] != batch ||
      (amounts.ndim == 2 && amounts.shape[0] != batch))
    fail("%s: the shapes of strata, ids, amounts and grid do not fit", op);
  switch (strata.dtype) {
    case DType::kInt64: case DType::kInt32: case DType::kInt16: case DType::kUInt8: case DType::kBool: break;
    default: fail("%s: strata must be int64, int32, int16, uint8 or bool", op);
  }
  Problem p{};
  if (!is_none(weights)) {
    check(op, weights, 2, DType::kInt64);
    if (weights.shape[0] != batch || weights.shape[1] != patches) fail("%s: weights must have the shape of strata", op);
    p.weights = pointer<int64_t>(weights), p.weights_row = weights.strides[0], p.weights_step = weights.strides[1];
  }
  p.strata = strata.data, p.strata_row = strata.strides[0], p.strata_step = strata.strides[1], p.strata_size = static_cast<int32_t>(item_size(strata.dtype));
  p.amounts = pointer<int64_t>(amounts), p.amounts_row = amounts.ndim == 2 ? amounts.strides[0] : 0, p.amounts_step = amounts.strides[amounts.ndim - 1];
  p.ids = pointer<int64_t>(ids), p.ids_step = ids.strides[0], p.active = pointer<uint8_t>(active), p.exact = exact != 0;
  p.draw = {static_cast<uint64_t>(seed), static_cast<uint32_t>(epoch), static_cast<uint32_t>(view)};
  p.batch = batch, p.patches = static_cast<int32_t>(patches), p.kinds = static_cast<int32_t>(kinds);
  const Place place(device, stream);
  if (patches == 0) return;
  if (patches <= kWarpPatches && kinds <= kMaxKinds)
    launch(op, place, ceil_div<int64_t>(batch, kThreads / kWarp), 1, kThreads, sample_ranked_kernel<kWarp, kWarpPatches, kThreads>, p);
  else if (patches <= kBlockPatches && kinds <= kMaxKinds)
    launch(op, place, batch, 1, kBlockThreads, sample_ranked_kernel<kBlockThreads, kBlockPatches, kBlockThreads>, p);
  else
    launch(op, place, batch, 1, kBlockThreads, sample_searched_kernel, p);
}

}  // namespace cuda
}  // namespace mwm
