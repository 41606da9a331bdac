// Sum over the visible positions of each image. Work is cut by image and block of channels; inside, the order is fixed: the rows
// of a tile in the accumulation type, then tiles and rows in double. So the result depends on nothing but the input.
#include "isa.h"

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int64_t kBlock = 64;

template <class T>
void sum_block(const View& x, int64_t first, int64_t last, int64_t channel, int64_t width, typename Wide<T>::type* out) {
  using W = typename Wide<T>::type;
  double total[kBlock] = {};
  const int64_t step = x.strides[1];
  for (int64_t n = first; n < last; ++n) {
    for (int64_t i = 0; i < x.shape[2]; ++i) {
      W row[kBlock] = {};
      for (int64_t j = 0; j < x.shape[3]; ++j) {
        const T* from = pointer<T>(x) + n * x.strides[0] + i * x.strides[2] + j * x.strides[3] + channel * step;
        if (step == 1) {
          for (int64_t c = 0; c < width; ++c) row[c] += widen(from[c]);
        } else {
          for (int64_t c = 0; c < width; ++c) row[c] += widen(from[c * step]);
        }
      }
      for (int64_t c = 0; c < width; ++c) total[c] += static_cast<double>(row[c]);
    }
  }
  for (int64_t c = 0; c < width; ++c) out[c] = static_cast<W>(total[c]);
}

}  // namespace

void image_sum(const View& x, const View& offsets, const View& out, int64_t threads) {
  check("image_sum: x", x, 4);
  check("image_sum: offsets", offsets, 1, DType::kInt32);
  check("image_sum: out", out, 2, x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  check_contiguous("image_sum: offsets", offsets);
  check_contiguous("image_sum: out", out);
  const int64_t batch = out.shape[0], channels = x.shape[1];
  const int32_t* offset = pointer<int32_t>(offsets);
  if (offsets.shape[0] != batch + 1 || out.shape[1] != channels) fail("image_sum: out does not have one row per image");
  for (int64_t b = 0; b < batch; ++b)
    if (offset[b] < 0 || offset[b] > offset[b + 1] || offset[b + 1] > x.shape[0]) fail("image_sum: offsets do not fit the tiles. Use build_plan.");
  const int64_t blocks = (channels + kBlock - 1) / kBlock;
  with_float("image_sum", x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t work = (x.shape[0] * x.shape[2] * x.shape[3] / (batch + 1) + 1) * kBlock;
    parallel_for(batch * blocks, most<int64_t>(1, 16384 / work), threads, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / blocks, channel = item % blocks * kBlock;
        sum_block<T>(x, offset[b], offset[b + 1], channel, least(kBlock, channels - channel),
                     pointer<typename Wide<T>::type>(out) + b * channels + channel);
      }
    });
  });
}

}  // namespace MWM_ISA
}  // namespace mwm
