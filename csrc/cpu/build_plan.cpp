// Numbers the visible patches. Serial: a batch of 128 masks of 7 x 7 is 6 kB.
#include "isa.h"

namespace mwm {
namespace MWM_ISA {

void build_plan(const View& active, int64_t visible, const View& coords, const View& slots, const View& offsets) {
  check("build_plan: active", active, 3, DType::kBool);
  check("build_plan: coords", coords, 2, DType::kInt32);
  check("build_plan: slots", slots, 3, DType::kInt32);
  check("build_plan: offsets", offsets, 1, DType::kInt32);
  check_contiguous("build_plan: coords", coords);
  check_contiguous("build_plan: slots", slots);
  check_contiguous("build_plan: offsets", offsets);
  const int64_t batch = active.shape[0], rows = active.shape[1], columns = active.shape[2], tiles = coords.shape[0];
  if (slots.shape[0] != batch || slots.shape[1] != rows || slots.shape[2] != columns || offsets.shape[0] != batch + 1)
    fail("build_plan: the outputs do not have the shape of active");
  if (element_count("build_plan: active", active) > INT32_MAX) fail("build_plan: active has more than 2^31 patches");
  const uint8_t* mask = pointer<uint8_t>(active);
  int32_t* place = pointer<int32_t>(coords);
  int32_t* slot = pointer<int32_t>(slots);
  int32_t* offset = pointer<int32_t>(offsets);
  int64_t n = 0;
  for (int64_t b = 0; b < batch; ++b) {
    offset[b] = static_cast<int32_t>(n);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const bool seen = mask[b * active.strides[0] + r * active.strides[1] + c * active.strides[2]] != 0;
        *slot++ = seen ? static_cast<int32_t>(n) : -1;
        if (!seen) continue;
        if (n < tiles) {
          place[3 * n] = static_cast<int32_t>(b);
          place[3 * n + 1] = static_cast<int32_t>(r);
          place[3 * n + 2] = static_cast<int32_t>(c);
        }
        ++n;
      }
    }
    if (visible >= 0 && n - offset[b] != visible)
      fail("build_plan: visible must be the number of visible patches of every image, got %lld, but image %lld has %lld. Leave visible out where it is not constant.",
           static_cast<long long>(visible), static_cast<long long>(b), static_cast<long long>(n - offset[b]));
  }
  offset[batch] = static_cast<int32_t>(n);
  if (n != tiles) fail("build_plan: active changed while it was read: %lld visible patches, expected %lld", static_cast<long long>(n), static_cast<long long>(tiles));
}

}  // namespace MWM_ISA
}  // namespace mwm
