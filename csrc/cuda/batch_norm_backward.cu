// The derivative of batch norm with a residual and a ReLU: two sums of each channel, in fixed shares that are then added in order, and one
// pass that writes the gradients of x and of the residual.
#include "batch_norm.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kJoinLanes = 8, kJoinGroups = kThreads / kJoinLanes;

// The maps that the derivative reads: the output's gradient, x, and the output where the activation is not computed again from x.
template <class T, int kVec>
struct Maps {
  const T *grad, *x, *out;
  Pack<T, kVec> gradients[kRun], values[kRun], results[kRun];

  __device__ void load_run(int i, int64_t place) {
    gradients[i] = load<T, kVec>(grad + place);
    values[i] = load<T, kVec>(x + place);
    if (out) results[i] = load<T, kVec>(out + place);
  }
};

// Sums of g and of g * (x - mean) of each share, g the gradient before the activation.
template <class T, int kVec, bool kAct>
__global__ void __launch_bounds__(kThreads, 2) backward_sums_kernel(const T* grad, const T* x, const T* out, Norm norm, Rows size, double* sums) {
  __shared__ double parts[2][kThreads * kVec];
  const At at(size, kVec);
  const int64_t groups = size.groups;
  float total[kVec] = {}, product[kVec] = {};
  if (at.some) {
    int64_t row = at.first;
    Maps<T, kVec> maps{grad, x, kAct ? out : nullptr, {}, {}, {}};
    const auto fetch = [&] {
      if (row + (kRun - 1) * groups >= at.last) return false;
      MWM_UNROLL
      for (int i = 0; i < kRun; ++i) maps.load_run(i, (row + i * groups) * size.channels + at.channel);
      return true;
    };
    bool full = fetch();  // on its way while the parameters come
    float mean[kVec], slope[kVec], bias[kVec], weight[kVec];
    load_row(norm.mean, at.channel, 0.0f, mean);
    load_row(norm.weight, at.channel, 1.0f, weight);
    load_row(norm.bias, at.channel, 0.0f, bias);
    load_scale(norm.var, at.channel, norm.eps, slope);
    MWM_UNROLL
    for (int j = 0; j < kVec; ++j) slope[j] *= weight[j];
    const auto add = [&](int i) {
      MWM_UNROLL
      for (int j = 0; j < kVec; ++j) {
        const float deviation = widen(maps.values[i].item[j]) - mean[j];
        float g = widen(maps.gradients[i].item[j]);
        if (kAct) g = passed(g, out ? widen(maps.results[i].item[j]) : deviation * slope[j] + bias[j], norm.cap);
        total[j] += g;
        product[j] += g * deviation;
      }
    };
    while (full) {
      MWM_UNROLL
      for (int i = 0; i < kRun; ++i) add(i);
      row += kRun * groups;
      full = fetch();
    }
    for (; row < at.last; row += groups) maps.load_run(0, row * size.channels + at.channel), add(0);
  }
  MWM_UNROLL
  for (int j = 0; j < kVec; ++j) {
    parts[0][threadIdx.x * kVec + j] = static_cast<double>(total[j]);
    parts[1][threadIdx.x * kVec + j] = static_cast<double>(product[j]);
  }
  __syncthreads();
  const int width = size.lanes * kVec;
  for (int item = static_cast<int>(threadIdx.x); item < 2 * width; item += kThreads) {
    const int which = item / width, own = item % width;
    const int64_t channel = static_cast<int64_t>(blockIdx.y) * width + own;
    if (channel >= size.channels) continue;
    double sum = 0;
    for (int group = 0; group < size.groups; ++group) sum += parts[which][group * width + own];
    sums[(static_cast<int64_t>(blockIdx.x) * 2 + which) * size.channels + channel] = sum;
  }
}

// totals float32 [2, C]: the gradients of bias and weight.
__global__ void __launch_bounds__(kThreads) join_sums_kernel(const double* sums, const float* var, float eps, int64_t channels, int32_t shares, float* totals) {
  __shared__ double parts[kJoinGroups][kJoinLanes];
  const int lane = static_cast<int>(threadIdx.x) % kJoinLanes, group = static_cast<int>(threadIdx.x) / kJoinLanes;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kJoinLanes + lane;
  double total = 0;
  if (item < 2 * channels) {
    MWM_UNROLL_BY(4)
    for (int64_t share = group; share < shares; share += kJoinGroups) total += sums[share * 2 * channels + item];
  }
  parts[group][lane] = total;
  __syncthreads();
  if (group != 0 || item >= 2 * channels) return;
  for (int other = 1; other < kJoinGroups; ++other) total += parts[other][lane];
  if (item >= channels) total *= static_cast<double>(1.0f / sqrtf(var[item - channels] + eps));
  totals[item] = static_cast<float>(total);
}

