// Every kernel of the CPU, declared once: views in, views out, number of threads. Shapes in brackets are those of Python.
//
// To add one: put a line into a list below and define the function in csrc/cpu/<op>.cpp inside namespace mwm::MWM_ISA. It is
// then compiled per instruction set, entered into the table, and bound as mwm._core.<name> without further code.
// Arguments may be `const View&`, `const Ints&`, int64_t, double. Checks of a kernel come first and throw with fail();
// a parallel body must not throw.
#pragma once

#include "ops_conv.h"
#include "view.h"

// clang-format off
#define MWM_CORE_KERNELS(X)                                                                                                   \
  /* active bool [B, Gh, Gw]; visible < 0: unknown -> coords [T, 3], slots [B, Gh, Gw], offsets [B + 1], all int32 */         \
  X(build_plan, (const View& active, int64_t visible, const View& coords, const View& slots, const View& offsets))            \
  /* x [B, C, H, W] -> out [T, C, t, t] */                                                                                    \
  X(pack_tiles, (const View& x, const View& coords, const View& slots, const View& out, int64_t threads))                     \
  /* tiles [T, C, t, t], token [C] or None: then fill is everywhere the same -> out [B, C, Gh*t, Gw*t] */                     \
  X(unpack_tiles, (const View& tiles, const View& slots, double fill, const View& token, const View& out, int64_t threads))   \
  /* grad [B, C, Gh*t, Gw*t], sums float32 | float64 [B, Gh, C] -> out [C], the sum over what is hidden */                    \
  X(unpack_tiles_grad_token, (const View& grad, const View& slots, const View& sums, const View& out, int64_t threads))       \
  /* x [T, C, t, t], offsets [B + 1] -> out float32 | float64 [B, C] */                                                       \
  X(image_sum, (const View& x, const View& offsets, const View& out, int64_t threads))                                        \
  /* x [T, C, t, t] -> out, taps int16 [T, C, t/s, t/s]; geometry as in ops/pool_geometry.py */                               \
  X(tile_pool_forward, (const View& x, const View& coords, const View& slots, const Ints& geometry, double pad_value,         \
                        const View& out, const View& taps, int64_t threads))                                                  \
  /* grad, taps [T, C, t/s, t/s] -> out [T, C, t, t] */                                                                       \
  X(tile_pool_backward, (const View& grad, const View& taps, const View& coords, const View& slots, const Ints& geometry,     \
                         const View& out, int64_t threads))                                                                   \
  /* ids int64 [B] -> out int64 [B, n] */                                                                                     \
  X(random_words, (const View& ids, int64_t seed, int64_t epoch, int64_t view, int64_t stream, const View& out, int64_t threads)) \
  /* strata [B, L], amounts int64 [S] or [B, S], ids [B], weights int64 [B, L] or None -> active bool [B, Gh, Gw] */          \
  X(sample_active, (const View& strata, const View& amounts, int64_t exact, int64_t seed, const View& ids, int64_t epoch,     \
                    int64_t view, const View& weights, const View& active, int64_t threads))                                  \
  /* region [B, H, W] -> inside bool [B, Gh, Gw], cover int64 [B, Gh, Gw] */                                                  \
  X(region_coverage, (const View& region, int64_t threshold, const View& inside, const View& cover, int64_t threads))         \
  /* x [N, C, H, W], sums float64 [splits, 2, C] -> mean, var [C]; updates the running ones, or None */                       \
  X(batch_norm_moments, (const View& x, const View& sums, const View& mean, const View& var, const View& running_mean,        \
                         const View& running_var, double momentum, int64_t threads))                                          \
  /* x, residual [N, C, H, W], rows [C] -> out [N, C, H, W]; activation 0 none, 1 ReLU, 2 ReLU6 */                            \
  X(batch_norm_apply, (const View& x, const View& residual, const View& weight, const View& bias, const View& mean,           \
                       const View& var, double eps, int64_t activation, const View& out, int64_t threads))                    \
  /* grad, x, out (None without a residual) -> grad_x, grad_residual [N, C, H, W], grad_weight, grad_bias [C], each or None */ \
  X(batch_norm_backward, (const View& grad, const View& x, const View& out, const View& weight, const View& bias,             \
                          const View& mean, const View& var, double eps, int64_t activation, const View& sums, const View& grad_x,              \
                          const View& grad_residual, const View& grad_weight, const View& grad_bias, int64_t threads))
// clang-format on

#define MWM_KERNELS(X) MWM_CORE_KERNELS(X) MWM_CONV_KERNELS(X)

namespace mwm {

// One instruction set's implementations.
struct Kernels {
#define MWM_MEMBER(name, arguments) void(*name) arguments;
  MWM_KERNELS(MWM_MEMBER)
#undef MWM_MEMBER
};

// The table in use; chosen from cpuid at load, changed by set_isa. dispatch.cpp.
const Kernels& kernels();
const char* isa();
// Name of the i-th instruction set that is built and that this CPU has, best first; nullptr after the last.
const char* available_isa(int i);
// False when the name is unknown or the CPU lacks it.
bool set_isa(const char* name);

}  // namespace mwm
