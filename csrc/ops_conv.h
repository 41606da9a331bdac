// The convolution kernels' part of the list in ops.h. Geometry as in ops/conv_geometry.py; tiles are channels-last.
#pragma once

#include "view.h"

// clang-format off
#define MWM_CONV_KERNELS(X)                                                                                                   \
  /* x [T, C, t, t], weight [K, C / groups, kh, kw], bias [K] or None, workspace [n] -> out [T, K, t/s, t/s] */               \
  X(tile_conv_forward, (const View& x, const View& weight, const View& bias, const View& coords, const View& slots,           \
                        const Ints& geometry, const View& workspace, const View& out, int64_t threads))                       \
  /* grad [T, K, t/s, t/s], weight [K, C / groups, kh, kw], workspace [n] -> out [T, C, t, t] */                              \
  X(tile_conv_grad_input, (const View& grad, const View& weight, const View& coords, const View& slots, const Ints& geometry, \
                           const View& workspace, const View& out, int64_t threads))                                          \
  /* grad [T, K, t/s, t/s], x [T, C, t, t], sums [splits, K * C / groups * kh * kw] -> out [K, C / groups, kh, kw] */         \
  X(tile_conv_grad_weight, (const View& grad, const View& x, const View& coords, const View& slots, const Ints& geometry,     \
                            const View& sums, const View& out, int64_t threads))                                              \
  /* grad [T, K, t, t], sums [splits, K] -> out [K] */                                                                        \
  X(tile_conv_grad_bias, (const View& grad, const View& sums, const View& out, int64_t threads))                              \
  /* 3x3, stride 1, padding 1 by F(outputs x outputs, 3 x 3), tiles of any height and width: x [S, C, h, w], weight [K, C, 3, 3] -> \
     out [T, K, h, w]; adjoint: x [S, K, h, w] -> out [T, C, h, w]. workspace [n] float32 */                                  \
  X(winograd_conv, (const View& x, const View& weight, const View& bias, const View& coords, const View& slots,               \
                    int64_t outputs, int64_t adjoint, const View& workspace, const View& out, int64_t threads))               \
  /* grad [T, K, h, w], x [S, C, h, w], sums [splits, n] float32 -> out [K, C, 3, 3] */                                       \
  X(winograd_grad_weight, (const View& grad, const View& x, const View& coords, const View& slots, int64_t outputs,           \
                           const View& sums, const View& out, int64_t threads))                                               \
  /* The three for groups = C = K: weight [C, 1, kh, kw], workspace [C], sums [splits, C * kh * kw] */                        \
  X(depthwise_forward, (const View& x, const View& weight, const View& bias, const View& coords, const View& slots,           \
                        const Ints& geometry, const View& workspace, const View& out, int64_t threads))                       \
  X(depthwise_grad_input, (const View& grad, const View& weight, const View& coords, const View& slots, const Ints& geometry, \
                           const View& workspace, const View& out, int64_t threads))                                          \
  X(depthwise_grad_weight, (const View& grad, const View& x, const View& coords, const View& slots, const Ints& geometry,     \
                            const View& sums, const View& out, int64_t threads))
// clang-format on