template <class T, int kVec, bool kAct>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const T* grad, const T* x, const T* out, Norm norm, const float* totals, Rows size, T* grad_x, T* grad_residual) {
  const At at(size, kVec);
  if (!at.some) return;
  const int64_t groups = size.groups;
  int64_t row = at.first;
  Maps<T, kVec> maps{grad, x, kAct ? out : nullptr, {}, {}, {}};
  const auto place = [&](int i) { return (row + i * groups) * size.channels + at.channel; };
  const auto fetch = [&] {
    if (row + (kRun - 1) * groups >= at.last) return false;
    MWM_UNROLL
    for (int i = 0; i < kRun; ++i) maps.load_run(i, place(i));
    return true;
  };
  bool full = fetch();  // on its way while the parameters come
  // grad_x = slope * (g - mean of g - x_hat * mean of g * x_hat)
  float mean[kVec], slope[kVec], bias[kVec], weight[kVec], level[kVec], tilt[kVec];
  load_row(norm.mean, at.channel, 0.0f, mean);
  load_row(norm.weight, at.channel, 1.0f, weight);
  load_row(norm.bias, at.channel, 0.0f, bias);
  load_row(totals, at.channel, 0.0f, level);
  load_row(totals + size.channels, at.channel, 0.0f, tilt);
  load_scale(norm.var, at.channel, norm.eps, slope);
  const float rows = static_cast<float>(size.rows);
  MWM_UNROLL
  for (int j = 0; j < kVec; ++j) {
    level[j] = level[j] / rows;
    tilt[j] = tilt[j] / rows * slope[j];
    slope[j] *= weight[j];
  }
  const auto put = [&](int i) {
    Pack<T, kVec> of_x, of_residual;
    MWM_UNROLL
    for (int j = 0; j < kVec; ++j) {
      const float deviation = widen(maps.values[i].item[j]) - mean[j];
      float g = widen(maps.gradients[i].item[j]);
      if (kAct) g = passed(g, out ? widen(maps.results[i].item[j]) : deviation * slope[j] + bias[j], norm.cap);
      of_residual.item[j] = narrow<T>(g);
      of_x.item[j] = narrow<T>((g - level[j] - deviation * tilt[j]) * slope[j]);
    }
    if (grad_residual) *reinterpret_cast<Pack<T, kVec>*>(grad_residual + place(i)) = of_residual;
    if (grad_x) *reinterpret_cast<Pack<T, kVec>*>(grad_x + place(i)) = of_x;
  };
  while (full) {
    MWM_UNROLL
    for (int i = 0; i < kRun; ++i) put(i);
    row += kRun * groups;
    full = fetch();
  }
  for (; row < at.last; row += groups) maps.load_run(0, place(0)), put(0);
}

}  // namespace

void batch_norm_backward(const View& grad, const View& x, const View& out, const View& weight, const View& bias, const View& mean, const View& var, double eps,
                         int64_t activation, const View& sums, const View& totals, const View& grad_x, const View& grad_residual, int64_t device, int64_t stream) {
  const char* op = "batch_norm_backward";
  const Norm norm = norm_of(op, x, weight, bias, mean, var, eps, activation);
  check_tiles(op, grad, x.dtype);
  for (const View* map : {&grad, &out, &grad_x, &grad_residual}) check_map(op, *map, x);
  const int64_t channels = x.shape[1], shares = sums.shape[0];
  check_sums(op, sums, channels);
  check(op, totals, 2, DType::kFloat32);
  check_contiguous(op, totals);
  if (totals.shape[0] != 2 || totals.shape[1] != channels) fail("%s: totals must be [2, C]", op);
  const Place place(device, stream);
  with_kernel(op, x.dtype, wide({&grad, &x, &out, &grad_x, &grad_residual, &weight, &bias, &mean, &var, &totals}), activation != 0, [&](auto tag, auto vec, auto act) {
    using T = decltype(tag);
    constexpr int kVec = decltype(vec)::value;
    constexpr bool kAct = decltype(act)::value;
    const Rows size = rows_of(x, kVec, kRun, shares), written = written_rows_of(x, kVec);
    launch(op, place, shares, blocks_y(size, kVec), kThreads, backward_sums_kernel<T, kVec, kAct>, pointer<T>(grad), pointer<T>(x), pointer<T>(out), norm, size,
           pointer<double>(sums));
    launch(op, place, ceil_div<int64_t>(2 * channels, kJoinLanes), 1, kThreads, join_sums_kernel, pointer<double>(sums), norm.var, norm.eps, channels,
           static_cast<int32_t>(shares), pointer<float>(totals));
    if ((!is_none(grad_x) || !is_none(grad_residual)) && size.rows > 0)
      launch(op, place, blocks_x(written), blocks_y(written, kVec), kThreads, backward_kernel<T, kVec, kAct>, pointer<T>(grad), pointer<T>(x), pointer<T>(out), norm,
             pointer<float>(totals), written, pointer<T>(grad_x), pointer<T>(grad_residual));
  });
}

}  // namespace cuda
}  // namespace mwm
