// From regions to masks in one launch: a block covers the patches of an image and samples them at once. The masks are those of
// region_coverage followed by sample_active, bit for bit.
#include "coverage.h"
#include "sampling.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kPatches = 2048;
constexpr int kOutside = 0, kInside = 1, kWithout = 2;  // strata; kWithout: patches of an image whose region is empty

struct Rule {
  Draw draw;
  int64_t ratio[3];  // Q32, by stratum
  int64_t total;     // patches to hide in every image, or -1
  uint32_t stream;   // of the word that rounds the inside count where a total is given

  __device__ int64_t hide(uint32_t id, int kind, int64_t size, int64_t patches) const {
    if (total < 0) return count_hidden(draw, id, kind, size, ratio[kind]);
    const int64_t in = kind == kInside ? size : patches - size, exact = in * ratio[kInside];
    uint32_t words[4];
    draw.words(id, stream, 0, words);
    const int64_t wanted = (exact >> 32) + (static_cast<int64_t>(words[0]) < (exact & 0xffffffffll));
    const int64_t hidden = least(most(wanted, total - (patches - in)), least(in, total));
    return kind == kInside ? hidden : total - hidden;
  }
};

template <class T>
__global__ void __launch_bounds__(kCoverThreads) region_active_kernel(const T* region, Cut cut, Rule rule, const int64_t* ids, int64_t ids_step, int64_t* cover, uint8_t* inside,
                                                                      uint8_t* active) {
  __shared__ uint64_t keys[kPatches];
  __shared__ int32_t strata[kPatches], hidden[kMaxKinds];
  const int64_t image = blockIdx.x;
  const int32_t patches = cut.rows * cut.columns;
  cover += image * patches, inside += image * patches, active += image * patches;
  const bool found = cover_image(region + image * cut.image, cut, cover, inside);
  const uint32_t id = checked_id(ids[image * ids_step]);
  // Under a total an empty region is nothing special: every image hides the same count.
  const bool without = rule.total < 0 && !found;
  sample_ranked<kCoverThreads>(
      rule.draw, id, patches, 3, static_cast<int>(threadIdx.x), false, Room{keys, strata, hidden}, [&](int i) { return without ? kWithout : inside[i] ? kInside : kOutside; },
      [&](int, uint32_t word, uint32_t) { return static_cast<uint64_t>(word); },
      [&](int kind, int64_t size) { return kind == kWithout && !without ? int64_t{0} : rule.hide(id, kind, size, patches); }, active);
}

}  // namespace

void region_active(const View& region, int64_t threshold, const Ints& rule, int64_t seed, const View& ids, int64_t epoch, int64_t view, const View& inside, const View& cover,
                   const View& active, int64_t device, int64_t stream) {
  const char* op = "region_active";
  const Cut cut = cut_of(op, region, threshold, inside, cover);
  check(op, ids, 1, DType::kInt64);
  check(op, active, 3, DType::kBool);
  check_contiguous(op, active);
  for (int i = 0; i < 3; ++i)
    if (active.shape[i] != inside.shape[i]) fail("%s: active must have the shape of inside", op);
  if (ids.shape[0] != region.shape[0]) fail("%s: ids must have one number per region", op);
  if (int64_t{cut.rows} * cut.columns > kPatches) fail("%s: the grid must have at most %d patches", op, kPatches);
  if (rule.count != 5) fail("%s: the rule must have 5 numbers", op);
  for (int i = 0; i < 3; ++i)
    if (rule.values[i] < 0 || rule.values[i] > (int64_t{1} << 32)) fail("%s: ratio must be Q32 integers in [0, 2**32]. Use to_q32.", op);
  if (rule.values[3] > int64_t{cut.rows} * cut.columns || rule.values[4] < 0 || rule.values[4] > 65535) fail("%s: the count or the stream is out of range", op);
  const Rule how{{static_cast<uint64_t>(seed), static_cast<uint32_t>(epoch), static_cast<uint32_t>(view)},
                 {rule.values[0], rule.values[1], rule.values[2]},
                 rule.values[3],
                 static_cast<uint32_t>(rule.values[4])};
  const Place place(device, stream);
  with_region(op, region.dtype, [&](auto tag) {
    using T = decltype(tag);
    launch(op, place, region.shape[0], 1, kCoverThreads, region_active_kernel<T>, pointer<T>(region), cut, how, pointer<int64_t>(ids), ids.strides[0], pointer<int64_t>(cover),
           pointer<uint8_t>(inside), pointer<uint8_t>(active));
  });
}

}  // namespace cuda
}  // namespace mwm
