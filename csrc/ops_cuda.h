// Every CUDA kernel, declared once: the arguments of its twin in ops.h without the number of threads, then device and stream.
//
// To add one: put a line into the list and define the function in csrc/cuda/<op>.cu inside namespace mwm::cuda. It is then bound as
// mwm._cuda.<name>. Outputs are allocated by the caller; nothing here waits for the device.
#pragma once

#include "view.h"

// clang-format off
#define MWM_CUDA_KERNELS(X)                                                                                                   \
  /* active bool [B, Gh, Gw] -> offsets int32 [B + 1]: where each image's tiles begin */                                      \
  X(plan_offsets, (const View& active, const View& offsets, int64_t device, int64_t stream))                                  \
  /* active; visible < 0: unknown, offsets come from plan_offsets -> coords [T, 3], slots [B, Gh, Gw], offsets, all int32 */  \
  X(build_plan, (const View& active, int64_t visible, const View& coords, const View& slots, const View& offsets,             \
                 int64_t device, int64_t stream))                                                                             \
  /* x [B, C, H, W] -> out [T, C, t, t] */                                                                                    \
  X(pack_tiles, (const View& x, const View& coords, const View& slots, const View& out, int64_t device, int64_t stream))      \
  /* tiles [T, C, t, t] -> out [B, C, Gh*t, Gw*t] */                                                                          \
  X(unpack_tiles, (const View& tiles, const View& slots, double fill, const View& out, int64_t device, int64_t stream))       \
  /* x [T, C, t, t], offsets [B + 1] -> out float32 [B, C] */                                                                 \
  X(image_sum, (const View& x, const View& offsets, const View& out, int64_t device, int64_t stream))                         \
  /* x [T, C, t, t] -> out, taps int16 [T, C, t/s, t/s]; geometry as in ops/pool_geometry.py */                               \
  X(tile_pool_forward, (const View& x, const View& coords, const View& slots, const Ints& geometry, double pad_value,         \
                        const View& out, const View& taps, int64_t device, int64_t stream))                                   \
  /* grad, taps [T, C, t/s, t/s] -> out [T, C, t, t] */                                                                       \
  X(tile_pool_backward, (const View& grad, const View& taps, const View& coords, const View& slots, const Ints& geometry,     \
                         const View& out, int64_t device, int64_t stream))                                                    \
  /* Depthwise: x [T, C, t, t], weight [C, 1, kh, kw], bias [C] or None -> out [T, C, t/s, t/s] */                            \
  X(depthwise_forward, (const View& x, const View& weight, const View& bias, const View& coords, const View& slots,           \
                        const Ints& geometry, const View& out, int64_t device, int64_t stream))                               \
  X(depthwise_grad_input, (const View& grad, const View& weight, const View& coords, const View& slots, const Ints& geometry, \
                           const View& out, int64_t device, int64_t stream))                                                  \
  /* sums float32 [splits, C * kh * kw] -> out [C, 1, kh, kw] */                                                              \
  X(depthwise_grad_weight, (const View& grad, const View& x, const View& coords, const View& slots, const Ints& geometry,     \
                            const View& sums, const View& out, int64_t device, int64_t stream))                               \
  /* grad [T, K, t, t], sums float32 [splits, K] -> out [K] */                                                                \
  X(tile_conv_grad_bias, (const View& grad, const View& sums, const View& out, int64_t device, int64_t stream))               \
  /* x [N, C, H, W], sums float64 [shares, 2, C] -> mean, var float32 [C]; moves the running ones, or None */                  \
  X(batch_norm_moments, (const View& x, const View& sums, const View& mean, const View& var, const View& running_mean,        \
                         const View& running_var, double momentum, int64_t device, int64_t stream))                           \
  /* x, residual [N, C, H, W], rows float32 [C] -> out [N, C, H, W]; activation 0 none, 1 ReLU, 2 ReLU6 */                    \
  X(batch_norm_apply, (const View& x, const View& residual, const View& weight, const View& bias, const View& mean,           \
                       const View& var, double eps, int64_t activation, const View& out, int64_t device, int64_t stream))     \
  /* grad, x, out (None without a residual), sums float64 [shares, 2, C] -> totals float32 [2, C], grad_x, grad_residual or None */ \
  X(batch_norm_backward, (const View& grad, const View& x, const View& out, const View& weight, const View& bias,             \
                          const View& mean, const View& var, double eps, int64_t activation, const View& sums,                \
                          const View& totals, const View& grad_x, const View& grad_residual, int64_t device, int64_t stream)) \
  /* region [B, H, W] -> inside bool [B, Gh, Gw], cover int64 [B, Gh, Gw] */                                                  \
  X(region_coverage, (const View& region, int64_t threshold, const View& inside, const View& cover, int64_t device, int64_t stream)) \
  /* The two in one; rule: Q32 ratios outside, inside and where the region is empty, total to hide or -1, stream of its word */ \
  X(region_active, (const View& region, int64_t threshold, const Ints& rule, int64_t seed, const View& ids, int64_t epoch,    \
                    int64_t view, const View& inside, const View& cover, const View& active, int64_t device, int64_t stream)) \
  /* ids int64 [B] -> out int64 [B, n] */                                                                                     \
  X(random_words, (const View& ids, int64_t seed, int64_t epoch, int64_t view, int64_t tag, const View& out,                  \
                   int64_t device, int64_t stream))                                                                           \
  /* strata [B, L], amounts int64 [S] or [B, S], ids [B], weights int64 [B, L] or None -> active bool [B, Gh, Gw] */          \
  X(sample_active, (const View& strata, const View& amounts, int64_t exact, int64_t seed, const View& ids, int64_t epoch,     \
                    int64_t view, const View& weights, const View& active, int64_t device, int64_t stream))
// clang-format on

namespace mwm {
namespace cuda {

#define MWM_CUDA_DECLARATION(name, arguments) void name arguments;
MWM_CUDA_KERNELS(MWM_CUDA_DECLARATION)
#undef MWM_CUDA_DECLARATION

}  // namespace cuda
}  // namespace mwm
