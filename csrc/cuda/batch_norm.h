// What the kernels of batch norm share: how a block's threads lie on rows [R, C], the parameters of a norm, checks.
//
// A block takes a share of the rows and some vectors of channels; its threads lie as groups x lanes, a lane on 16 bytes of channels
// where rows allow that. Sums go in two stages of fixed order: a thread sums its rows in float32, a block its groups and the last kernel
// the blocks in float64. Deviations are summed from each thread's first value, so a mean far from zero costs no digits of the variance.
#pragma once

#include "device.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kThreads = 256, kMostLanes = 32;
constexpr int kRun = 2;              // vectors of a map that a thread has in flight; kMomentsRun where it reads one map only
constexpr int64_t kPrograms = 1056;  // blocks of a pass that writes maps: eight for each multiprocessor of an H100

struct Rows {
  int64_t rows, channels, per_share;  // per_share: rows of a block
  int32_t lanes, groups, lane_bits;

  // Rows of a block, none past the end.
  __host__ __device__ int64_t begin(int64_t share) const { return least(share * per_share, rows); }
};

template <class T, int kVec>
__device__ inline Pack<T, kVec> load(const T* from) { return *reinterpret_cast<const Pack<T, kVec>*>(from); }

// A row of parameters, `missing` where there is none; 16 bytes at a time where channels are.
template <int kVec>
__device__ inline void load_row(const float* row, int64_t channel, float missing, float (&into)[kVec]) {
  constexpr int kPart = kVec % 4 == 0 ? 4 : 1;
  MWM_UNROLL
  for (int j = 0; j < kVec; j += kPart) {
    const Pack<float, kPart> part = row ? load<float, kPart>(row + channel + j) : Pack<float, kPart>{};
    MWM_UNROLL
    for (int i = 0; i < kPart; ++i) into[j + i] = row ? part.item[i] : missing;
  }
}

// scale = 1 / sqrt(var + eps)
template <int kVec>
__device__ inline void load_scale(const float* var, int64_t channel, float eps, float (&scale)[kVec]) {
  load_row(var, channel, 1.0f, scale);
  MWM_UNROLL
  for (int j = 0; j < kVec; ++j) scale[j] = 1.0f / sqrtf(scale[j] + eps);
}

// 0 below zero, `cap` above it; NaN stays. ReLU has a cap of NaN, which nothing exceeds.
__device__ inline float rectified(float y, float cap) {
  y = y < 0 ? 0.0f : y;
  return y > cap ? cap : y;
}

// The gradient before the activation, from y on either side of it.
__device__ inline float passed(float grad, float y, float cap) { return y <= 0 || y >= cap ? 0.0f : grad; }

// Where a thread works: its channels, or none, and its first row and the end of its block's share.
struct At {
  int64_t channel, first, last;
  int lane, group;
  bool some;

  __device__ At(const Rows& size, int vec) {
    lane = static_cast<int>(threadIdx.x) & (size.lanes - 1), group = static_cast<int>(threadIdx.x) >> size.lane_bits;
    channel = (static_cast<int64_t>(blockIdx.y) * size.lanes + lane) * vec;
    first = size.begin(blockIdx.x) + group, last = size.begin(static_cast<int64_t>(blockIdx.x) + 1);
    some = channel < size.channels;
  }
};

// The parameters of a norm, rows float32 [C] or null, and its activation's cap.
struct Norm {
  const float *weight, *bias, *mean, *var;
  float eps, cap;
};

// Threads of a block for rows of so many vectors, as many lanes as leave none idle, at most a warp's; and shares for at most so many blocks
// along the rows, each of whole runs of its threads.
inline Rows rows_of(const View& x, int vec, int run, int64_t shares) {
  const int64_t vectors = ceil_div<int64_t>(x.shape[1], vec), rows = x.shape[0] * x.shape[2] * x.shape[3];
  int32_t lanes = kMostLanes, bits = 0;
  while (lanes > 4 && vectors % lanes != 0) lanes /= 2;
  while (lanes > 1 && lanes / 2 >= vectors) lanes /= 2;
  while ((1 << bits) < lanes) ++bits;
  const int32_t groups = kThreads / lanes;
  const int64_t step = static_cast<int64_t>(groups) * run;
  return {rows, x.shape[1], ceil_div(ceil_div(rows, shares), step) * step, lanes, groups, bits};
}

// Whether the channels of every map and row can be read 16 bytes at a time.
inline bool wide(std::initializer_list<const View*> maps) {
  for (const View* map : maps)
    if (!is_none(*map) && (map->shape[map->ndim == 4 ? 1 : map->ndim - 1] * item_size(map->dtype) % 16 != 0 || !aligned(*map, 16))) return false;
  return true;
}

// Calls function(T{}, vector length as a constant, whether there is an activation as a constant).
template <class Function>
void with_kernel(const char* op, DType dtype, bool vectors, bool activation, const Function& function) {
  with_float(op, dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto choose = [&](auto vec) { activation ? function(tag, vec, std::true_type{}) : function(tag, vec, std::false_type{}); };
    vectors ? choose(std::integral_constant<int, 16 / sizeof(T)>{}) : choose(std::integral_constant<int, 1>{});
  });
}

inline int64_t blocks_y(const Rows& size, int vec) { return ceil_div<int64_t>(size.channels, static_cast<int64_t>(size.lanes) * vec); }

// The same for a pass that writes maps, and its blocks along the rows: all run at once.
inline Rows written_rows_of(const View& x, int vec) {
  const Rows one = rows_of(x, vec, kRun, 1);
  return rows_of(x, vec, kRun, most<int64_t>(1, kPrograms / blocks_y(one, vec)));
}

inline int64_t blocks_x(const Rows& size) { return ceil_div(size.rows, size.per_share); }

inline void check_map(const char* op, const View& map, const View& x) {
  if (is_none(map)) return;
  check_tiles(op, map, x.dtype);
  for (int i = 0; i < 4; ++i)
    if (map.shape[i] != x.shape[i]) fail("%s: the maps differ in shape", op);
}

inline void check_row(const char* op, const View& row, int64_t channels, bool optional) {
  if (optional && is_none(row)) return;
  check(op, row, 1, DType::kFloat32);
  check_contiguous(op, row);
  if (row.shape[0] != channels) fail("%s: rows must be [C]", op);
}

inline void check_sums(const char* op, const View& sums, int64_t channels) {
  check(op, sums, 3, DType::kFloat64);
  check_contiguous(op, sums);
  if (sums.shape[0] < 1 || sums.shape[0] > INT32_MAX || sums.shape[1] != 2 || sums.shape[2] != channels) fail("%s: sums must be [shares, 2, C]", op);
}

inline Norm norm_of(const char* op, const View& x, const View& weight, const View& bias, const View& mean, const View& var, double eps, int64_t activation) {
  check_tiles(op, x, x.dtype);
  for (const View* row : {&weight, &bias}) check_row(op, *row, x.shape[1], true);
  for (const View* row : {&mean, &var}) check_row(op, *row, x.shape[1], false);
  if (activation < 0 || activation > 2) fail("%s: activation must be 0, 1 or 2", op);
  return {pointer<float>(weight), pointer<float>(bias), pointer<float>(mean), pointer<float>(var), static_cast<float>(eps), activation == 2 ? 6.0f : __builtin_nanf("")};
}

}  // namespace
}  // namespace cuda
}  // namespace mwm
