// Coverage of each patch by a region: one block per image, a warp per patch, bound by reading the region once. Integer sums, so the
// order does not matter.
#include "coverage.h"

namespace mwm {
namespace cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kCoverThreads) region_coverage_kernel(const T* region, Cut cut, int64_t* cover, uint8_t* inside) {
  const int64_t image = blockIdx.x, patches = static_cast<int64_t>(cut.rows) * cut.columns;
  cover_image(region + image * cut.image, cut, cover + image * patches, inside + image * patches);
}

}  // namespace

void region_coverage(const View& region, int64_t threshold, const View& inside, const View& cover, int64_t device, int64_t stream) {
  const char* op = "region_coverage";
  const Cut cut = cut_of(op, region, threshold, inside, cover);
  const Place place(device, stream);
  with_region(op, region.dtype, [&](auto tag) {
    using T = decltype(tag);
    launch(op, place, region.shape[0], 1, kCoverThreads, region_coverage_kernel<T>, pointer<T>(region), cut, pointer<int64_t>(cover), pointer<uint8_t>(inside));
  });
}

}  // namespace cuda
}  // namespace mwm
